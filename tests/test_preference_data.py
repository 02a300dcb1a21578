"""Human preferences: records are read back, unsuitable ones are refused, and both ways to learn from them agree."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPT
from finetune_runs import PLAIN, config_of
from PIL import Image
from rollouts import call_of, fresh_pipe, move
from safetensors.torch import load_file, save
from torch import Tensor

from steer import D3POConfig, D3POTrainer
from steer.errors import InputError
from steer.pipelines.training.method import sampler_of
from steer.pipelines.training.preference_data import (
    PreferenceDataset,
    PreferenceFolder,
    sampling_config_of,
)
from steer.pipelines.training.preference_files import pixel_hash, pixels_of, read_lines, read_preferences
from steer.training.distributed import SINGLE_PROCESS
from steer.training.rollout import Rows, Sampler, log_probs
from steer.training.trainable import LoRA

CALL = call_of("sd")
GROUPS = [Rows((PROMPT,) * 3, (7,) * 3, (1, 2, 3)), Rows(("a star",) * 3, (8,) * 3, (4, 5, 6))]
CHOICES = [(0, 2, 1), (1, 0, 1), (0, 0, 1)]


def record(path: Path, keep: bool, preferences: list[tuple[int, int, int]] = CHOICES) -> list[str]:
    """Write a folder as the app would; return the names of the groups."""
    pipe = fresh_pipe("sd")
    folder = PreferenceFolder.create(path, pipe, CALL)
    sampler = Sampler(pipe, CALL)
    names = [folder.write_group(*sampler.rollout(rows), keep_trajectories=keep) for rows in GROUPS]
    for group, chosen, rejected in preferences:
        folder.write_preference(names[group], chosen, rejected)
    return names


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same choices with trajectories and with seeds alone: not to be changed."""
    paths = {name: tmp_path_factory.mktemp("choices") / name for name in ("stored", "seeds")}
    for name, path in paths.items():
        record(path, keep=name == "stored")
    return paths


@pytest.fixture
def stored(recorded: dict[str, Path], tmp_path: Path) -> Path:
    """A copy with trajectories, to be changed."""
    return Path(shutil.copytree(recorded["stored"], tmp_path / "choices"))


def tiny(folder: Path, **changed: Any) -> D3POConfig:
    return replace(
        config_of("d3po", **PLAIN, warmup_steps=0), **sampling_config_of(folder) | {"max_steps": 3} | changed
    )


def train(
    folder: Path, out: Path, config: D3POConfig | None = None, pipe: Any = None, resume: bool = False, **options: Any
) -> Any:
    config = replace(config or tiny(folder), output_dir=str(out))
    trainer = D3POTrainer(pipe or fresh_pipe("sd"), None, config, preferences=folder, **options)
    return trainer.train(resume_from_checkpoint=resume)


def dataset(folder: Path, pipe: Any, config: D3POConfig, run: Path) -> PreferenceDataset:
    return PreferenceDataset.of(folder, pipe, replace(config, output_dir=str(run)))


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "final" / "pytorch_lora_weights.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys() and any(value.any() for value in first.values())
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def change_line(path: Path, number: int, **changed: Any) -> None:
    lines = path.read_text().splitlines()
    row = json.loads(lines[number]) | changed
    lines[number] = json.dumps({key: value for key, value in row.items() if value != "drop"})
    path.write_text("\n".join(lines) + "\n")


# ---- learning


@pytest.mark.hard
def test_stored_and_regenerated_trajectories_train_to_the_same_bits(recorded: dict[str, Path], tmp_path: Path) -> None:
    results = {name: train(path, tmp_path / name) for name, path in recorded.items()}
    assert_same_weights(tmp_path / "stored", tmp_path / "seeds")
    for result in results.values():
        first, *later = result.records
        assert (
            first["accuracy"] == 0.5 and abs(first["kl"]) < 1e-9 and abs(first["margin"]) < 1e-9
        )  # the reference itself
        assert all(record["margin"] > 0 and record["pairs"] == 2 for record in later)
    assert not (tmp_path / "stored" / "regenerated").exists()
    again = PreferenceFolder(tmp_path / "seeds" / "regenerated").groups
    for group in read_preferences(recorded["stored"]).groups.values():
        assert torch.equal(again[group.id].load().latents, group.load().latents)


@pytest.mark.few(1)
@pytest.mark.parametrize("trajectory", [False, True])
def test_the_chosen_sample_becomes_likelier_than_the_rejected_one(
    trajectory: bool, recorded: dict[str, Path], tmp_path: Path
) -> None:
    pipe, folder = fresh_pipe("sd"), recorded["stored"]
    config = tiny(folder, max_steps=4, train_batch_size=3, micro_batch=3, kl_weight=0.0, kl_target_nats=None)
    groups = list(read_preferences(folder).groups.values())

    def likelihoods() -> list[Tensor]:
        sampler = sampler_of(pipe, config)
        return [log_probs(sampler, group.load()).sum(1) for group in groups]

    before = likelihoods()
    train(folder, tmp_path, replace(config, ema_decay=0.0, trajectory=trajectory), pipe)
    gained = [after - start for start, after in zip(before, likelihoods(), strict=True)]
    for group, chosen, rejected in CHOICES:
        assert gained[group][chosen] > gained[group][rejected] + 1e-3


def test_each_update_is_the_chosen_and_the_rejected_row_by_todays_policy(recorded: dict[str, Path]) -> None:
    """Every choice once a turn, chosen before rejected, with the signal 1 and 0; the old policy is the present one."""
    folder, pipe = recorded["stored"], fresh_pipe("sd")
    few = {"train_batch_size": 1, "steps_per_generation": 3, "micro_batch": 1, "timestep_fraction": 0.5}
    config = tiny(folder, **few, skip_low_noise_steps=0)
    source = dataset(folder, pipe, config, folder / "unused")
    lora = LoRA(pipe, 2)
    move(lora, 0.05)
    sampler = sampler_of(pipe, config)
    groups = source.records.groups
    stream: list[int] = []
    for number in (0, 1):
        calls: list[int] = []
        sampled = source.collect(number, sampler, lora, lambda calls=calls: calls.append(1), SINGLE_PROCESS)
        assert len(calls) == 3 * 2 * 2  # updates × chunks × (reference, today)
        pairs_seen = []
        for batch in sampled.batches:
            assert [len(chunk.rows) for chunk in batch.chunks] == [1, 1]
            assert batch.rewards.tolist() == [[1.0, 0.0]] and len(batch.steps) == 2
            pair = tuple(chunk.rows.noises[0] for chunk in batch.chunks)
            pairs_seen.append(pair)
            for chunk, reference in zip(batch.chunks, batch.references, strict=True):
                steps = list(batch.steps)
                today = log_probs(sampler, chunk)[:, steps]
                assert torch.equal(chunk.log_probs[:, steps], today)
                left_out = [step for step in range(3) if step not in steps]
                assert bool(chunk.log_probs[:, left_out].any()) == (number == 0)  # all are held against a replay
                group = next(group for group in groups.values() if chunk.rows.noises[0] in group.rows.noises)
                own = group.load()
                row = group.rows.noises.index(chunk.rows.noises[0])
                assert torch.equal(chunk.latents[0], own.latents[row])
                torch.testing.assert_close(reference.log_probs[0], own.log_probs[row, steps], atol=1e-4, rtol=0)
                assert not torch.allclose(today, reference.log_probs, atol=1e-3)
        stream += [noise for noise, _ in pairs_seen]
        assert sorted(pairs_seen) == sorted(
            (GROUPS[group].noises[a], GROUPS[group].noises[b]) for group, a, b in CHOICES
        )
    assert (sampled.metrics[0]["turn"], sampled.metrics[2]["turn"]) == (1.0, pytest.approx(5 / 3))
    sampled = replace(source, config=replace(config, train_batch_size=2)).collect(
        0, sampler, lora, lambda: None, SINGLE_PROCESS
    )
    chosen = [batch.chunks[place].rows.noises[0] for batch in sampled.batches for place in (0, 2)]
    assert chosen == stream  # the same one, two at a time


@pytest.mark.hard
def test_a_batch_of_micro_batches_is_the_batch(recorded: dict[str, Path], tmp_path: Path) -> None:
    folder = recorded["stored"]
    margins = []
    for size in (1, 4):
        result = train(folder, tmp_path / str(size), tiny(folder, max_steps=2, micro_batch=size, train_batch_size=3))
        margins.append([record["margin"] for record in result.records[1:]])
    torch.testing.assert_close(torch.tensor(margins[0]), torch.tensor(margins[1]), rtol=1e-3, atol=1e-5)


@pytest.mark.hard
def test_a_run_resumed_inside_a_rollout_buffer_ends_the_same(recorded: dict[str, Path], tmp_path: Path) -> None:
    folder = recorded["seeds"]
    config = tiny(folder, save_steps=9, steps_per_generation=2)
    train(folder, tmp_path / "whole", config)
    train(folder, tmp_path / "components", replace(config, max_steps=1))
    assert train(folder, tmp_path / "components", config, resume=True).step == 3
    assert_same_weights(tmp_path / "whole", tmp_path / "components")


def test_resuming_reuses_regenerated_trajectories(recorded: dict[str, Path], tmp_path: Path) -> None:
    config = tiny(recorded["seeds"], max_steps=3)
    pipe = fresh_pipe("sd")
    dataset(recorded["seeds"], pipe, config, tmp_path)
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(1.5)  # it would draw others, so it draws none
    assert all(group.trajectories for group in dataset(recorded["seeds"], pipe, config, tmp_path).groups.values())


def test_regenerated_trajectories_of_another_folder_are_not_used(recorded: dict[str, Path], tmp_path: Path) -> None:
    config, pipe = tiny(recorded["seeds"]), fresh_pipe("sd")
    dataset(recorded["seeds"], pipe, config, tmp_path / "run")
    other = fresh_pipe("sd")
    with torch.no_grad():
        other.unet.conv_out.weight.mul_(1.5)
    folder = PreferenceFolder.create(tmp_path / "other", other, CALL)
    sampled, images = Sampler(other, CALL).rollout(GROUPS[0])
    folder.write_preference(folder.write_group(sampled, images, keep_trajectories=False), 0, 1)
    with pytest.raises(InputError, match="is there with other images"):
        dataset(tmp_path / "other", other, config, tmp_path / "run")


@pytest.mark.hard
def test_in_mixed_precision_what_was_chosen_from_is_drawn_as_it_was(recorded: dict[str, Path], tmp_path: Path) -> None:
    config = tiny(recorded["seeds"], max_steps=2, mixed_precision="bf16", timestep_fraction=0.5)
    for name, folder in recorded.items():
        train(folder, tmp_path / name, config)
    assert_same_weights(tmp_path / "stored", tmp_path / "seeds")


def test_only_the_groups_that_a_run_needs_are_regenerated(recorded: dict[str, Path], tmp_path: Path) -> None:
    config = tiny(recorded["seeds"], max_steps=1, train_batch_size=1)
    source = dataset(recorded["seeds"], fresh_pipe("sd"), config, tmp_path)
    assert len(source.groups) == len(PreferenceFolder(tmp_path / "regenerated").groups) == 1


def test_other_choices_are_another_run(stored: Path, tmp_path: Path) -> None:
    config = tiny(stored, max_steps=1)
    train(stored, tmp_path / "run", config)
    change_line(stored / "choices.jsonl", 0, chosen=0)
    with pytest.raises(InputError, match=r"another preferences \('3 with the hash .*' there, '3 with"):
        train(stored, tmp_path / "run", config, resume=True)


def test_the_folder_has_the_settings_and_evaluations_need_a_reward(stored: Path, tmp_path: Path) -> None:
    loaded = sampling_config_of(stored)
    assert loaded == {
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "call": {"height": 8, "width": 8},
        "eta": 1.0,
        "latents_dtype": "float32",
        "num_generations": 2,
    }
    with pytest.raises(InputError, match="eval_prompts need a reward"):
        train(stored, tmp_path / "a", eval_prompts=["a star"])
    config = replace(tiny(stored, max_steps=1), output_dir=str(tmp_path / "c"))
    result = train(stored, tmp_path / "b", config, eval_prompts=["a star"], eval_rewards=["brightness", "colour:red"])
    assert [*result.evaluations[0]][1:3] == ["eval/brightness", "eval/colour:red"]
    with pytest.raises(InputError, match="reward is missing: give one to train on, or preferences"):
        D3POTrainer(fresh_pipe("sd"), None, config, train_prompts=["a star"]).train()


# ---- what a run refuses


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_inference_steps": 5}, "num_inference_steps is 5 in this run and was 4"),
        ({"guidance_scale": None}, "guidance_scale is not given in this run and was 3.0"),
        ({"call": {"height": 16, "width": 8}}, "height is 16 in this run and was 8"),
        ({"call": {"height": 8, "width": 8, "clip_skip": 1}}, "clip_skip is 1 in this run and was not given"),
        ({"eta": 0.5}, "eta is 0.5 in this run and was 1.0"),
        ({"latents_dtype": "float16"}, "latents_dtype is 'float16' in this run and was 'float32'"),
        ({"num_generations": 4}, "num_generations must be 2, got 4"),
    ],
)
def test_other_settings_are_refused(
    changed: dict[str, Any], message: str, recorded: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train(recorded["stored"], tmp_path, tiny(recorded["stored"], **changed))


def test_another_scheduler_or_model_is_refused(recorded: dict[str, Path], tmp_path: Path) -> None:
    pipe = fresh_pipe("sd")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, beta_end=0.03)
    with pytest.raises(InputError, match=r"scheduler.beta_end is 0.03 in this run"):
        train(recorded["stored"], tmp_path / "scheduler", pipe=pipe)
    pipe = fresh_pipe("sd")
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(1.5)
    with pytest.raises(InputError, match=r"have other log-probabilities by this model .* Train the model that"):
        train(recorded["stored"], tmp_path / "stored", pipe=pipe)
    with pytest.raises(
        InputError, match=r"-\d\.png: sampled again from its seed the image is another one.*so the weights"
    ):
        train(recorded["seeds"], tmp_path / "seeds", pipe=pipe)


def test_a_mismatch_tells_what_else_is_another(recorded: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(recorded["seeds"], tmp_path / "choices"))
    loaded = json.loads((folder / "settings.json").read_text()) | {"device": "cuda", "torch": "1.0"}
    (folder / "settings.json").write_text(json.dumps(loaded))
    assert train(folder, tmp_path / "same pixels").step == 3  # as long as they are the same, it is no matter
    pipe = fresh_pipe("sd")
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(1.5)
    with pytest.raises(InputError, match=r"device 'cuda' then, 'cpu' now; torch '1.0' then, '[\d.]+.*' now\): restore"):
        train(folder, tmp_path / "other pixels", pipe=pipe)


# ---- what a folder is refused for


def lines_of(folder: Path, *rows: object) -> None:
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def first_group(folder: Path) -> str:
    return json.loads((folder / "lots.jsonl").read_text().splitlines()[0])["lot"]


def image(folder: Path) -> Path:
    return folder / "images" / f"{first_group(folder)}-0.png"


def trajectories(folder: Path) -> Path:
    return folder / "trajectories" / f"{first_group(folder)}.safetensors"


def repaint(folder: Path) -> None:
    with Image.open(image(folder)) as picture:
        picture.putpixel((0, 0), (0, 0, 0) if picture.getpixel((0, 0)) != (0, 0, 0) else (1, 1, 1))
        picture.save(image(folder))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def link(path: Path) -> None:
    other = path.with_name("elsewhere")
    path.rename(other)
    path.symlink_to(other)


def other_tensors(folder: Path) -> None:
    """A file with the latents of fewer samples, whose hash is right."""
    tensors = load_file(trajectories(folder))
    data = save(tensors | {"latents": tensors["latents"][:2].clone()})
    trajectories(folder).write_bytes(data)
    row = json.loads((folder / "lots.jsonl").read_text().splitlines()[0])["trajectories"]
    change_line(folder / "lots.jsonl", 0, trajectories=row | {"sha256": hashlib.sha256(data).hexdigest()})


def name_outside(folder: Path) -> None:
    row = json.loads((folder / "lots.jsonl").read_text().splitlines()[0])["images"]
    change_line(folder / "lots.jsonl", 0, images=[row[0] | {"file": "../secret.png"}, *row[1:]])


PAIR = {"image_a": "a.png", "image_b": "b.png", "prompt": "a star", "choice": "a"}
PLAIN_PAIRS = (
    r"plain image pairs\. D3PO learns from the denoising trajectory.*Diffusion-DPO, another method\. Record the"
)
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no such preference dataset"),
    "no choices": (lambda folder: (folder / "choices.jsonl").unlink(), r"has no choices\.jsonl"),
    "empty": (lines_of, "holds no preference beside 0 ties"),
    "only ties": (
        lambda folder: lines_of(folder, {"lot": first_group(folder), "tie": True}),
        "no preference beside 1 ties",
    ),
    "pairs": (lambda folder: lines_of(folder, PAIR), r"choices\.jsonl, line 1: these are " + PLAIN_PAIRS),
    "images": (lambda folder: lines_of(folder, {"images": ["a.png", "b.png"], "chosen": 0}), PLAIN_PAIRS),
    "a file": (lambda folder: [shutil.rmtree(folder), folder.write_text(json.dumps(PAIR))], PLAIN_PAIRS),
    "no settings": (lambda folder: (folder / "settings.json").unlink(), r"settings\.json is missing"),
    "settings": (
        lambda folder: (folder / "settings.json").write_text('{"version": 2}'),
        "not a preference dataset of version 1",
    ),
    "unknown group": (
        lambda folder: lines_of(folder, {"lot": "x", "chosen": 0, "rejected": 1}),
        "group 'x' is not in lots.jsonl",
    ),
    "no group": (
        lambda folder: lines_of(folder, {"chosen": 0, "rejected": 1}),
        r"line 1: group None is not in lots\.jsonl",
    ),
    "one image": (
        lambda folder: lines_of(folder, {"lot": first_group(folder), "chosen": 1, "rejected": 1}),
        "chosen and rejected are both 1",
    ),
    "beyond": (
        lambda folder: lines_of(folder, {"lot": first_group(folder), "chosen": 0, "rejected": 3}),
        "rejected must be the number of an image, 0 to 2, got 3",
    ),
    "below": (
        lambda folder: lines_of(folder, {"lot": first_group(folder), "chosen": -1, "rejected": 0}),
        "chosen must be the number of an image, 0 to 2, got -1",
    ),
    "true": (
        lambda folder: lines_of(folder, {"lot": first_group(folder), "chosen": True, "rejected": 0}),
        "chosen must be the number of an image, 0 to 2, got True",
    ),
    "no json": (
        lambda folder: (folder / "choices.jsonl").write_text('{"lot"\n{}\n'),
        r"choices\.jsonl, line 1: not JSON",
    ),
    "a list": (lambda folder: lines_of(folder, [1]), "line 1: expected an object"),
    "no image": (lambda folder: image(folder).unlink(), r"-0\.png is missing"),
    "another image": (repaint, r"-0\.png is not the image that was recorded"),
    "no png": (lambda folder: image(folder).write_bytes(b"no"), r"-0\.png: not a readable image format"),
    "a linked image": (lambda folder: link(image(folder)), r"-0\.png is a link or no file"),
    "linked images": (lambda folder: link(folder / "images"), r"-0\.png is a link or no file"),
    "linked choices": (lambda folder: link(folder / "choices.jsonl"), r"choices\.jsonl is a link"),
    "no trajectories": (lambda folder: trajectories(folder).unlink(), r"safetensors is missing"),
    "other trajectories": (lambda folder: flip(trajectories(folder)), "its sha256 is another"),
    "linked trajectories": (lambda folder: link(trajectories(folder)), "is a link or no file"),
    "fewer trajectories": (other_tensors, "not trajectories of group"),
    "outside": (name_outside, r"lots\.jsonl, line 1: .*secret\.png'\) is no file of group"),
    "a group outside": (
        lambda folder: change_line(folder / "lots.jsonl", 0, lot="../x"),
        '"lot" must be a name of letters',
    ),
    "starts": (
        lambda folder: change_line(folder / "lots.jsonl", 0, starts=[7, 7, 8]),
        "one start .*; here are prompts 1, starts 2",
    ),
    "prompts": (lambda folder: change_line(folder / "lots.jsonl", 0, prompts=["a", "b", "a"]), "here are prompts 2"),
    "no seeds": (lambda folder: change_line(folder / "lots.jsonl", 0, noises=["1", 2, 3]), "must be seeds"),
    "fewer seeds": (lambda folder: change_line(folder / "lots.jsonl", 0, noises=[2, 3]), "one entry for each image"),
    "no images": (lambda folder: change_line(folder / "lots.jsonl", 0, images=["a.png"]), "images must be a list of"),
    "no steps": (
        lambda folder: change_line(folder / "lots.jsonl", 0, trajectories={"file": "a", "sha256": "b"}),
        "trajectories must be null or",
    ),
    "another group's files": (
        lambda folder: change_line(
            folder / "lots.jsonl", 1, group=first_group(folder), images=3 * [{"file": "", "sha256": ""}]
        ),
        "is no file of group",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_is_refused(case: str, stored: Path) -> None:
    read_preferences(stored)
    corrupt, message = REFUSED[case]
    corrupt(stored)
    with pytest.raises(InputError, match=message) as refused:
        read_preferences(stored)
    assert "\n" not in str(refused.value)


def test_a_group_with_two_different_entries_is_refused(stored: Path) -> None:
    lines = (stored / "lots.jsonl").read_text().splitlines()
    (stored / "lots.jsonl").write_text("\n".join([*lines, lines[0]]))
    read_preferences(stored)
    (stored / "lots.jsonl").write_text("\n".join([*lines, json.dumps(json.loads(lines[0]) | {"noises": [1, 2, 9]})]))
    with pytest.raises(InputError, match=r"line 3: group .* is recorded twice"):
        read_preferences(stored)


@pytest.mark.parametrize("name", ["pipeline", "scheduler", "call", "eta", "latents_dtype", "dtype", "device", "torch"])
def test_settings_that_are_missing_or_no_such_thing_are_refused(name: str, stored: Path) -> None:
    loaded = json.loads((stored / "settings.json").read_text())
    for wrong in ({key: value for key, value in loaded.items() if key != name}, loaded | {name: [1]}):
        (stored / "settings.json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=f"{name} is missing or of the wrong kind"):
            read_preferences(stored)


# ---- writing


def test_what_is_written_twice_is_there_once_and_other_images_are_refused(tmp_path: Path) -> None:
    names = record(tmp_path, keep=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    pipe = fresh_pipe("sd")
    folder = PreferenceFolder.create(tmp_path, pipe, CALL)
    sampled, images = Sampler(pipe, CALL).rollout(GROUPS[0])
    assert folder.write_group(sampled, images) == names[0]
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="is there with other images"):
        folder.write_group(sampled, 1 - images)
    with pytest.raises(InputError, match=r"made with guidance_scale 3.0, not 4.0: use another folder"):
        PreferenceFolder.create(tmp_path, pipe, CALL | {"guidance_scale": 4.0})


def test_what_no_training_could_learn_from_is_not_written(tmp_path: Path) -> None:
    pipe = fresh_pipe("sd")
    for call, message in (
        ({}, "num_inference_steps must be among"),
        (CALL | {"image": torch.zeros(1)}, "image is not a plain value"),
    ):
        with pytest.raises(InputError, match=message):
            PreferenceFolder.create(tmp_path / "x", pipe, call)
    with pytest.raises(InputError, match="latents_dtype must be one of"):
        PreferenceFolder.create(tmp_path / "x", pipe, CALL, latents_dtype="int8")
    assert not (tmp_path / "x").exists()
    folder = PreferenceFolder.create(tmp_path / "x", pipe, CALL)
    sampled, images = Sampler(pipe, CALL).rollout(GROUPS[0])
    for rows, message in (
        (Rows((PROMPT,) * 3, (7, 7, 8), (1, 2, 3)), "one prompt from one x_T"),
        (Rows((PROMPT, PROMPT, "a"), (7,) * 3, (1, 2, 3)), "one prompt from one x_T"),
        (Rows((PROMPT,) * 3, (7,) * 3, (1, 2, 2)), "the same noise"),
        (Rows((PROMPT,), (7,), (1,)), "two or more samples"),
    ):
        with pytest.raises(InputError, match=message):
            folder.write_group(replace(sampled, rows=rows), images)
    with pytest.raises(InputError, match="images of shape"):
        folder.write_group(sampled, images[:2])
    with pytest.raises(InputError, match=r"hold torch.float16, the folder is for float32"):
        folder.write_group(replace(sampled, latents=sampled.latents.half()), images)
    group = folder.write_group(sampled, images)
    for chosen, rejected in ((0, 0), (0, 3), (-1, 0)):
        with pytest.raises(InputError, match="two different numbers below 3"):
            folder.write_preference(group, chosen, rejected)
    with pytest.raises(InputError, match="has no group 'y'"):
        folder.write_tie("y")
    assert not (tmp_path / "x" / "choices.jsonl").exists()


@pytest.mark.parametrize("file", ["choices.jsonl", "lots.jsonl"])
def test_a_line_that_a_crash_broke_off_is_left_out_and_written_over(
    file: str, stored: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = (stored / file).read_bytes()
    for cut in range(1, whole.rstrip().rfind(b"\n") - 1):
        torn = whole + whole[:cut].split(b"\n")[-1]
        if torn.endswith((b"\n", b"}")) or torn == whole:
            continue
        (stored / file).write_bytes(torn)
        if cut % 40 == 1:
            with caplog.at_level(logging.WARNING):
                assert [row for _, row in read_lines(stored / file)] == [
                    json.loads(line) for line in whole.splitlines()
                ]
            assert "cut off by a crash" in caplog.text
            caplog.clear()
    group = first_group(stored)
    if file == "choices.jsonl":
        PreferenceFolder(stored).write_preference(group, 1, 2, who="me")
        assert (stored / file).read_bytes().startswith(whole)
        assert read_lines(stored / file)[-1] == (4, {"who": "me", "lot": group, "chosen": 1, "rejected": 2})
    read_preferences(stored)


def test_a_last_line_without_its_end_is_kept(stored: Path) -> None:
    path = stored / "choices.jsonl"
    path.write_bytes(path.read_bytes().rstrip())
    PreferenceFolder(stored).write_tie(first_group(stored))
    assert len(read_lines(path)) == 4


def test_ties_are_dropped_and_counted(stored: Path, caplog: pytest.LogCaptureFixture) -> None:
    PreferenceFolder(stored).write_tie(first_group(stored))
    margins = read_preferences(stored)
    assert (len(margins.preferences), margins.ties) == (3, 1) and "1 ties of 4 annotations are left out" in caplog.text


def test_the_hash_is_of_pixels_and_their_shape() -> None:
    pixels = pixels_of(torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1).expand(3, 2, 4))
    assert pixels.shape == (2, 4, 3) and pixels[0, 0].tolist() == [0, 128, 255]
    assert pixel_hash(pixels) != pixel_hash(pixels.reshape(4, 2, 3))
