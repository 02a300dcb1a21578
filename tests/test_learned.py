"""Learning a reward from preferences: what is learned, resuming, refusals."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Steer
from PIL import Image
from safetensors.torch import load_file

from steer.apps.learning import run_reward_training, summary
from steer.apps.scenes.training import LENGTH, build_tokenizer
from steer.errors import InputError
from steer.files import CHECKSUMS
from steer.reward import RewardError, score, score_components
from steer.rewards.clip import BACKGROUND
from steer.rewards.learned import LearnedReward, RewardTrainingConfig, train_reward
from steer.rewards.parser import load_reward
from steer.rewards.preference_pairs import Pairs, read_pairs

SIDE = 16
RECIPE = RewardTrainingConfig(backbone="", head="image", steps=250, batch_size=16, learning_rate=3e-3, held_out=0.25)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP in open_clip's format, its weights drawn at random by one step of contrastive training."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = build_tokenizer(folder)
    vision = {"image_size": SIDE, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": LENGTH, "vocab_size": len(tokenizer), "width": 32, "heads": 2, "layers": 1}
    model = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text | {"hf_tokenizer_name": "tiny"}}
    config = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    captions = [{"image": image, "prompt": prompt} for image, prompt in sample_image(folder / "images", 40)]
    data = folder / "captions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in captions))
    config = RewardTrainingConfig(str(folder), objective="contrastive", train_backbone=True, steps=40, batch_size=16)
    run_reward_training(data, config, folder, folder / "work", "cpu")
    return folder


def sample_image(folder: Path, count: int) -> list[tuple[str, str]]:
    """`count` plain images, red or blue, light or dark, as files, and what each shows."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        colour = number % 2
        pixels = np.full((SIDE, SIDE, 3), rng.uniform(0, 90), np.float32)
        pixels[..., 2 * colour] += rng.uniform(40, 160)
        Image.fromarray((pixels + rng.uniform(0, 5, pixels.shape)).astype(np.uint8)).save(folder / f"{number}.png")
        shape = ("circle", "square", "triangle", "cross", "star")[number // 2 % 5]
        rows.append((f"{folder.name}/{number}.png", f"a {('red', 'blue')[colour]} {shape}"))
    return rows


def test_a_trained_clip_keeps_features_of_images_that_it_did_not_learn_from(clip_folder: Path, tmp_path: Path) -> None:
    """So that a reward from example images needs no others."""
    (tmp_path / "clip").mkdir()
    data = clip_folder / "captions.jsonl"
    config = RewardTrainingConfig(str(clip_folder), objective="contrastive", train_backbone=True, steps=1, held_out=0.5)
    run_reward_training(data, config, tmp_path / "clip", tmp_path / "work", "cpu")
    load_reward(f"like:{clip_folder / 'images'},model={tmp_path / 'clip'}")
    (stored,) = load_file(tmp_path / "clip" / BACKGROUND).values()
    report = json.loads((tmp_path / "work" / "report.json").read_text())
    assert len(stored) == report["captions"]["held_out"] >= 8


def test_contrastive_training_uses_or_refuses_every_option(clip_folder: Path, tmp_path: Path, steer: Steer) -> None:
    words = ["rewards", "train", clip_folder / "captions.jsonl", "--objective", "contrastive", "--steps", 1]
    words += ["--backbone", clip_folder, "--out", tmp_path / "clip", "--work", tmp_path / "work"]
    code, _, err = steer(*words, "--max-rows", 10)
    report = json.loads((tmp_path / "work" / "report.json").read_text())
    assert code == 0 and sum(report["captions"].values()) == 10, err
    for more in (["--members", 2], ["--head", "image"], ["--start", "x"], ["--label-noise", 0.1], ["--mix-text", 0.1]):
        code, _, err = steer(*words, *more)
        assert code == 2 and f"{more[0]} is not an option of --objective contrastive: leave it out" in err


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of images of one prompt, of which the lighter one is chosen."""
    folder = tmp_path_factory.mktemp("pairs")
    images = sample_image(folder / "images", 120)
    light = [np.asarray(Image.open(folder / name)).mean() for name, _ in images]
    rng, rows = np.random.default_rng(1), []
    for _ in range(160):
        a = int(rng.integers(len(images)))
        b = int(rng.choice([k for k in range(len(images)) if images[k][1] == images[a][1] and k != a]))
        choice = "a" if light[a] > light[b] else "b"
        rows.append({"image_a": images[a][0], "image_b": images[b][0], "prompt": images[a][1], "choice": choice})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def pairs(pairs_file: Path) -> Pairs:
    return read_pairs(pairs_file)


@pytest.fixture
def recipe(clip_folder: Path) -> RewardTrainingConfig:
    return replace(RECIPE, backbone=str(clip_folder))


def grey(level: float) -> torch.Tensor:
    return torch.full((1, 3, SIDE, SIDE), level)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "changes",
    [
        {"head": "image"},
        {"head": "pair"},
        {"head": "image", "train_backbone": True, "steps": 40},
        {"head": "similarity", "train_backbone": True, "steps": 60},
        {"head": "image", "objective": "regression"},
        {"head": "image", "objective": "scaled-bradley-terry", "label_smoothing": 0.05},
        {"head": "image", "label_noise": 0.1},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_what_people_choose_is_learned(
    recipe: RewardTrainingConfig, pairs: Pairs, tmp_path: Path, changes: dict[str, object]
) -> None:
    report = train_reward(pairs, replace(recipe, **changes), tmp_path / "light", tmp_path / "work")  # type: ignore[arg-type]
    assert report["ensemble"]["accuracy"] > 0.8
    assert report["pairs"]["trained"] + report["pairs"]["held_out"] == len(pairs)
    reward = load_reward(str(tmp_path / "light"))
    assert reward.name == "light" and reward.differentiable
    dark, light = (score(reward, grey(level), ["a red circle"]) for level in (0.1, 0.8))
    assert light > dark


def test_with_nothing_held_out_the_summary_says_so(recipe: RewardTrainingConfig, pairs: Pairs, tmp_path: Path) -> None:
    report = train_reward(pairs, replace(recipe, held_out=0.0, steps=2), tmp_path / "r", tmp_path / "work")
    assert report["pairs"] == {"trained": len(pairs), "held_out": 0}
    assert summary(report).endswith("on the training pairs themselves")


def test_members_differ_and_are_aggregated(recipe: RewardTrainingConfig, pairs: Pairs, tmp_path: Path) -> None:
    report = train_reward(pairs, replace(recipe, members=3), tmp_path / "r", tmp_path / "work")
    assert len(report["members"]) == 3
    images = torch.rand(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    prompts = ["a blue star"] * 5
    members = LearnedReward(str(tmp_path / "r")).members(images, prompts)
    assert members.shape == (3, 5) and (members[0] - members[1]).abs().max() > 1e-3
    for name, expected in (
        ("mean", members.mean(0)),
        ("min", members.amin(0)),
        ("mean-std", members.mean(0) - members.std(0, correction=0)),
    ):
        total, components = score_components(LearnedReward(str(tmp_path / "r"), aggregate=name), images, prompts)
        assert torch.allclose(total, expected, atol=1e-5)
        assert list(components) == ["r[0]", "r[1]", "r[2]"]
    robust = load_reward(f"preference:{tmp_path / 'r'},aggregate=robust,gamma=0.25")
    assert robust.name == "robust(r, gamma=0.25)"
    assert torch.allclose(robust(images, prompts), 0.25 * members.mean(0) + 0.75 * members.amin(0), atol=1e-5)
    with pytest.raises(RewardError, match="min takes no options, not 'gamma'"):
        load_reward(f"preference:{tmp_path / 'r'},aggregate=min,gamma=0.25")
    alone = score(load_reward(f"preference:{tmp_path / 'r'},member=1"), images, prompts)
    assert torch.allclose(alone, members[1], atol=1e-5)


def test_centred_members_agree_on_where_zero_is(recipe: RewardTrainingConfig, pairs: Pairs, tmp_path: Path) -> None:
    """With the shift penalised, raw rewards of every prompt have a mean near 0: near that of all images."""
    raw = []
    for center_rewards_coefficient in (0.0, 1.0):
        train_reward(
            pairs,
            replace(recipe, head="pair", center_rewards_coefficient=center_rewards_coefficient),
            tmp_path / f"{center_rewards_coefficient}",
            tmp_path / f"w{center_rewards_coefficient}",
        )
        card = json.loads((tmp_path / f"{center_rewards_coefficient}" / "reward.json").read_text())
        raw.append(abs(card["means"][0]) / card["stds"][0])
    assert raw[1] < 0.3 and raw[1] < raw[0]


@pytest.mark.hard
def test_a_slope_penalty_flattens_a_reward(recipe: RewardTrainingConfig, pairs: Pairs, tmp_path: Path) -> None:
    """The slopes of a head through a frozen CLIP to the pixels, with and without the penalty."""
    slopes = []
    for name, weight in (("free", 0.0), ("flat", 100.0)):
        options = {"head": "pair", "slope_penalty": weight, "slope": 0.01}
        train_reward(pairs, replace(recipe, **options), tmp_path / name, tmp_path / f"w-{name}")
        stds = json.loads((tmp_path / name / "reward.json").read_text())["stds"]
        images = torch.full((4, 3, SIDE, SIDE), 0.5).requires_grad_(True)
        rewards = LearnedReward(str(tmp_path / name))(images, ["a blue star"] * 4)
        (gradient,) = torch.autograd.grad(rewards.sum() * stds[0], images)
        slopes.append(gradient[0].norm().item())
    assert slopes[1] < slopes[0] / 2


@pytest.mark.hard
def test_mixed_prompts_train_another_reward_that_is_judged_on_the_prompts_themselves(
    recipe: RewardTrainingConfig, pairs: Pairs, tmp_path: Path
) -> None:
    recipe = replace(recipe, head="pair")
    plain, mixed = (
        train_reward(pairs, replace(recipe, mix_text=share), tmp_path / f"{share}", tmp_path / f"w{share}")
        for share in (0.0, 0.9)
    )
    assert plain["ensemble"] != mixed["ensemble"] and mixed["ensemble"]["accuracy"] > 0.8
    assert plain["pairs"] == mixed["pairs"] and mixed["config"]["mix_text"] == 0.9


def test_a_stopped_training_resumes_to_the_same_reward(
    recipe: RewardTrainingConfig, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(recipe, head="pair", members=2, steps=30, mix_text=0.5)
    train_reward(pairs, recipe, tmp_path / "whole", tmp_path / "work-1")
    stop_in(monkeypatch, "steer.training.supervised.TrainingRun._save", call=2)
    with pytest.raises(KeyboardInterrupt):
        train_reward(pairs, recipe, tmp_path / "components", tmp_path / "work-2")
    monkeypatch.undo()
    assert not (tmp_path / "components").exists()
    train_reward(pairs, recipe, tmp_path / "components", tmp_path / "work-2")
    for name in ("member-0.safetensors", "member-1.safetensors", "reward.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "components" / name).read_bytes()


def stop_in(monkeypatch: pytest.MonkeyPatch, path: str, call: int) -> None:
    """Stops as Ctrl-C does, in the `call`-th call of a method."""
    import importlib

    module, cls, name = path.rsplit(".", 2)
    owner = getattr(importlib.import_module(module), cls)
    original: Callable[..., object] = getattr(owner, name)
    calls: list[int] = []

    def stopping(*args: object) -> object:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(owner, name, stopping)


def test_scores_depend_neither_on_batch_nor_on_order(
    recipe: RewardTrainingConfig, pairs: Pairs, tmp_path: Path
) -> None:
    train_reward(pairs, replace(recipe, head="pair", steps=10), tmp_path / "r", tmp_path / "work")
    images = torch.rand(7, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    prompts = ["a red circle", "a star", "two blue stars and a cross", "a cross", "a", "a blue star", "four squares"]
    mean_ensemble = score(LearnedReward(str(tmp_path / "r")), images, prompts)
    by_two = score(LearnedReward(str(tmp_path / "r"), micro_batch=2), images.flip(0), prompts[::-1]).flip(0)
    one_by_one = torch.cat(
        [score(load_reward(str(tmp_path / "r")), images[k : k + 1], prompts[k : k + 1]) for k in range(7)]
    )
    assert torch.allclose(mean_ensemble, by_two, atol=1e-5) and torch.allclose(mean_ensemble, one_by_one, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "pears"}, "unknown head 'pears': did you mean pair"),
        ({"objective": "bradley"}, "unknown objective 'bradley'"),
        ({"head": "similarity"}, "add --train-backbone"),
        ({"members": 0}, "members must be at least 1 and finite, got 0"),
        ({"slope_penalty": 1.0, "head": "general"}, "--slope-penalty is for rewards of single"),
        (
            {"objective": "triplet", "head": "similarity", "train_backbone": True, "label_smoothing": 0.1},
            "--label-smoothing is not an option of --objective triplet: leave it out",
        ),
        ({"center_rewards_coefficient": -1.0}, "center_rewards_coefficient must be at least 0"),
        ({"label_noise": 0.5}, "label_noise must be at least 0 and below 0.5"),
        ({"held_out": 1.0}, "held_out must be at least 0 and below 1"),
        ({"mix_text": 1.5}, "mix_text must be at least 0 and below 1, got 1.5"),
        ({"mix_text": 0.5, "head": "image"}, "--mix-text is for rewards that read the prompt"),
        ({"backbone": "no/such"}, "CLIP 'no/such' cannot be loaded"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(
    recipe: RewardTrainingConfig,
    pairs: Pairs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    message: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=message):
        train_reward(pairs, replace(recipe, **changes), tmp_path / "r", tmp_path / "work")  # type: ignore[arg-type]


def test_another_run_in_the_same_folder_is_refused(recipe: RewardTrainingConfig, pairs: Pairs, tmp_path: Path) -> None:
    train_reward(pairs, replace(recipe, steps=2), tmp_path / "r", tmp_path / "work")
    with pytest.raises(RewardError, match="holds a run with another configuration"):
        train_reward(pairs, replace(recipe, steps=3), tmp_path / "r", tmp_path / "work")


def test_other_labels_are_another_run(recipe: RewardTrainingConfig, pairs: Pairs, tmp_path: Path) -> None:
    """The weights in the folder are those of the first labels; a run without a digest, of an older version, resumes."""
    again = partial(train_reward, config=replace(recipe, steps=2), out=tmp_path / "r", work=tmp_path / "work")
    again(pairs)
    flipped = replace(pairs, labels=replace(pairs.labels, choice=1 - pairs.labels.choice))
    with pytest.raises(RewardError, match="holds a run with another configuration or other data"):
        again(flipped)
    again(pairs)
    note = tmp_path / "work" / "config.json"
    record = json.loads(note.read_text())
    del record["digest"]
    note.write_text(json.dumps(record))
    again(pairs)
    assert "digest" in json.loads(note.read_text())


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda folder: (folder / "reward.json").write_text("{"), "reward.json: cannot be read"),
        (lambda folder: (folder / "reward.json").unlink(), "no reward.json there"),
        (lambda folder: change(folder, head="torch.load"), "not the card of a learned reward"),
        (lambda folder: change(folder, stds=[0.0]), "not the card of a learned reward"),
        (lambda folder: change(folder, means=[float("nan")]), "not the card of a learned reward"),
        (lambda folder: change(folder, width=10**12), "not the card of a learned reward"),
        (lambda folder: change(folder, width=3), "does not fit this model"),
        (lambda folder: (folder / "member-0.safetensors").unlink(), "no such checkpoint"),
        (lambda folder: (folder / "member-0.safetensors").write_bytes(b"\0" * 40), "cannot be read, is it complete"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    recipe: RewardTrainingConfig, pairs: Pairs, tmp_path: Path, corrupt: Callable[[Path], object], message: str
) -> None:
    train_reward(pairs, replace(recipe, steps=2), tmp_path / "r", tmp_path / "work")
    (tmp_path / "r" / CHECKSUMS).unlink()  # with checksums any change is refused before: see test_files
    corrupt(tmp_path / "r")
    with pytest.raises(RewardError, match=message):
        load_reward(f"preference:{tmp_path / 'r'}")


def change(folder: Path, **values: object) -> None:
    card = json.loads((folder / "reward.json").read_text())
    (folder / "reward.json").write_text(json.dumps(card | values))
