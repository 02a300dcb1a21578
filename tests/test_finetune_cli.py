"""`steer finetune` on a tiny model: what it writes, how it resumes, and what it refuses before a model is loaded."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Steer, cached_pipe
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from steer.apps import finetune_report
from steer.apps import finetuning as finetune
from steer.apps.finetuning import METHODS, read_config
from steer.errors import InputError
from steer.pipelines.training.preference_data import PreferenceFolder
from steer.training.checkpoint import Checkpoints
from steer.training.rollout import Rows, Sampler

CONFIG: dict[str, Any] = {
    "method": "prdp",
    "reward": "brightness",
    "eval_rewards": ["colour:red"],
    "beta": 0.001,
    "max_steps": 2,
    "train_batch_size": 2,
    "num_generations": 2,
    "num_inference_steps": 3,
    "micro_batch": 4,
    "lora_rank": 2,
    "learning_rate": 0.01,
    "call": {"height": 8, "width": 8},
    "save_steps": 1,
    "eval_steps": 1,
    "log_with": [],
}


SAMPLING_METHODS = [
    method
    for method in METHODS
    if method not in ("dpo", "drakes")  # which learn from given pairs: below; of texts
]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    cached_pipe("sd").save_pretrained(folder)
    return folder


@pytest.fixture
def drawn(tmp_path: Path, tiny: Path) -> Path:
    """A configuration file; its run goes to tmp_path/run."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    (tmp_path / "held-out.txt").write_text("a yellow cross\nthree stars\ntwo squares\n")
    places = {"prompts": "prompts.txt", "eval_prompts": "held-out.txt", "output_dir": "run"}
    config_values = CONFIG | {"model": str(tiny)} | {key: str(tmp_path / name) for key, name in places.items()}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_values))
    return path


@pytest.fixture
def config(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, of a run without pictures, which take longer than its updates."""
    monkeypatch.setattr(finetune_report, "write_grid", lambda *given: None)
    monkeypatch.setattr(finetune_report, "write_report", lambda *given: None)
    return drawn


def drop_keys(config: Path, *keys: str) -> None:
    values = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({key: value for key, value in values.items() if key not in keys}))


def records(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def same_weights(*runs: Path) -> bool:
    first, second = (load_file(run / "final/pytorch_lora_weights.safetensors") for run in runs)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("method", "words"),
    [*((method, []) for method in SAMPLING_METHODS), ("d3po", ["--trajectory"])],
    ids=[*SAMPLING_METHODS, "d3po-trajectory"],
)
def test_every_method_runs_and_says_how_its_weights_are_used(
    method: str, words: list[str], steer: Steer, config: Path, tmp_path: Path
) -> None:
    if method not in ("prdp", "d3po"):
        drop_keys(config, "beta")
    code, out, err = steer("finetune", config, "--method", method, *words)
    assert (code, err) == (0, "")
    assert out.startswith(f"{method}: 2 updates in ") and re.search(r"brightness\)* on held-out prompts 0\.", out)
    assert f"pipe.load_lora_weights('{tmp_path / 'run' / 'final'}')" in out and out.count("\n") == 1
    assert load_file(tmp_path / "run/final/pytorch_lora_weights.safetensors")
    assert len(records(tmp_path / "run")) == 2


@pytest.mark.hard
def test_dpo_learns_from_a_table_of_pairs(steer: Steer, config: Path, tmp_path: Path) -> None:
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{colour}.png")
    row = {"prompt": "a square", "image_a": "red.png", "image_b": "blue.png", "choice": "a"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    code, _, err = steer("finetune", config, "--method", "dpo")
    assert code == 2 and "learns from pairs of images: give preferences, a table of them" in err
    drop_keys(config, "beta", "prompts", "num_inference_steps")
    code, out, err = steer("finetune", config, "--method", "dpo", "--preferences", tmp_path / "pairs.jsonl")
    assert (code, err) == (0, "") and out.startswith("dpo: 2 updates in ")
    assert len(records(tmp_path / "run")) == 2


def test_a_run_leaves_everything_that_it_was_and_found(steer: Steer, drawn: Path, tmp_path: Path) -> None:
    run, config = tmp_path / "run", drawn
    words = ["--max-steps", 1, "--log-with", "[tensorboard]", "--eval-prompts-count", 2, "--clip", "0.5"]
    assert steer("finetune", config, *words)[0] == 0
    config_values = yaml.safe_load((run / "config.yaml").read_text())
    assert (
        (config_values["beta"], config_values["clip"]) == (0.001, 0.5)
        and config_values["eval_prompts_count"] == 2
        and config_values["seed"] == 0
    )
    saved = Checkpoints(run / "checkpoints").latest()[0]
    assert saved is not None and saved.step == 1 and saved.json("config") == config_values
    assert saved.json("identity")["eval_prompts"] == ["a yellow cross", "three stars"]  # evenly spaced, 2 of 3
    assert list(run.rglob("events.out.tfevents*")) and (run / "best" / "pytorch_lora_weights.safetensors").is_file()
    assert [record["step"] for record in records(run, "evaluations")] == [0, 1]
    assert {path.name for path in (run / "samples").iterdir()} == {f"step-{step:06d}.png" for step in range(2)}
    pictures = list(run.glob("plots/*.png"))
    assert pictures and all(Image.open(path).width > 100 for path in pictures)
    assert "brightness" in (run / "README.md").read_text()
    words = ["--output-dir", tmp_path / "again", "--log-with", "[]", "--eval-prompts", "null", "--eval-rewards", "[]"]
    code, out, _ = steer("finetune", run / "config.yaml", *words)
    assert code == 0 and out
    assert same_weights(run, tmp_path / "again")


def test_resume_starts_continues_and_ends_as_one_run_would(steer: Steer, config: Path, tmp_path: Path) -> None:
    assert steer("finetune", config, "--resume", "--max-steps", 1)[0] == 0
    code, out, _ = steer("finetune", config, "--resume", "--max-steps", 3)
    assert code == 0 and out.startswith("prdp: 3 updates") and "brightness on held-out prompts" in out
    assert steer("finetune", config, "--max-steps=3", "--output-dir", tmp_path / "once")[0] == 0
    assert same_weights(tmp_path / "run", tmp_path / "once")
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3]
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["max_steps"] == 3
    assert steer("finetune", config, "--max-steps=3", "--resume", "--lora-rank", "4")[0] == 2
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["lora_rank"] == 2  # refused, and left as it was
    # The trained reward stays first, though checkpoints sort names, and brightness comes before scene-soft.
    config.write_text(config.read_text().replace("brightness", "scene-soft").replace("colour:red", "brightness"))
    for steps in (1, 2):
        words = ["--resume", "--max-steps", steps, "--output-dir", tmp_path / "sorted"]
        _, out, _ = steer("finetune", config, *words)
        means = [record["eval/scene-soft"][0] for record in records(tmp_path / "sorted", "evaluations")]
        assert f"scene-soft on held-out prompts {means[0]:.3f} → {means[-1]:.3f}" in out


def test_a_corrupt_checkpoint_is_reported_and_the_previous_one_loaded(
    steer: Steer, config: Path, tmp_path: Path
) -> None:
    assert steer("finetune", config)[0] == 0
    folders = sorted((tmp_path / "run/checkpoints").iterdir())
    for folder in reversed(folders):
        (folder / "weights.safetensors").write_bytes(b"damaged")
        if folder == folders[-1]:
            code, _, err = steer("finetune", config, "--resume")
            assert code == 0 and err.startswith("steer: skipped a checkpoint: ") and "weights.safetensors" in err
            (folder / "weights.safetensors").write_bytes(b"damaged")
    assert f"output_dir: {tmp_path / 'run'}: no checkpoint there is whole" in refused(steer, config, "--resume")


INTERRUPTS = """
import os, signal

calls = []

def interrupts(images, prompts):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.{name})
    return images.mean((1, 2, 3))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_it_with_a_checkpoint_and_a_word(name: str, steer: Steer, config: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    (tmp_path / f"own_{name}.py").write_text(INTERRUPTS.format(name=name))
    words = ["--reward", f"own_{name}:interrupts", "--beta", "0.1"]
    code, out, err = steer("finetune", config, *words)
    assert (code, out) == (130, "")
    assert err == "steer: interrupted at update 1; run the command again with --resume\n"
    assert not (tmp_path / "run/README.md").exists() and signal.getsignal(signal.SIGTERM) == before
    code, out, _ = steer("finetune", config, *words, "--resume")
    assert code == 0 and out.startswith("prdp: 2 updates")


def test_a_guard_that_stops_training_is_reported(steer: Steer, config: Path) -> None:
    code, out, _ = steer("finetune", config, "--max-steps", 5, "--kl-budget-nats", "1e-9")
    assert code == 0 and "stopped because the KL budget is spent" in out and out.count("\n") == 1


def test_without_held_out_prompts_the_summary_is_of_training(steer: Steer, config: Path) -> None:
    code, out, _ = steer("finetune", config, "--eval-prompts", "null", "--eval-rewards", "[]", "--lora-rank", 0)
    assert code == 0 and "brightness in training 0." in out
    assert "load the weights by pipe.unet = type(pipe.unet).from_pretrained('" in out


def test_held_out_prompts_that_are_trained_on_are_reported(steer: Steer, config: Path, tmp_path: Path) -> None:
    (tmp_path / "held-out.txt").write_text("two squares\na blue star\n")
    code, _, err = steer("finetune", config, "--max-steps", 1)
    assert code == 0 and "1 of 2 eval_prompts are trained on too, such as 'a blue star'" in err


def test_an_argument_that_the_pipeline_does_not_know_is_refused(steer: Steer, config: Path) -> None:
    code, _, err = steer("finetune", config, "--call.heigth", 8)
    assert code == 2 and "--call.heigth: StableDiffusionPipeline has no such argument, did you mean height" in err
    code, _, err = steer("finetune", config, "--call.height", 9, "--call.width", 8)
    assert code == 2 and "divisible by 8" in err and err.count("\n") == 1


def refused(steer: Steer, config: object, *words: object) -> str:
    """The one line on stderr with exit code 2, and no model was loaded."""

    def fails(*given: object) -> None:
        raise AssertionError("a model is loaded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "load_pipeline", fails)
        code, out, err = steer("finetune", config, *words)
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("steer: ") and "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-step", "3"], "--max-step: unknown key, did you mean max_steps"),
        (["--max-steps", "3.5"], "--max-steps must be a whole number, got 3.5"),
        (["max_steps=3"], "'max_steps=3': expected --KEY VALUE"),
        (["--method", "prd"], "--method: unknown method 'prd': did you mean prdp"),
        (["--num-generations", "1"], "--num-generations must be at least 2, got 1: PRDP compares"),
        (["--timestep-fraction", "0.5"], "--timestep-fraction must be 1, got 0.5"),
        (["--clip", "0"], "--clip must be above 0, got 0.0"),
        (["--reward", "brightnes"], "--reward: unknown reward 'brightnes': did you mean brightness"),
        (["--eval-rewards", "[scen]"], "--eval-rewards: unknown reward 'scen': did you mean scene"),
        (["--eval-rewards", "[jpeg, jpeg]"], "--eval-rewards: 'jpeg' is given twice"),
        (["--eval-rewards", "[brightness]"], "--eval-rewards hold 'brightness', which is trained on"),
        (["--prompts", "nothing.txt"], "--prompts: nothing.txt: cannot read the prompt file"),
        (["--prompts", "scenes-trainin"], "--prompts: unknown prompts 'scenes-trainin': use scenes-training"),
        (["--eval-prompts", "nothing.txt"], "--eval-prompts: nothing.txt: cannot read"),
        (["--prompt-column", "text"], "prompts.txt: a .txt file has no columns"),
        (["--kl-target-nats", "3"], "--kl-target-nats adapts kl_weight, which is 0"),
        (["--log-with", "[wandbb]"], "--log-with: unknown tracker 'wandbb': did you mean wandb"),
        (["--log-with", "[dvclive]"], "--log-with: dvclive is not installed: pip install dvclive"),
        (["--device", "warp"], "--device 'warp' cannot be used"),
        (["--output-dir", "/proc/run"], "--output-dir /proc/run: cannot write there"),
        (["--method", "grpo"], "beta: grpo has no such option, it is one of d3po, prdp"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(
    words: list[str], message: str, steer: Steer, config: Path, tmp_path: Path
) -> None:
    assert message in refused(steer, config, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward", "jpeg"], "is not differentiable"),
        (["--last-steps", "9"], "--last-steps must be from 1 to 3, got 9"),
    ],
)
def test_bad_reward_backpropagation_is_one_line_before_a_model_is_loaded(
    words: list[str], message: str, steer: Steer, config: Path
) -> None:
    drop_keys(config, "beta")
    assert message in refused(steer, config, "--method", "reward-backprop", *words)


def test_bad_files_are_one_line_before_a_model_is_loaded(steer: Steer, config: Path, tmp_path: Path) -> None:
    assert "unknown configuration 'prdp-scene'" in refused(steer, "prdp-scene")
    assert "the configuration comes first" in refused(steer, "--max-steps", 3, config)
    (tmp_path / "prompts.txt").write_text(" \n\n")
    assert f"{tmp_path / 'prompts.txt'}: no prompts in this file" in refused(steer, config)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_left_alone(steer: Steer, config: Path, tmp_path: Path) -> None:
    assert steer("finetune", config, "--max-steps", 1)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    err = refused(steer, config)
    assert f"output_dir: {tmp_path / 'run'} holds a run already: resume it (--resume or" in err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.fixture
def preferences(tmp_path: Path, tiny: Path) -> Path:
    """A folder of two human choices, made with other settings than those of the configuration."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny)
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 8, "width": 8}
    folder, sampler = PreferenceFolder.create(tmp_path / "choices", pipe, call), Sampler(pipe, call)
    for seed, prompt in enumerate(["a star", "a cross"]):
        rows = Rows((prompt,) * 2, starts=(seed, seed), noises=(2 * seed, 2 * seed + 1))
        folder.write_preference(folder.write_group(*sampler.rollout(rows)), chosen=1, rejected=0)
    return tmp_path / "choices"


def test_choices_on_the_command_line_take_the_place_of_a_files_prompts(preferences: Path) -> None:
    config = read_config("d3po-scenes", {"preferences": str(preferences)})
    assert config.job.prompts is None and config.training.max_steps == 80
    assert (config.training.num_inference_steps, config.training.num_generations) == (2, 2)
    config = read_config("d3po-scenes", {"preferences": str(preferences), "num_inference_steps": "9"})
    assert config.training.num_inference_steps == 9, "given options take precedence"
    with pytest.raises(InputError, match="prompts or preferences: give one of the two"):
        read_config("d3po-scenes", {"preferences": str(preferences), "prompts": "scenes-few"})


def test_choices_are_learnt_from_as_they_were_drawn(
    steer: Steer, config: Path, preferences: Path, tmp_path: Path
) -> None:
    config_values = yaml.safe_load(config.read_text())
    for key in ("prompts", "reward", "num_inference_steps", "call", "num_generations"):
        del config_values[key]
    config.write_text(yaml.safe_dump(config_values | {"method": "d3po", "preferences": str(preferences)}))
    code, out, err = steer("finetune", config)
    assert (code, err) == (0, "") and "colour:red on held-out prompts 0." in out
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (saved["num_inference_steps"], saved["guidance_scale"], saved["preferences"]) == (2, 3.0, str(preferences))
    words = ["--eval-rewards", "[]", "--eval-prompts", "null", "--output-dir", tmp_path / "other"]
    code, out, err = steer("finetune", config, *words)
    assert (code, err) == (0, "") and "accuracy in training 0." in out
    code, _, err = steer("finetune", config, "--eta", "0.5", "--output-dir", tmp_path / "third")
    assert code == 2 and "eta is 0.5 in this run and was 1.0" in err
    err = refused(steer, config, "--method", "prdp", "--output-dir", tmp_path / "third")
    assert "preferences are for methods that learn from them, such as D3PO, not PRDP: give prompts" in err
    next(preferences.rglob("*.png")).unlink()
    assert f"{config}: preferences: {preferences}" in refused(steer, config, "--output-dir", tmp_path / "third")


def test_help_lists_the_keys_of_a_configuration(steer: Steer, tmp_path: Path) -> None:
    code, out, _ = steer("finetune", "grpo-scenes", "--help")
    assert code == 0 and "Keys of grpo-scenes:" in out and re.search(r"--max-steps +number of updates \[80\]", out)
    code, plain, _ = steer("finetune", "--help")
    assert code == 0 and "Keys of" not in plain and "`steer finetune CONFIG --help`" in " ".join(plain.split())
    code, _, err = steer("finetune", "grpo-scene", "--help")
    assert code == 2 and err.startswith("steer: unknown configuration 'grpo-scene': use grpo-scenes or ")
