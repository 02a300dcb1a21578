"""`steer.apps.sampling`: several processes, resuming, finetuned weights."""

import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Steer, replaced
from PIL import Image
from preloaded import environment_with, run_two
from rollouts import random_lora

from steer import BestOfNPipeline
from steer.apps.evaluation.spec import Contender, EvaluationSpec, prepare_contenders
from steer.apps.methods import METHODS
from steer.apps.models import load_pipeline
from steer.apps.plots import image_title
from steer.apps.processes import LaunchContext, launch_context
from steer.apps.recipes import read_png
from steer.apps.sampling import PartialReport, open_report
from steer.apps.settings import METHOD_OPTIONS, SamplingConfig
from steer.errors import InputError
from steer.files import dumps_with_checksum, loads_with_checksum
from steer.rewards.parser import load_reward

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TWO += ["-m", "steer.apps.cli.main"]
PROMPTS = ["a circle", "a star", "a cross", "a star", "a square"]
LOGGED_REWARD = """
from pathlib import Path
from torch import distributed

HERE = Path(__file__).parent

def logged(images, prompts):
    both = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    with (HERE / f"calls-{both[0]}").open("a") as file:
        file.write(f"{both[0]} of {both[1]}: {prompts[0]}\\n")
    if "star" in prompts[0] and (HERE / "broken").exists():
        raise RuntimeError("stars are too bright")
    return images.mean((1, 2, 3))
"""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in torchrun's processes: another number of threads changes some pixels by a level."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def words(one_thread: None, steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command whose reward logs its process."""
    (tmp_path / "logged_rewards.py").write_text(LOGGED_REWARD)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    monkeypatch.delitem(sys.modules, "logged_rewards", raising=False)
    quick = ["--steps", "2", "--particles", "2", "--reward", "logged_rewards:logged", "--no-compare", "--lam", "5"]
    return ["sample", "--prompts", str(tmp_path / "prompts.txt"), *quick]


def on_two(words: list[str], folder: Path, launcher: bool = False) -> subprocess.CompletedProcess[str]:
    """By torchrun, or forked as it would start them, which takes less time."""
    if not launcher:
        return run_two(["-m", "steer.apps.cli.main", *words], folder, environment_with(folder))
    return subprocess.run(
        [*TWO, *words], env=environment_with(folder), cwd=folder, capture_output=True, text=True, timeout=900
    )


def calls(folder: Path) -> list[str]:
    """The lines logged since the last call, without repetitions."""
    files = sorted(folder.glob("calls-*"))
    lines = [line for file in files for line in dict.fromkeys(file.read_text().splitlines())]
    for file in files:
        file.unlink()
    return lines


def made(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("0*/*"))}


def report_of(out: Path) -> dict[str, Any]:
    """The report without seconds and checksum."""
    report = loads_with_checksum((out / "report.json").read_text())
    for one in (report, *report["prompts"]):
        del one["cost"]["seconds"]
    return report


@pytest.mark.hard
def test_two_processes_make_what_one_makes_and_resume_after_a_failure(
    steer: Steer, words: list[str], tmp_path: Path
) -> None:
    """One reward fails in process 1; then two processes, and in a copy of the folder one, do what is missing."""
    out, copy = tmp_path / "two", tmp_path / "one"
    (tmp_path / "broken").touch()
    failed = on_two([*words, "--out", str(out)], tmp_path)
    assert failed.returncode != 0 and failed.stderr.count("stars are too bright") == 1
    assert "0 of 2: a circle" in (lines := calls(tmp_path)) and "1 of 2: a star" in lines
    assert not [line for line in lines if line in ("0 of 2: a star", "1 of 2: a circle")]
    finished = [n for n in (0, 2, 4) if (out / "finished" / f"{n:05d}.json").exists()]
    assert finished and not (out / "report.json").exists() and not (out / "finished" / "00001.json").exists()
    shutil.copytree(out, copy)
    (tmp_path / "broken").unlink()

    code, _, _ = steer(*words, "--out", copy)
    assert code == 0 and calls(tmp_path) == [
        f"0 of 1: {prompt}" for prompt in dict.fromkeys(PROMPTS[n] for n in range(5) if n not in finished)
    ]
    again = on_two([*words, "--out", str(out)], tmp_path)
    assert again.returncode == 0 and again.stdout.count("5 prompts, logged_rewards:logged: best ") == 1
    missing = [PROMPTS[n] for n in range(5) if n not in finished]  # which the processes take in turn
    assert set(calls(tmp_path)) == {f"{place % 2} of 2: {prompt}" for place, prompt in enumerate(missing)}
    assert steer(*words, "--out", tmp_path / "whole")[0] == 0
    for folder in (out, copy):
        assert made(folder) == made(tmp_path / "whole") and len(made(folder)) == 10
        assert report_of(folder) == report_of(tmp_path / "whole")
        assert {path.name for path in folder.iterdir() if path.is_file()} == {"report.json", "grid.png", "ancestry.png"}
        assert not (folder / "finished").exists()
    assert [entry["prompt"] for entry in report_of(out)["prompts"]] == PROMPTS


@pytest.mark.hard
def test_an_error_of_all_processes_is_printed_once(words: list[str], tmp_path: Path) -> None:
    refused = on_two(
        [str(word) for word in replaced(words, "--prompts", "nowhere.txt", "--out", tmp_path / "o")], tmp_path, True
    )
    assert refused.returncode != 0 and refused.stderr.count("cannot read the prompt file") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [0, 1, 5, 12])
def test_indices_are_split_evenly_and_exactly_once(count: int, n: int) -> None:
    shares = [list(LaunchContext(index, count).split_indices(n)) for index in range(count)]
    assert sorted(chain(*shares)) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_plain_process_initializes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    code = (
        "import sys\nfrom steer.apps.processes import launch_context\ncontext = launch_context()\n"
        "context.wait_for_everyone()\n"
        "with context.local_main_process_first():\n    pass\n"
        "print(context.rank, context.world_size, context.broadcast_from_main(lambda: 7))\n"
        "print('torch' in sys.modules, 'accelerate' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "0 1 7\nFalse False\n"
    assert launch_context().device("cuda") == "cuda" and launch_context().device(None) is None
    assert not torch.distributed.is_initialized()


def test_each_process_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with two pretended GPUs."""
    chosen: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    four = [LaunchContext(index, 4, local_rank=index % 3) for index in range(4)]  # of which the last is elsewhere
    assert [one.device(None) for one in four] == [one.device("cuda") for one in four]
    assert chosen == ["cuda:0", "cuda:1", "cuda:0", "cuda:0"] * 2
    assert [four[1].device(given) for given in ("cpu", "cuda:0")] == ["cpu", "cuda:0"] and len(chosen) == 8


SETTINGS: dict[str, Any] = {"model": "scenes", "method": "base", "reward": "jpeg", "particles": 1, "steps": 2}
SETTINGS |= {"seed": 0, "compare": False, "dtype": None}


def entry_of(out: Path, number: int, prompt: str) -> dict[str, Any]:
    name = f"{number}.png"
    Image.new("RGB", (2, 2)).save(out / name)
    return {"prompt": prompt, "images": [name], "cost": {"nfe": 2, "seconds": 1.0}}


def test_records_of_any_number_of_processes_are_one(tmp_path: Path) -> None:
    settings = SamplingConfig.of(**SETTINGS)
    mine = open_report(tmp_path, PROMPTS, settings)
    assert mine.missing(5, False) == [0, 1, 2, 3, 4]
    others = PartialReport(mine.out, mine.header, {})
    mine.keep(0, entry_of(tmp_path, 0, "a circle"), single_process=False)
    others.keep(3, entry_of(tmp_path, 3, "a star"), single_process=False)
    alone = open_report(tmp_path, PROMPTS, settings)
    assert alone.missing(5, False) == [1, 2, 4]
    alone.keep(1, entry_of(tmp_path, 1, "a star"), single_process=True)
    # What is not next to the others stays beside them, so that the list in the report is that of the prompts.
    assert [entry["prompt"] for entry in report_of(tmp_path)["prompts"]] == ["a circle", "a star"]
    assert open_report(tmp_path, PROMPTS, settings).missing(5, False) == [2, 4]
    with pytest.raises(InputError, match="lacks prompt 3 of 5: processes on several machines must share one folder"):
        alone.merge(5)
    assert (tmp_path / "finished" / "00003.json").exists()
    alone.keep(3, entry_of(tmp_path, 3, "a star"), single_process=True)
    assert not (tmp_path / "finished" / "00003.json").exists()  # or it would come before what is made later
    others.keep(3, entry_of(tmp_path, 3, "a star"), single_process=False)
    (tmp_path / "3.png").unlink()
    again = open_report(tmp_path, PROMPTS, settings)
    assert again.missing(5, False) == [2, 3, 4]
    for number in (2, 3, 4):
        again.keep(number, entry_of(tmp_path, number, PROMPTS[number]), single_process=number != 3)
    report = again.merge(5)
    assert [entry["images"] for entry in report["prompts"]] == [[f"{n}.png"] for n in range(5)]
    spent = {"nfe": 10, "decodes": 0, "reward_calls": 0, "seconds": 5.0, "gradients": 0, "other_decodes": 0}
    assert report["cost"] == spent
    assert not (tmp_path / "finished").exists() and open_report(tmp_path, PROMPTS, settings).missing(5, False) == []


def test_unmerged_records_of_another_run_are_left_alone(tmp_path: Path) -> None:
    settings = SamplingConfig.of(**SETTINGS)
    record = open_report(tmp_path, PROMPTS, settings)
    record.keep(3, entry_of(tmp_path, 3, "a star"), single_process=False)
    part = tmp_path / "finished" / "00003.json"
    with pytest.raises(InputError, match="holds a run with seed 0, not 1"):
        open_report(tmp_path, PROMPTS, SamplingConfig.of(**SETTINGS | {"seed": 1}))
    for prompts in (PROMPTS[:3], [*PROMPTS[:3], "a cross"]):
        with pytest.raises(InputError, match="holds a run of other prompts"):
            open_report(tmp_path, prompts, settings)
    before = json.loads(part.read_text())
    entry = before["prompts"][0]
    wrong = [{"cost": None}, {"cost": {"seconds": "1"}}, {"images": 3}, {"base": []}, {"base": {"images": "a"}}]
    for change in wrong:  # found by fuzzing: an older steer's, or an editor's
        part.write_text(dumps_with_checksum(before | {"prompts": [entry | change]}))
        with pytest.raises(InputError, match="prompt 4 of its report is not as steer writes it; choose another --out"):
            open_report(tmp_path, PROMPTS, settings)
    for name in ("x" * 400 + ".png", "a\0b", "\ud800", ".", ""):
        part.write_text(dumps_with_checksum(before | {"prompts": [entry | {"images": [name]}]}))
        assert open_report(tmp_path, PROMPTS, settings).missing(5, False) == [0, 1, 2, 3, 4]
    for text in (
        "{",
        "[]",
        dumps_with_checksum(before | {"number": "3"}),
        dumps_with_checksum(before | {"prompts": []}),
    ):
        part.write_text(text)
        with pytest.raises(InputError, match=r"00003\.json is not a report of steer"):
            open_report(tmp_path, PROMPTS, settings)


# Finetuned weights.


QUICK = [
    "a red star",
    "--steps",
    "3",
    "--particles",
    "2",
    "--seed",
    "5",
    "--guidance",
    "4",
    "--reward",
    "brightness",
]
NAMES = ("00", "01", "base-00", "base-01")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_lora(load_pipeline("scenes"), tmp_path_factory.mktemp("lora"), 0.3)


def plain_images(weights: Path | None) -> list[Image.Image]:
    """Images of the same noise by diffusers' own loading of LoRAs."""
    pipe = load_pipeline("scenes")
    pipe.set_progress_bar_config(disable=True)
    if weights is not None:
        pipe.load_lora_weights(str(weights))
    call = {"num_inference_steps": 3, "num_particles": 2, "guidance_scale": 4.0}
    made = BestOfNPipeline(pipe, "brightness")("a red star", generator=torch.Generator().manual_seed(5), **call)
    return made.in_slot_order().images


def images(out: Path) -> dict[str, bytes]:
    return {path.stem: Image.open(path).tobytes() for path in sorted((out / "000-a-red-star").glob("*.png"))}


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["base", "best-of-n", "fk"])
def test_images_have_the_weights_and_base_images_do_not(
    steer: Steer, weights: Path, tmp_path: Path, method: str
) -> None:
    words = ["sample", *QUICK, "--method", method, *(["--lam", 40] if method == "fk" else []), "--out", tmp_path]
    code, _, _ = steer(*words, "--lora", weights)
    assert code == 0
    made, without, adapted = images(tmp_path), plain_images(None), plain_images(weights)
    assert tuple(made) == NAMES
    assert [made[name] for name in NAMES[2:]] == [image.tobytes() for image in without]
    if method != "fk":
        assert {made[name] for name in NAMES[:2]} == {image.tobytes() for image in adapted}
    assert not {made[name] for name in NAMES[:2]} & {image.tobytes() for image in without}
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["lora"] == str(weights)
    refused = steer(*words)
    assert refused[0] == 2 and f"holds a run with lora {str(weights)!r}, not None" in refused[2]


@pytest.mark.hard
def test_a_replay_uses_the_weights_that_the_user_names(steer: Steer, weights: Path, tmp_path: Path) -> None:
    assert steer("sample", *QUICK, "--method", "fk", "--lora", weights, "--out", tmp_path)[0] == 0
    source, base = (tmp_path / "000-a-red-star" / name for name in ("00.png", "base-01.png"))
    code, _, message = steer("sample", "--replay", source, "--out", tmp_path / "again")
    assert code == 2 and f"made with the finetuned weights {str(weights)!r}: add --lora PATH" in message
    code, message, _ = steer("sample", "--replay", source, "--lora", weights, "--out", tmp_path / "again")
    assert code == 0 and "the same pixels" in message
    assert read_png(tmp_path / "again" / "00-replay.png")[0].settings.lora == str(weights)
    assert steer("sample", "--replay", base, "--out", tmp_path / "again")[0] == 0, "made without them"
    plain_words = [*QUICK, "--method", "base", "--out", tmp_path / "plain"]
    assert steer("sample", *plain_words)[0] == 0
    source = tmp_path / "plain" / "000-a-red-star" / "00.png"
    code, _, message = steer("sample", "--replay", source, "--lora", weights, "--out", tmp_path / "again")
    assert code == 2 and "made without finetuned weights: leave out --lora" in message


def test_missing_weights_are_reported_before_a_model_is_loaded(steer: Steer, tmp_path: Path) -> None:
    code, _, message = steer(
        "sample", *QUICK, "--model", "no/model", "--lora", tmp_path / "none", "--out", tmp_path / "o"
    )
    assert code == 2 and message == (
        f"steer: {tmp_path / 'none'}: no such folder; give one with weights, such as RUN/final of `steer finetune`\n"
    )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("method", "lora", "title"),
    [
        ("base", None, "base"),
        ("fk", None, "fk, best first"),
        ("base", "x", "finetuned"),
        ("fk", "x", "finetuned, fk, best first"),
    ],
)
def test_the_title_of_a_grid_names_method_and_weights(method: str, lora: str | None, title: str) -> None:
    assert image_title({"method": method, "settings": {"lora": lora}}) == title
    assert lora or image_title({"method": method, "settings": {}}) == title, "an older report"


def test_every_method_has_options() -> None:
    assert METHOD_OPTIONS.keys() == METHODS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_particles_that_are_not_given_are_the_default_of_the_python_call(method: str) -> None:
    expected = inspect.signature(METHODS[method].pipeline.__call__).parameters["num_particles"].default
    settings = SamplingConfig.of(method=method, particles=None)
    assert settings.particles == settings.options.num_particles == expected
    assert settings.plain()["particles"] == expected, "the recipe holds the number"
    assert str(expected) in SamplingConfig.help()["particles"]
    spec = EvaluationSpec(("a star",), None, {"brightness": load_reward("brightness")}, 1, {})
    (contender,) = prepare_contenders([Contender("scenes", method=method)], spec)
    assert contender.particles == (1 if method == "base" else expected)
    made = METHOD_OPTIONS[method].settings(num_particles=8)
    assert SamplingConfig(method=method, options=made).particles == 8
