"""`steer.apps.cli`: options and their refusals, and the commands on the embedded model."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import click
import preloaded
import pytest
from conftest import Steer
from PIL import Image

from steer import load_reward
from steer.apps import sampling
from steer.apps.cli.finetune import parse_overrides
from steer.apps.cli.main import steer as root
from steer.apps.cli.options import Command, Group, is_single_valued
from steer.apps.plots import draw_grid
from steer.errors import InputError
from steer.files import read_image

FAST = ["--steps", "4", "--particles", "3", "--seed", "7"]


def digest(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("0*/*.png"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_sample_writes_images_grid_tree_and_report(steer: Steer, tmp_path: Path) -> None:
    code, out, _ = steer("sample", "a red circle", "a star above a cross", *FAST, "--lam", 40, "--out", tmp_path / "o")
    assert code == 0 and "2 prompts" in out
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["model"] == "scenes" and report["method"] == "fk" and report["settings"]["lam"] == 40
    assert set(report["cost"]) == {"nfe", "decodes", "reward_calls", "seconds", "gradients", "other_decodes"}
    assert [entry["prompt"] for entry in report["prompts"]] == ["a red circle", "a star above a cross"]
    for entry in report["prompts"]:
        assert entry["rewards"] == sorted(entry["rewards"], reverse=True)
        assert len(entry["images"]) == len(entry["log_weights"]) == len(entry["base"]["images"]) == 3
        assert len(entry["ess"]) == len(entry["ancestors"]) == len(entry["steps"])
        for name in (*entry["images"], *entry["base"]["images"]):
            assert Image.open(tmp_path / "o" / name).size == (64, 64)
    assert report["cost"]["nfe"] == 2 * 4 * 3
    assert all(Image.open(tmp_path / "o" / name).width > 400 for name in ("grid.png", "ancestry.png"))


def test_the_same_seed_gives_the_same_bytes_in_another_process(steer: Steer, tmp_path: Path) -> None:
    words = ["sample", "two blue stars", *FAST, "--lam", "60", "--ess-threshold", "1"]
    assert steer(*words, "--out", tmp_path / "here")[0] == 0
    other = preloaded.run(["-m", "steer.apps.cli.main", *words, "--out", tmp_path / "there"], tmp_path, os.environ)
    assert other.returncode == 0, other.stderr
    assert digest(tmp_path / "here") == digest(tmp_path / "there") != {}


def test_best_of_n_and_checklists_stand_beside_the_steered_images(
    steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[dict[str, Any]] = []

    def draw(report: dict[str, Any], out: Path) -> Path:
        drawn.append(report)
        return draw_grid(report, out)

    monkeypatch.setattr(sampling, "draw_grid", draw)
    words = ["sample", "a red circle", *FAST, "--best-of", 5, "--checklist", "scene", "--out", tmp_path / "o"]
    assert steer(*words)[0] == 0
    entry = json.loads((tmp_path / "o" / "report.json").read_text())["prompts"][0]
    five = ["--steps", 4, "--seed", 7, "--particles", 5, "--method", "best-of-n"]
    assert steer("sample", "a red circle", *five, "--out", tmp_path / "n")[0] == 0
    best = json.loads((tmp_path / "n" / "report.json").read_text())["prompts"][0]
    assert entry["best_of"]["rewards"] == best["rewards"][:1] and entry["best_of"]["cost"]["reward_calls"] == 5
    source = tmp_path / "o" / entry["best_of"]["images"][0]
    code, out, _ = steer("sample", "--replay", source, "--out", tmp_path / "again")
    assert code == 0 and "the same pixels" in out
    (shown,) = drawn[0]["prompts"]
    for side in (shown, shown["base"], shown["best_of"]):
        for name, checks in zip(side["images"], side["checklist"], strict=True):
            image = read_image(tmp_path / "o" / name)[None]
            reward = load_reward("scene")(image, ["a red circle"]).item()
            assert reward == pytest.approx(sum(checks.values()) / len(checks))
            assert set(checks) == {"1 object", "a circle", "a red circle"}
    source.unlink()
    assert steer(*words)[0] == 0 and source.exists()
    for wrong, message in (
        (["--checklist", "brightness"], "--checklist brightness: this reward lists no requirements: use scene"),
        (["--best-of", 2, "--no-compare"], "--best-of is an image beside the base images"),
    ):
        code, _, err = steer("sample", "a red circle", *FAST, *wrong, "--out", tmp_path / "p")
        assert code == 2 and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("method", ["base", "best-of-n"])
def test_the_controls_have_the_same_report(steer: Steer, tmp_path: Path, method: str) -> None:
    assert steer("sample", "a red circle", *FAST, "--method", method, "--out", tmp_path)[0] == 0
    entry = json.loads((tmp_path / "report.json").read_text())["prompts"][0]
    plain = entry["rewards"] if method == "base" else entry["base"]["rewards"]
    assert sorted(plain, reverse=True) == sorted(entry["rewards"], reverse=True)
    assert entry["ancestors"] == [] and (method == "base" or entry["rewards"] == sorted(plain, reverse=True))


def test_a_reward_that_raises_leaves_finished_prompts_and_the_same_command_resumes(
    steer: Steer, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle\na star\na cross\n")
    words = ["sample", "--prompts", prompts, *FAST, "--reward", "own_rewards:fails_on_stars", "--out", tmp_path / "o"]
    code, _, err = steer(*words)
    assert code == 2 and "fails_on_stars" in err and "stars are too bright" in err
    assert [e["prompt"] for e in json.loads((tmp_path / "o/report.json").read_text())["prompts"]] == ["a circle"]
    first = digest(tmp_path / "o")
    times = {name: (tmp_path / "o" / name).stat().st_mtime_ns for name in first if name.startswith("000")}
    (tmp_path / "fixed").touch()
    assert steer(*words)[0] == 0
    assert len(json.loads((tmp_path / "o/report.json").read_text())["prompts"]) == 3
    assert all((tmp_path / "o" / name).stat().st_mtime_ns == time for name, time in times.items())
    assert len(times) == 2  # the best one of three starts, and a base image


def test_a_folder_of_other_settings_or_prompts_is_left_alone(steer: Steer, tmp_path: Path) -> None:
    words = ["--out", tmp_path, "--no-compare", "--purpose", "samples"]
    assert steer("sample", "a circle", *FAST, *words)[0] == 0
    code, _, err = steer("sample", "a circle", *FAST, *words, "--lam", 3)
    assert code == 2 and "lam 'auto', not 3.0" in err
    code, _, err = steer("sample", "a star", *FAST, *words)
    assert code == 2 and "other prompts" in err
    (tmp_path / "report.json").write_text("[]")
    code, _, err = steer("sample", "a circle", *FAST, *words)
    assert code == 2 and "not a report of steer" in err


def test_only_a_prompt_whose_images_are_missing_is_sampled_again(steer: Steer, tmp_path: Path) -> None:
    words = ["sample", "a circle", "a star", "a cross", *FAST, "--out", tmp_path]
    assert steer(*words)[0] == 0
    before = digest(tmp_path)
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in before}
    (tmp_path / "001-a-star" / "base-00.png").unlink()
    assert steer(*words)[0] == 0
    assert digest(tmp_path) == before
    again = {name.split("/")[0] for name in before if (tmp_path / name).stat().st_mtime_ns != times[name]}
    assert again == {"001-a-star"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward", "scen"], "unknown reward 'scen': did you mean scene"),
        (["--model", "scnes"], "unknown model 'scnes': use scenes"),
        (["--model", "."], "no model_index.json"),
        (["--potential", "dif"], "unknown potential 'dif': did you mean difference"),
        (["--resampler", "sys"], "unknown resampler 'sys': did you mean"),
        (["--method", "fkk"], "unknown method 'fkk': did you mean fk"),
        (["--tempering", "no"], "unknown tempering"),
        (["--particles", "0"], "--particles must be at least 1, got 0"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--ess-threshold", "2"], "--ess-threshold"),
        (["--eta", "2", "--steps", "2"], "eta must be from 0 to 1"),
        (["--lam", "nan"], "--lam must be a finite number"),
        (["--steps", "2000"], "`num_inference_steps`: 2000 cannot be"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--reward", "broken_module:x"], "cannot load reward 'broken_module:x': SyntaxError"),
        (["--device", "warp"], "--device 'warp' cannot be used"),
        (["--lam", "x"], "--lam must be a number, or auto, got 'x'"),
        (["--reward", "own_rewards:not_a_number", "--steps", "3"], "'not_a_number' returned nan"),
        (["--reward", "own_rewards:wrong_shape", "--steps", "3"], "must return a tensor of shape"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(steer: Steer, tmp_path: Path, words: list[str], message: str) -> None:
    code, _, err = steer("sample", "a circle", "--out", tmp_path / "o", *words)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("steer: ") and message in last and "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "no prompts in this file"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        ("p.jsonl", '{"words": "a"}\n', 'line 1: expected an object with a text under "prompt"'),
        ("p.tsv", "Name\tNote\na\tb\n", 'line 1: expected a column named "prompt"'),
        ("p.tsv", "Note\tPrompt\nonly one\n", "line 2: no column 2"),
        ("p.xlsx", "a", "prompts are read from"),
        ("p.txt", b"\xff\xfe\xff", "not the UTF-16 text of its byte order mark"),
        ("p.txt", None, "cannot read the prompt file"),
    ],
)
def test_a_bad_prompt_file_is_named_with_its_line(
    steer: Steer, tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, err = steer("sample", "--prompts", path, "--out", tmp_path / "o")
    assert code == 2 and err.startswith(f"steer: {path}") and message in err and len(err.splitlines()) == 1


def test_prompts_from_every_format(tmp_path: Path) -> None:
    from steer.apps.prompts import load_prompts

    (tmp_path / "a.txt").write_text("\ufeffa circle\n\n a star \n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"tag": "x\u2028", "prompt": "a circle"}\r\n\n{"prompt": "a star"}\n')
    (tmp_path / "a.tsv").write_text("Prompt\tCategory\na circle\tx\na star\ty\n")
    assert all(load_prompts(str(tmp_path / f"a.{kind}")) == ["a circle", "a star"] for kind in ("txt", "jsonl", "tsv"))


def test_prompts_come_from_one_place(steer: Steer, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a circle\n")
    assert "one of the two" in steer("sample", "--out", tmp_path)[2]
    assert "one of the two" in steer("sample", "a", "--prompts", tmp_path / "p.txt", "--out", tmp_path)[2]
    assert "a prompt is empty" in steer("sample", "  ", "--out", tmp_path)[2]


def test_an_unwritable_folder_is_refused(steer: Steer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code, _, err = steer("sample", "a circle", *FAST, "--out", tmp_path / "file" / "o")
    assert code == 2 and "cannot write there" in err


def test_a_scheduler_that_cannot_be_steered_is_refused(steer: Steer, tmp_path: Path) -> None:
    from diffusers import DDIMInverseScheduler, StableDiffusionPipeline

    from steer.assets import MODELS

    pipe = StableDiffusionPipeline.from_pretrained(MODELS["scenes"])
    pipe.scheduler = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "inverse")
    code, _, err = steer("sample", "a circle", *FAST, "--model", tmp_path / "inverse", "--out", tmp_path / "o")
    assert code == 2 and "DDIMInverseScheduler runs from data to noise" in err


def test_score_prints_json(steer: Steer, tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 255)).save(tmp_path / "red.png")
    Image.new("L", (20, 10), 0).save(tmp_path / "black.jpg")
    code, out, _ = steer(
        "score", tmp_path / "red.png", tmp_path / "black.jpg", "--prompt", "a", "--reward", "brightness"
    )
    scores = json.loads(out)["scores"]
    assert code == 0 and [round(row["score"], 3) for row in scores] == [0.299, 0.0]


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n truncated"])
def test_an_unreadable_image_is_named(steer: Steer, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    code, _, err = steer("score", tmp_path / "x.png", "--prompt", "a", "--reward", "jpeg")
    assert code == 2 and err.startswith(f"steer: {tmp_path / 'x.png'}") and len(err.splitlines()) == 1


def test_rewards_are_listed_and_help_answers_without_torch(steer: Steer) -> None:
    code, out, _ = steer("rewards")
    assert code == 0 and "scene-soft" in out and "jpeg" in out
    script = (
        "import sys; sys.argv = ['steer', '--help']\n"
        "import steer.apps.cli.main as c\n"
        "c.main()\n"
        "assert 'torch' not in sys.modules"
    )
    assert "sample" in subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


# Repeated options.


def all_commands(
    command: click.Command = root, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from all_commands(inner, (*path, name))


OPTIONS = [
    (path, option)
    for path, command in all_commands()
    for option in command.params
    if isinstance(option, click.Option) and is_single_valued(option)
]


def test_every_command_is_of_the_class_that_keeps_the_rule() -> None:
    listed = dict(all_commands())
    assert {("sample",), ("score",), ("evaluate",), ("finetune",), ("rewards", "train")} <= listed.keys()
    assert all(isinstance(command, Command | Group) for command in listed.values())
    assert len(OPTIONS) > 100


@pytest.mark.parametrize(
    ("path", "option"), OPTIONS, ids=lambda one: one.name if isinstance(one, click.Option) else "-".join(one)
)
def test_an_option_with_one_value_is_given_once(steer: Steer, path: tuple[str, ...], option: click.Option) -> None:
    """By any two of its names, with different values and equal ones, in front of arguments and behind them."""
    ends = [] if option.is_flag else ["1"]
    for first, second in product([*option.opts, *option.secondary_opts], repeat=2):
        words = (
            [first, *ends, "word", second, *ends] if path and path != ("rewards",) else [first, *ends, second, *ends]
        )
        code, out, err = steer(*path, *words)
        assert (code, out) == (2, "") and len(err.splitlines()) == 1, err
        assert err.startswith("steer: ") and first in err and "is given 2 times" in err, err
    if ends:
        assert "is given 3 times" in steer(*path, *[f"{first}=a", f"{first}=b", f"{first}=c"])[2]


def test_options_with_several_values_are_not_refused() -> None:
    words = ["--prompts", "p", "--reward", "jpeg", "--reward", "scene", "--model", "a", "--model", "b"]
    context = root.commands["evaluate"].make_context("evaluate", words)
    assert context.params["rewards"] == ("jpeg", "scene") and context.params["models"] == ("a", "b")


@pytest.mark.parametrize("words", ["--seed 1 --seed 2", "--seed=1 --seed=1", "--max-steps 1 --max_steps 2", "--a --a"])
def test_a_key_of_a_configuration_is_given_once(words: str) -> None:
    with pytest.raises(InputError, match="is given twice and takes one value"):
        parse_overrides(words.split())
