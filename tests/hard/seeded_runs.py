"""Commands and a steered call with fixed seeds: python seeded_runs.py HOME OUT"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from commands import CONFIG, WORDS, Command, all_whole, finetuned, nothing_amiss, sampled
from conftest import PROMPT, cached_pipe
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Generator

from steer import FKSteeringPipeline
from steer.apps import finetune_report
from steer.apps import sampling as sample


def prepare(home: Path) -> None:
    """Write a tiny model and the configuration of a short finetuning."""
    cached_pipe("sd").save_pretrained(home / "tiny")
    (home / "prompts.txt").write_text("a red circle\na blue star\n")
    config = CONFIG | {"model": str(home / "tiny"), "prompts": str(home / "prompts.txt"), "ema_decay": 0.9}
    (home / "config.yaml").write_text(yaml.safe_dump(config))


def commands(home: Path) -> dict[str, Command]:
    """`steer sample` of two prompts, and `steer finetune`."""
    words = ("sample", "a red circle", "a blue star", "--model", str(home / "tiny"), *WORDS, "--out")
    return {
        "sample": Command(words, sampled, nothing_amiss),
        "finetune": Command(("finetune", str(home / "config.yaml"), "--output-dir"), finetuned, all_whole),
    }


def steered(home: Path, out: Path) -> None:
    """Make one steered call from Python, which resamples."""
    pipe = StableDiffusionPipeline.from_pretrained(home / "tiny", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 6, "guidance_scale": 3.0, "height": 8, "width": 8, "generator": Generator()}
    call["generator"].manual_seed(3)
    output = FKSteeringPipeline(pipe, "brightness")(
        PROMPT, num_particles=4, lam=300.0, ess_threshold=1.0, output_type="pt", **call
    )
    kept = {f"ancestors-{number}": one.contiguous() for number, one in enumerate(output.ancestors)}
    kept |= {name: getattr(output, name).contiguous() for name in ("images", "rewards", "log_weights", "latents")}
    save_file(kept, out / "steered.safetensors")


def make(home: Path, out: Path) -> None:
    """Run all of them without plots, which take longer; plotting stays disabled in this process."""
    finetune_report.write_grid = finetune_report.write_report = sample._draw = lambda *given: None  # type: ignore[assignment]
    out.mkdir()
    steered(home, out)
    for name, command in commands(home).items():
        command.run(out / name)


def left(home: Path, out: Path) -> dict[str, Any]:
    """Contents of the outputs, without durations."""
    files = {name: command.left(out / name) for name, command in commands(home).items()}
    files["steered"] = {name: one.numpy().tobytes() for name, one in load_file(out / "steered.safetensors").items()}
    lines = [json.loads(line) for line in (out / "finetune/metrics.jsonl").read_text().splitlines()]
    files["records"] = [
        {name: value for name, value in one.items() if not name.endswith(("second", "seconds", "share"))}
        for one in lines
    ]
    [newest] = (out / "finetune/checkpoints").iterdir()
    names = ("weights", "optimiser", "average", "random")
    files["checkpoint"] = {name: (newest / f"{name}.safetensors").read_bytes() for name in names}
    return files


if __name__ == "__main__":
    make(*map(Path, sys.argv[1:]))
