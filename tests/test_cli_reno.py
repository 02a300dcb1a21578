"""Noise optimisation on the command line: what it writes, how it resumes inside a prompt, and what it refuses."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from conftest import Steer, replaced
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from torch import Generator

from steer import Iteration
from steer.apps.cli import main as cli
from steer.apps.cli.evaluate import OWN_OPTIONS as OF_EVALUATE
from steer.apps.methods import METHODS, Job
from steer.apps.plots import Frames, draw_progress
from steer.apps.settings import (
    ALL_OPTIONS,
    METHOD_OPTIONS,
    SHARED,
    SamplingConfig,
    default_of,
    methods_with,
    option_names,
)
from steer.arguments import _table
from steer.assets import MODELS

RENO = ["--method", "reno", "--seeds", "2", "--seed", "7", "--lr", "1"]
REWARDS = """
from pathlib import Path
import torch

FOLDER = Path(__file__).parent

class Warm:
    name, differentiable, fails = "warm", True, 0

    def __init__(self):
        self.left = 0 if (FOLDER / "fixed").exists() else self.fails

    def __call__(self, images, prompts):
        with (FOLDER / "calls").open("a") as file:
            file.write(prompts[0] + "\\n")
        self.left -= 1
        if self.left == 0:
            return self.fail(images)
        return (images[:, 0] - images[:, 2]).mean((1, 2)) + images.std((1, 2, 3))

class Interrupted(Warm):
    fails = 4

    def fail(self, images):
        raise KeyboardInterrupt

class Broken(Warm):
    fails = 3

    def fail(self, images):
        return images.sum((1, 2, 3)) * float("nan")
"""
SETTINGS = SamplingConfig.of(
    model="scenes",
    method="reno",
    reward="scene-soft",
    particles=3,
    steps=None,
    guidance=None,
    seed=0,
    compare=True,
    dtype=None,
)


@pytest.fixture
def own(steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with a module of rewards that record their calls, and with the command's own."""
    (tmp_path / "noisy_rewards.py").write_text(REWARDS)
    monkeypatch.delitem(sys.modules, "noisy_rewards", raising=False)
    return tmp_path


def entries_of(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "report.json").read_text())["prompts"]


def written(out: Path) -> dict[str, bytes]:
    """All files of the prompts; of a PNG its pixels alone, because its metadata names the reward."""
    return {
        str(path.relative_to(out)): Image.open(path).tobytes() if path.suffix == ".png" else path.read_bytes()
        for path in sorted(out.rglob("0*/*"))
    }


def test_reno_writes_what_makes_its_images_again(steer: Steer, tmp_path: Path) -> None:
    code, out, _ = steer("sample", "a red circle", *RENO, "--iterations", "3", "--out", tmp_path)
    assert code == 0 and "1 prompts" in out
    (entry,), folder = entries_of(tmp_path), tmp_path / "000-a-red-circle"
    assert {path.name for path in tmp_path.glob("*.*")} >= {"grid.png", "progress.png", "report.json"}
    assert not (tmp_path / "ancestry.png").exists() and Image.open(tmp_path / "progress.png").width > 800
    assert {path.name for path in folder.iterdir()} == {
        *("00.png", "01.png", "base-00.png", "base-01.png", "noise.safetensors")
    }
    pipe = StableDiffusionPipeline.from_pretrained(MODELS["scenes"])
    pipe.set_progress_bar_config(disable=True)
    with safe_open(folder / "noise.safetensors", "pt") as file:
        noise, start = file.get_tensor("noise"), json.loads(file.metadata()["start"])
    assert start["seeds"] == entry["seeds"] and len(set(entry["seeds"])) == 2
    assert start["call"] == {"num_inference_steps": 1, "guidance_scale": 0.0}
    seeds = [Generator().manual_seed(seed) for seed in entry["seeds"]]
    call = start["call"] | {"num_images_per_prompt": 2, "latents": noise, "generator": seeds}
    for name, again in zip(entry["images"], pipe(start["prompt"], **call).images, strict=True):
        assert Image.open(tmp_path / name).tobytes() == again.tobytes()


def test_the_base_is_where_reno_starts_from(steer: Steer, tmp_path: Path) -> None:
    reward = "scene-soft + brightness:0.1"
    # A learning rate that goes too far: not all is better.
    words = replaced(["sample", "a star", *RENO], "--iterations", "4", "--reward", reward, "--lr", "40")
    assert steer(*words, "--out", tmp_path)[0] == 0
    (entry,) = entries_of(tmp_path)
    trace = entry["trace"]
    assert entry["base"]["rewards"] == pytest.approx(trace["rewards"][0], abs=1e-5)
    assert {len(trace[name]) for name in ("rewards", "norms", "best")} == {4} and entry["stopped"] is None
    assert all(len(row) == 2 for rows in (trace["rewards"], *trace["components"].values()) for row in rows)
    assert set(trace["components"]) == set(entry["components"]) and len(trace["components"]) == 2
    best = [[max(column) for column in zip(*trace["rewards"][: n + 1], strict=True)] for n in range(4)]
    assert trace["best"] == best != trace["rewards"]
    assert entry["rewards"] == pytest.approx([best[3][slot] for slot in entry["order"]], abs=1e-5)
    assert max(entry["rewards"]) > max(entry["base"]["rewards"])
    assert all(abs(norm - 1) < 0.3 for row in trace["norms"] for norm in row)
    # A batch of two is seen four times; the last word is the plain pipeline's.
    assert (entry["cost"]["gradients"], entry["cost"]["reward_calls"]) == (4 * 2, 4 * 2 + 2)


def test_noise_search_needs_no_gradient(steer: Steer, tmp_path: Path) -> None:
    words = ["--method", "noise-search", "--steps", "2", "--iterations", "3", "--neighbours", "2", "--reward", "jpeg"]
    assert steer("sample", "a star", *words, "--seeds", "2", "--out", tmp_path, "--no-compare")[0] == 0
    (entry,) = entries_of(tmp_path)
    assert len(entry["trace"]["best"]) == 3 and "base" not in entry and (tmp_path / "progress.png").exists()
    assert (entry["cost"]["gradients"], entry["cost"]["reward_calls"]) == (0, 2 * (1 + 2 + 2) + 2)


def test_a_reward_without_gradients_is_refused_before_the_model_is_loaded(steer: Steer, tmp_path: Path) -> None:
    words = ["sample", "a star", "--model", "nowhere", "--reward", "jpeg", "--out", tmp_path / "o"]
    code, _, err = steer(*replaced(words, "--method", "reno"))
    assert code == 2 and "'jpeg' is not differentiable" in err and "--gradient zero-order" in err
    assert len(err.splitlines()) == 1 and not (tmp_path / "o").exists()
    code, _, err = steer(*words, "--reward-guidance", "1")
    assert code == 2 and "'jpeg' is not differentiable" in err and "--reward-guidance 0" in err
    assert "unknown model" in steer(*replaced(words, "--method", "reno"), "--gradient", "zero-order")[2]
    assert "unknown model" in steer(*words)[2]


@pytest.mark.hard
def test_zero_order_gradients_climb_any_reward(steer: Steer, tmp_path: Path) -> None:
    words = ["--method", "reno", "--gradient", "zero-order", "--seeds", "1", "--iterations", "2", "--reward", "jpeg"]
    assert steer("sample", "a star", *words, "--out", tmp_path, "--no-compare")[0] == 0
    (entry,) = entries_of(tmp_path)
    assert entry["cost"]["gradients"] == 0 and entry["cost"]["reward_calls"] == 2 * 17 + 1


def test_a_run_interrupted_inside_a_prompt_resumes_there(steer: Steer, own: Path) -> None:
    words = ["sample", "a star", "a circle", *RENO, "--iterations", "5", "--animation"]
    assert steer(*words, "--reward", "noisy_rewards:Warm", "--out", own / "whole")[0] == 0
    whole_calls = (own / "calls").read_text().splitlines()
    (own / "calls").unlink()
    out = own / "o"
    code, _, err = steer(*words, "--reward", "noisy_rewards:Interrupted", "--out", out)
    assert code == 130 and "run the command again to resume" in err and not (out / "report.json").exists()
    assert (out / "000-a-star" / "search.safetensors").exists()
    code, _, err = steer(*replaced(words, "--lr", "2"), "--reward", "noisy_rewards:Interrupted", "--out", out)
    assert code == 2 and "000-a-star/search.safetensors belongs to another run" in err and len(err.splitlines()) == 1
    (own / "fixed").touch()
    assert steer(*words, "--reward", "noisy_rewards:Interrupted", "--out", out)[0] == 0
    assert written(out) == written(own / "whole")
    assert "000-a-star/progress.gif" in written(out) and "000-a-star/search.safetensors" not in written(out)
    assert not (out / "000-a-star" / "frames").exists()
    for resumed, whole in zip(entries_of(out), entries_of(own / "whole"), strict=True):
        assert resumed | {"cost": 0} == whole | {"cost": 0}
    assert len((own / "calls").read_text().splitlines()) == len(whole_calls) + 1  # the call that was interrupted


@pytest.mark.hard
def test_a_run_that_ends_before_its_time_keeps_its_best(steer: Steer, own: Path) -> None:
    words = ["sample", "a star", "a circle", *RENO, "--iterations", "4", "--reward", "noisy_rewards:Broken"]
    code, _, err = steer(*words, "--out", own / "o")
    assert code == 2 and len(err.splitlines()) == 1
    assert "prompt 'a star'" in err and "'warm' returned nan" in err and "best images so far are kept" in err
    (entry,) = entries_of(own / "o")
    assert "iteration 2" in entry["stopped"] and len(entry["trace"]["rewards"]) == 2
    assert {"00.png", "base-01.png", "noise.safetensors"} <= {path.name for path in (own / "o/000-a-star").iterdir()}
    assert (own / "o/progress.png").exists() and not (own / "o/000-a-star/search.safetensors").exists()
    # Without a handler of ours, Python itself would print the pipeline's warning beside the line.
    assert any(isinstance(one, logging.NullHandler) for one in logging.getLogger("steer.pipelines").handlers)
    before = (own / "o/000-a-star/00.png").stat().st_mtime_ns
    (own / "fixed").touch()
    assert steer(*words, "--out", own / "o")[0] == 0
    assert [one["prompt"] for one in entries_of(own / "o")] == ["a star", "a circle"]
    assert (own / "o/000-a-star/00.png").stat().st_mtime_ns == before


@pytest.mark.hard
def test_a_prompt_without_its_noise_is_made_again(steer: Steer, tmp_path: Path) -> None:
    words = ["sample", "a star", *RENO, "--iterations", "2", "--no-compare", "--out", tmp_path]
    assert steer(*words)[0] == 0
    noise = tmp_path / "000-a-star" / "noise.safetensors"
    before = noise.read_bytes()
    noise.unlink()
    assert steer(*words)[0] == 0 and noise.read_bytes() == before


@pytest.mark.hard
def test_a_report_of_an_older_version_is_continued(steer: Steer, tmp_path: Path) -> None:
    words = ["sample", "a star", "a circle", "--method", "noise-search", "--steps", "2", "--iterations", "2"]
    words += ["--particles", "1", "--no-compare", "--out", tmp_path]
    assert steer(*words)[0] == 0
    path = tmp_path / "report.json"
    report = json.loads(path.read_text())
    for name in ("neighbours", "distance", "target_reward", "noise_candidates", "lora"):
        del report["settings"][name]
    del report["prompts"][0]["cost"]["gradients"], report["cost"]["gradients"], report["prompts"][1]
    del report["prompts"][0]["cost"]["other_decodes"], report["cost"]["other_decodes"], report["sha256"]
    path.write_text(json.dumps(report))
    code, _, err = steer(*replaced(words, "--neighbours", "3"))
    assert code == 2 and "holds a run with neighbours 4, not 3" in err
    assert steer(*words)[0] == 0
    report = json.loads(path.read_text())
    assert len(report["prompts"]) == 2 and report["cost"]["gradients"] == 0 and report["settings"]["distance"] == 0.5


def test_the_command_has_an_option_for_every_setting() -> None:
    options = {option.name: option for option in cli.sample.params}
    assert {*SHARED, *ALL_OPTIONS} <= options.keys()
    for name in (*SHARED, *ALL_OPTIONS):
        assert options[name].default is None and options[name].help
    assert options["iterations"].help.endswith("[default: reno 50, noise-search 12, map-elites 24]")
    assert all(default_of(method, name) is not Ellipsis for name in ALL_OPTIONS for method in methods_with(name))


@pytest.mark.parametrize("command", [cli.sample, cli.evaluate], ids=["sample", "evaluate"])
def test_help_shows_every_range_and_every_choice(command: Any) -> None:
    context = click.Context(command)
    rows = {option.name: option.get_help_record(context) for option in command.params if option.name}
    shown = {name: " ".join(row) for name, row in rows.items() if row is not None}
    for range_shown, names in {
        "[x>=1]": ("steps", "beams", "patience", "iterations"),
        "[x>=2]": ("glass_steps",),
        "[0.0<x<=1.0]": ("ess_threshold", "distance"),
        "[0.0<=x<=1.0]": ("eta",),
        "[x>0.0]": ("lr", "max_grad_norm"),
    }.items():
        assert all(range_shown in shown[name] for name in names)
    assert all(
        "<None" not in text and "inf" not in text.partition("[")[2] for name, text in shown.items() if name != "lam"
    )
    for name in {*SHARED, *ALL_OPTIONS} & {one.name for one in command.params} - {*OF_EVALUATE}:
        owners = [SamplingConfig] if name in SHARED else [METHOD_OPTIONS[one].settings for one in methods_with(name)]
        for choices in (owner.field(name).metadata["choices"] for owner in owners):
            assert all(choice in shown[name] for choice in _table(choices or ()))


def test_a_value_outside_of_its_range_is_refused_by_the_settings(steer: Steer) -> None:
    """One message for the range on the command line, in a file and in Python."""
    code, _, err = steer("sample", "a star", "--ess-threshold", "2")
    assert code == 2 and err == "steer: --ess-threshold must be above 0 and at most 1, got 2.0\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimiser", "adm"], "unknown optimiser 'adm': did you mean adam"),
        (["--gradient", "backprob"], "unknown gradient 'backprob': did you mean backprop"),
        (["--method", "renno"], "unknown method 'renno': did you mean reno"),
        (["--iterations", "0"], "--iterations must be at least 1, got 0"),
        (["--seeds", "0"], "--particles must be at least 1, got 0"),
        (["--lr", "0"], "--lr must be above 0 and finite, got 0.0"),
        (["--lr", "nan"], "--lr must be above 0 and finite, got nan"),
        (["--regularisation", "-1"], "--regularisation must be at least 0"),
        (["--patience", "0"], "--patience must be at least 1, got 0"),
        (["--restarts", "-1"], "--restarts must be at least 0"),
        (["--restarts", "2"], "--restarts must be at least 0, and need a --patience, got 2"),
        (["--method", "noise-search", "--neighbours", "0"], "--neighbours must be at least 1, got 0"),
        (["--method", "noise-search", "--distance", "0"], "--distance must be above 0 and at most 1, got 0.0"),
        (["--method", "noise-search", "--distance", "1.5"], "--distance must be above 0 and at most 1"),
        (["--eta", "-1"], "--eta must be from 0 to 1, got -1.0"),
        (["--method", "fk", "--reward-guidance", "-1"], "--reward-guidance must be at least 0 and finite, got -1.0"),
        (["--method", "fk", "--reward-guidance", "inf"], "--reward-guidance must be at least 0 and finite, got inf"),
        (["--method", "fk", "--animation"], "--animation shows iterations and --method fk has none"),
    ],
)
def test_options_are_checked_before_the_model(steer: Steer, tmp_path: Path, words: list[str], message: str) -> None:
    code, _, err = steer(
        *replaced(["sample", "a", "--model", "nowhere", "--method", "reno", "--out", tmp_path / "o"], *words)
    )
    assert code == 2 and err.startswith("steer: ") and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "o").exists()


class FileRecord(Exception):
    """Carries the arguments of a method's pipeline out of it."""


class OfTwoArguments:
    """A pipeline as far as its signature."""

    def __call__(self, prompt: str, num_inference_steps: int = 9, guidance_scale: float = 7.5) -> None: ...


OPTIONS: dict[str, Any] = {
    **{"lam": 3.0, "potential": "max", "resampler": "ssp", "tempering": "ess", "resample_steps": (2, 3)},
    **{"ess_threshold": 0.25, "reward_guidance": 0.5, "particle_schedule": {1: 1}, "particle_schedule_rule": "top_k"},
    **{"target_reward": 9.0, "asynchronous_rewards": True, "draw": "weighted", "preview": "linear", "beams": 1},
    **{"select_steps": (1,), "iterations": 7, "optimiser": "adam", "lr": 0.3, "regularisation": 0.2, "patience": 3},
    **{"max_grad_norm": 0.7, "gradient": "zero-order", "restarts": 2, "neighbours": 5, "distance": 0.25},
    **{"lookahead": 2, "budget": 90, "rungs": {1: 1}, "branches": 1, "drafts": 6, "draft_steps": 2, "finish": False},
    **{"parents": 1, "restart_step": 1, "max_slope": 4.0, "value": "my-value", "kernel": "glass", "glass_steps": 3},
    **{"describe": "brightness", "cells": "4", "first_batches": 2},
}
EXCLUSIVE: dict[str, tuple[set[str], ...]] = {
    "fk": (
        {"reward_guidance"},
        {"asynchronous_rewards"},
        {"draw"},
        {"target_reward", "particle_schedule", "kernel", "glass_steps"},
        {"lookahead", "draw", "kernel", "glass_steps"},
        {"value", "kernel", "glass_steps"},
    ),
    "svdd": ({"lookahead"}, {"value"}),
    "beam": ({"lookahead"}, {"value"}),
    "race": ({"budget", "lookahead"}, {"rungs", "branches", "value"}),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_option_reaches_its_pipeline(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    assert set(OPTIONS) == set(ALL_OPTIONS)
    pipeline = METHODS[method].pipeline

    def tell(self: Any, *words: Any, **named: Any) -> None:
        raise FileRecord(words, named)

    monkeypatch.setattr(pipeline, "__init__", lambda self, pipe, reward: None)
    monkeypatch.setattr(pipeline, "__call__", tell)
    own = {name: OPTIONS[name] for name in option_names(method)}
    alternatives = EXCLUSIVE.get(method, (set(),))
    for alternative in alternatives:
        others = set.union(*alternatives) - alternative
        given = {name: value for name, value in own.items() if name not in others}
        count = default_of(method, "num_particles") if "budget" in given else 2  # a budget decides the starts
        given |= {"particles": count, "steps": 3, "eta": 0.5, "seed": 5, "method": method}
        job = Job(OfTwoArguments(), METHODS, "a star", SamplingConfig.of(**given), Path("x"))
        with pytest.raises(FileRecord) as recorded:
            METHODS[method].run(job)
        (prompt,), named = recorded.value.args
        assert prompt == "a star" and {name: named[name] for name in given if name in own} == {
            name: value for name, value in given.items() if name in own
        }
        assert (named["num_particles"], named["num_inference_steps"], named["eta"]) == (count, 3, 0.5)
        assert named["generator"].initial_seed() == 5
        assert named.get("guidance_scale", "its own") == (0.0 if method == "reno" else "its own")
        assert named.get("state_file") == (Path("x") if METHODS[method].is_iterative else None)


def test_settings_may_come_from_a_yaml_file(steer: Steer, tmp_path: Path) -> None:
    file = tmp_path / "fk.yaml"
    file.write_text("method: fk\nsteps: 4\nparticles: 3\nlam: 40\nparticle_schedule: 1:2\ncompare: false\n")
    assert steer("sample", "a star", "--settings", file, "--particles", "4", "--out", tmp_path / "o")[0] == 0
    settings = json.loads((tmp_path / "o" / "report.json").read_text())["settings"]
    expected = {"steps": 4, "particles": 4, "lam": 40.0, "particle_schedule": "1:2", "compare": False}
    assert {name: settings[name] for name in expected} == expected
    for text, message in {
        "lamb: 3": "unknown key 'lamb': did you mean lam",
        "- lam": "expected lines of `name: value`",
        "lam: [": "fk.yaml",
        "beams: 2": "--beams is an option of beam, not of race",
        "ess_threshold: 2": "--ess-threshold must be above 0 and at most 1, got 2.0",
    }.items():
        file.write_text(text)
        code, _, err = steer("sample", "a star", "--settings", file, "--model", "nowhere", "--out", tmp_path / "p")
        assert code == 2 and message in err and len(err.splitlines()) == 1


def test_an_option_of_another_method_is_refused(steer: Steer, tmp_path: Path) -> None:
    code, _, err = steer("sample", "a", "--method", "reno", "--model", "nowhere", "--beams", 2, "--out", tmp_path / "o")
    assert code == 2 and err == "steer: --beams is an option of beam, not of reno: leave it out\n"


def test_steps_of_fk_lean_along_the_gradient(steer: Steer, tmp_path: Path) -> None:
    words = ["sample", "a red circle", "--steps", "3", "--particles", "2", "--eta", "1", "--no-compare"]
    assert steer(*words, "--reward-guidance", "1", "--out", tmp_path / "o")[0] == 0
    (entry,) = entries_of(tmp_path / "o")
    assert entry["cost"]["gradients"] > 0 and (tmp_path / "o" / "ancestry.png").exists()


def an_iteration(number: int, side: int = 8) -> Iteration:
    """Two slots: the left one red, the right one blue, darker from iteration to iteration."""
    images = torch.zeros(2, 3, side, side)
    images[0, 0] = images[1, 2] = 1 - number / 10
    row = torch.tensor([[0.25, 0.5 + number]])
    return Iteration(number, 3, row, {}, row, row, images)


@pytest.mark.few(1)
@pytest.mark.parametrize(("side", "shown"), [(8, 256), (200, 400), (2000, 512)])
def test_the_animation_shows_the_best_seed(tmp_path: Path, side: int, shown: int) -> None:
    frames = Frames(tmp_path / "frames")
    for number in range(3):
        frames.keep(an_iteration(number, side))
    assert all(Image.open(path).height <= 512 for path in (tmp_path / "frames").iterdir())
    (tmp_path / "frames" / "00001.png").unlink()  # that a crash took
    entry = {"order": [1, 0], "rewards": [2.5, 0.25], "trace": {"rewards": [[0.25, 0.5 + n] for n in range(3)]}}
    frames.write(entry, Image.new("RGB", (side, side), (0, 0, 77)), tmp_path / "progress.gif")
    film = Image.open(tmp_path / "progress.gif")
    blues, times = [], []
    for place in range(getattr(film, "n_frames", 1)):
        film.seek(place)
        assert film.convert("RGB").getpixel((2, 2))[:2] == (0, 0)
        blues.append(film.convert("RGB").getpixel((2, 2))[2])
        times.append(film.info["duration"])
    assert film.width == shown and shown < film.height < shown + 40
    assert blues == pytest.approx([255, 204, 77], abs=2) and times == [120, 120, 2000] and film.info["loop"] == 0


@pytest.mark.few(2)
@pytest.mark.parametrize(("prompts", "lengths"), [(1, [1]), (1, [5]), (6, [3, 5]), (7, [3, 5]), (30, [1, 4])])
def test_progress_is_drawn_for_one_prompt_and_for_many(tmp_path: Path, prompts: int, lengths: list[int]) -> None:
    entries = []
    for number in range(prompts):
        rows = [[0.1 * step, 0.2 * step] for step in range(lengths[number % len(lengths)])]
        trace = {"rewards": rows, "best": rows, "norms": [[1.01, 0.99]] * len(rows)}
        entries.append({"prompt": "costs $5 and $6", "order": [1, 0], "trace": trace})
    draw_progress({"method": "reno", "settings": {"reward": "x", "particles": 2}, "prompts": entries}, tmp_path)
    picture = Image.open(tmp_path / "progress.png").convert("RGB")
    coloured = sum(max(pixel) - min(pixel) > 60 for pixel in picture.getdata())
    assert picture.width == 1200 and coloured > 150
