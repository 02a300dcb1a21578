"""Rewards from example images: red stars against other scenes, selection of features, the ratio by closed form."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Steer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Normal

from steer import BestOfNPipeline
from steer.apps.models import load_pipeline
from steer.apps.scenes.training import training_scenes
from steer.apps.scenes.world import draw, random_scene
from steer.assets import CLIPS
from steer.reward import RewardError
from steer.rewards.analysis import check_reward
from steer.rewards.clip import BACKGROUND, CONFIG, load_backbone
from steer.rewards.example import fit, separation, write_background
from steer.rewards.parser import load_reward
from steer.rewards.scene import Phrase, SceneRequest, SceneReward
from steer.training.overoptimization import interval

RED_STAR = SceneRequest((Phrase(1, "red", "star"),))


def scenes(seed: int, count: int, request: SceneRequest | None = None) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([draw(random_scene(rng, request), rng) for _ in range(count)])


def saved(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{k}.png")
    return folder


def auc(high: Tensor, low: Tensor) -> float:
    return (high[:, None] > low).float().mean().item()


@pytest.mark.hard
@pytest.mark.parametrize("background", ["given", "stored"])
def test_five_red_stars_tell_red_stars_from_other_scenes(tmp_path: Path, background: str) -> None:
    """On drawn scenes of other seeds; ten folders of five random scenes tell nothing, and say so."""
    folders = [saved(tmp_path / "stars", scenes(1, 5, RED_STAR))]
    folders += [saved(tmp_path / f"any{seed}", scenes(seed, 5)) for seed in range(20, 30)]
    others = saved(tmp_path / "others", scenes(3, 40))
    unseen_stars, unseen = (torch.from_numpy(scenes(*one)) for one in ((4, 30, RED_STAR), (5, 60, None)))
    unseen_stars, unseen = (images.permute(0, 3, 1, 2) for images in (unseen_stars, unseen))
    aucs, separations = [], []
    for folder in folders:
        given = f"against={others}," if background == "given" else ""
        reward = load_reward(f"like:{folder},{given}model=scenes")
        aucs.append(auc(reward(unseen_stars, ["x"] * 30), reward(unseen, ["x"] * 60)))
        separations.append(reward.separation)
    assert aucs[0] >= 0.95 and sum(aucs[1:]) / 10 <= 0.6, aucs
    # Of a hundred such folders three are not warned of, and five by the last layer alone.
    assert separations[0] >= 0.95 and sum(one >= 0.8 for one in separations[1:]) <= 1, separations
    assert sum(separations[1:]) / 10 <= 0.6, separations
    results = check_reward(reward, unseen[:2].float() / 255, ["x"] * 2)
    assert results[-1].name == "examples" and f"AUC {separations[-1]:.2f}" in results[-1].detail


def test_the_middle_layer_sees_a_style_that_the_embedding_does_not(tmp_path: Path) -> None:
    """Dark stripes two pixels wide over scenes of all kinds: by the embedding alone the AUC is that of chance."""
    plain = [scenes(seed, count) for seed, count in ((1, 5), (4, 60), (5, 60))]
    stripes = np.where(np.arange(64) % 4 < 2, 0, 12).astype(np.uint8)[:, None, None]
    examples, striped = (images - np.minimum(stripes, images) for images in plain[:2])
    tensors = [torch.from_numpy(images).permute(0, 3, 1, 2) / 255 for images in (examples, striped, plain[2])]
    reward = load_reward(f"like:{saved(tmp_path / 'striped', examples)},model=scenes")
    assert auc(*(reward(images, ["x"] * 60) for images in tensors[1:])) > 0.75
    with torch.no_grad():
        few, new, old, others = map(load_backbone("scenes").images, [*tensors, training_scenes(64)[0] / 255])
    assert auc(*map(fit(few, others).ratio, (new, old))) < 0.6


def test_the_stored_background_is_that_of_the_embedded_clip(tmp_path: Path) -> None:
    """The background of the first 64 training scenes; `write_background` writes it after a training of the CLIP."""
    folder = CLIPS["scenes"]
    (stored,) = load_file(folder / BACKGROUND).values()
    images, _ = training_scenes(64)
    with torch.no_grad():
        features = load_backbone("scenes").image_layers(images / 255)
    assert torch.allclose(stored.float(), features, atol=5e-3)
    other = Path(shutil.copytree(folder, tmp_path / "clip"))
    (other / "SHA256SUMS").unlink()
    write_background(other / BACKGROUND, folder / CONFIG, features)
    stars = saved(tmp_path / "stars", scenes(1, 5, RED_STAR))
    with pytest.raises(RewardError, match=r"computed by other weights than open_clip_model\.safetensors: remove it"):
        load_reward(f"like:{stars},model={other}")


def test_the_images_of_a_calibration_are_the_background(steer: Steer, tmp_path: Path) -> None:
    stars, others = saved(tmp_path / "stars", scenes(1, 5, RED_STAR)), saved(tmp_path / "others", scenes(3, 12))
    (tmp_path / "made").mkdir()
    file = tmp_path / "made" / "c.json"
    words = ["rewards", "calibrate", "brightness", "--images", others, "--prompt", "x", "--out", file]
    assert steer(*words)[0] == 0
    images = torch.from_numpy(scenes(5, 6)).permute(0, 3, 1, 2)
    given, read = (
        load_reward(f"like:{stars},{one},model=scenes")(images, ["x"] * 6)
        for one in (f"against={others}", f"calibration={file}")
    )
    assert torch.equal(given, read)
    with pytest.raises(RewardError, match="both name the other images"):
        load_reward(f"like:{stars},against={others},calibration={file},model=scenes")
    others.rename(tmp_path / "elsewhere")
    with pytest.raises(RewardError, match=r"its images \(\.\./others\) are not there: give against=FOLDER"):
        load_reward(f"like:{stars},calibration={file},model=scenes")


def test_the_ratio_is_that_of_two_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    examples, others, x = (
        torch.randn(n, 4, generator=generator) * s + m for n, s, m in ((5, 0.5, 1), (40, 1, 0), (7, 1, 0))
    )
    gaussians = fit(examples, others, keep=4)
    variance = (5 * examples.var(0, correction=0) + 5 * others.var(0, correction=0)) / 10
    like, other = Normal(examples.mean(0), variance.sqrt()), Normal(others.mean(0), others.std(0, correction=0))
    torch.testing.assert_close(gaussians.ratio(x), (like.log_prob(x) - other.log_prob(x)).mean(1), rtol=1e-4, atol=1e-5)


def test_distracting_features_are_not_selected() -> None:
    """Four of 36 features differ; adding 400 that do not lowers the AUC by at most .02."""
    generator = torch.Generator().manual_seed(0)
    shift = torch.cat([torch.full((4,), 3.0), torch.zeros(432)])
    examples, others = torch.randn(5, 436, generator=generator) + shift, torch.randn(60, 436, generator=generator)
    new, rest = torch.randn(200, 436, generator=generator) + shift, torch.randn(200, 436, generator=generator)
    aucs = []
    for features in (36, 436):
        gaussians = fit(examples[:, :features], others[:, :features], keep=8)
        aucs.append(auc(gaussians.ratio(new[:, :features]), gaussians.ratio(rest[:, :features])))
        assert set(range(4)) <= set(gaussians.kept.tolist())
    assert aucs[1] >= aucs[0] - 0.02


def test_examples_without_anything_in_common_are_warned_of() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(40, 200, generator=generator), torch.randn(5, 200, generator=generator)
    assert separation(two, one) < 0.8 < separation(two + 3, one)


def test_too_few_images_and_missing_options_are_refused(tmp_path: Path) -> None:
    few, many = saved(tmp_path / "few", scenes(1, 2)), saved(tmp_path / "many", scenes(1, 8))
    for spec, message in (
        (f"like:{few},against={many},model=scenes", "2 images .* at least 3 are needed"),
        (f"like:{many},against={few},model=scenes", "at least 8 are needed"),
        (f"like:{many}", "against=FOLDER, of the base model: the CLIP 'openai/.*' has no stored features"),
        (f"like:{many},against={many},keep=0", "keep=0"),
    ):
        with pytest.raises(RewardError, match=message):
            load_reward(spec)


@pytest.mark.hard
def test_steering_by_five_red_stars_makes_red_stars(tmp_path: Path) -> None:
    """Prompt "a star", example images of the model itself: exactly one red star, by the exact reward, with 24 seeds."""
    pipe, call = load_pipeline("scenes", "cpu"), {"num_inference_steps": 20, "guidance_scale": 4.0}
    for name, prompt, count in (("like", "a red star", 5), ("against", "a star", 32)):
        generator = torch.Generator().manual_seed(77 + (name == "against"))
        made = pipe(prompt, num_images_per_prompt=count, generator=generator, output_type="np", **call).images
        saved(tmp_path / name, (made * 255).round().astype(np.uint8))
    best = BestOfNPipeline(pipe, f"like:{tmp_path / 'like'},against={tmp_path / 'against'},model=scenes")
    right = torch.zeros(2, 24)
    for seed in range(24):
        for row, count in enumerate((1, 8)):
            generator = torch.Generator().manual_seed(1000 + seed)
            images = best("a star", num_particles=count, generator=generator, output_type="pt", **call).images
            right[row, seed] = SceneReward()(images[:1], ["a red star"]) == 1  # best first
    assert interval(right[1] - right[0])[1] > 0, right.mean(1)
