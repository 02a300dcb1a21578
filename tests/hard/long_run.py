"""Steer or train for a long time in one process, and record the resources of that process.

python tests/hard/long_run.py steering|training COUNT FOLDER    FOLDER/levels.jsonl
"""

import ctypes
import gc
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import PIPELINES, PROMPT, cached_pipe
from finetune_runs import config_of, train
from soft_rewards import Soft, redness

from steer import BestOfNPipeline, FKSteeringPipeline, NoiseSearchPipeline, ReNOPipeline, SelectionPipeline
from steer.diffusion.batching import micro_batched
from steer.reward import with_timeout
from steer.rewards.parser import load_reward

LOOKS = 50  # measurements of a run, evenly spaced
CALL = {"prompt": PROMPT, "num_inference_steps": 6, "output_type": "pt", "height": 8, "width": 8}


@dataclass(frozen=True)
class Level:
    """Resources of a process after `done` calls: resident kilobytes, open files, threads, tensors, temporary files."""

    done: int
    resident: int
    handles: int
    threads: int
    tensors: int
    temporary: int


def level(done: int) -> Level:
    """Measure the resources after garbage collection."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return Level(
        done,
        int(status["VmRSS"].split()[0]),
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        sum(issubclass(type(one), Tensor) for one in gc.get_objects()),
        sum(len(files) for _, _, files in os.walk(tempfile.gettempdir())),
    )


RED = Soft(redness)


def micro_batched_fk(pipe: Any, **options: Any) -> Any:
    with micro_batched(pipe, 1) as view:
        return FKSteeringPipeline(view, RED)(**options)


def kinds() -> list[Callable[..., Any]]:
    """Calls of every steering method, and of FK with each of its options."""
    pipe, timed = cached_pipe("sd"), with_timeout(load_reward("brightness"), 60)
    fk, options = FKSteeringPipeline(pipe, RED), {"num_particles": 3, "resample_steps": [1, 2], "lam": 300.0}

    def steering(**more: Any) -> Callable[..., Any]:
        return lambda **call: fk(**options | more | call)

    return [
        steering(ess_threshold=1.0),
        steering(asynchronous_rewards=True),
        steering(particle_schedule={2: 1}),
        steering(preview="linear"),
        steering(reward_guidance=1.0, resample_steps=[2]),
        lambda **call: FKSteeringPipeline(pipe, timed)(**options | call),
        lambda **call: BestOfNPipeline(pipe, "jpeg")(num_particles=3, **call),
        lambda **call: SelectionPipeline(pipe, RED)(num_particles=2, **call),
        lambda **call: NoiseSearchPipeline(pipe, RED)(iterations=2, neighbours=2, **call),
        lambda **call: ReNOPipeline(pipe, RED)(iterations=1, **call | {"num_inference_steps": 1}),
        lambda **call: micro_batched_fk(pipe, **options | call),
    ]


def steer_for_long(count: int, every: int, folder: Path) -> Iterator[Level]:
    """Make `count` calls, of each kind in turn, and measure after every `every` of them."""
    for number, kind in enumerate(islice(cycle(kinds()), count), 1):
        kind(**CALL, generator=Generator().manual_seed(number))
        if number % every == 0:
            yield level(number)


def train_for_long(count: int, every: int, folder: Path) -> Iterator[Level]:
    """Make `count` updates of PRDP, with checkpoints, held-out prompts and averaged weights."""
    levels: list[Level] = []

    class Look:
        def on_log(self, args: Any, state: Any, control: Any, **details: Any) -> None:
            if state.global_step % every == 0:
                levels.append(level(state.global_step))

    pipe = PIPELINES["sd"]()  # not the cached one: training changes a pipeline
    pipe.set_progress_bar_config(disable=True)
    config = config_of("prdp", max_steps=count, save_steps=4, eval_steps=4)
    train("prdp", pipe, folder / "run", config, callbacks=[Look()])
    return iter(levels)


RUNS = {"steering": steer_for_long, "training": train_for_long}


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    with open(folder / "levels.jsonl", "w") as file:
        for one in RUNS[what](count, count // LOOKS, folder):
            file.write(json.dumps(asdict(one)) + "\n")
            file.flush()
