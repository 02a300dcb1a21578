"""Equal seeds give equal results: in other processes, with other micro-batches, in threads that share a pipeline."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from child_processes import forked
from conftest import PIPELINES, cached_pipe, call_kwargs, with_scheduler
from diffusers import LCMScheduler
from reliability import Tally
from seeded_runs import left, make, prepare
from soft_rewards import Soft, redness
from torch import Generator, Tensor

from steer import BestOfNPipeline, FKSteeringPipeline, ReNOPipeline, SteeringOutput
from steer.diffusion.batching import micro_batched
from steer.pipelines.particle_batch import IMAGES_PER_PROMPT

FULL = pytest.mark.hard
FOLDER = Path(__file__).parent
K = 4
SOME = ["sd", "pixart", "flux"]  # a UNet, a DiT, and a flow-matching model
FAMILIES = [name if name in SOME else pytest.param(name, marks=FULL) for name in PIPELINES]


def in_new_interpreter(home: Path, out: Path, hash_seed: int) -> None:
    """Make the outputs in a new interpreter with another PYTHONHASHSEED, which changes the order of sets."""
    places = os.pathsep.join([str(FOLDER.parent), str(FOLDER), *sys.path])  # including the path of this steer
    given = {"PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    command = [sys.executable, str(FOLDER / "seeded_runs.py"), str(home), str(out)]
    done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.hard
@pytest.mark.parametrize(("new", "others"), [(4, 6)])
def test_other_processes_give_the_same_bytes(tmp_path: Path, new: int, others: int) -> None:
    """`steer sample`, a steered call and a finetuning, in new interpreters and in forks of this process."""
    prepare(tmp_path)
    tally, results = Tally(), []
    for number in range(new + others):
        out = tmp_path / f"{number}"
        if number < new:
            in_new_interpreter(tmp_path, out, number)
        else:
            ended = forked(lambda out=out: make(tmp_path, out), out)
            assert ended.code == 0, ended.output
        results.append(left(tmp_path, out))
        tally.count("a new Python" if number < new else "a fork", results[-1] == results[0])
    assert tally.lost == 0, {name for one in results for name in one if one[name] != results[0][name]}
    ancestors = [value for name, value in results[0]["steered"].items() if name.startswith("ancestors")]
    assert len(ancestors) > 1 and any(value != torch.arange(K).numpy().tobytes() for value in ancestors)
    if new > 1:
        tally.note("the same seed in other processes: steer sample, a steered call, steer finetune")


def call_of(family: str, particles: int, seed: int, steps: int = 5) -> dict[str, Any]:
    call = call_kwargs(family, particles, steps)
    own = {"num_particles": particles, "generator": Generator().manual_seed(seed), "output_type": "pt"}
    return {name: value for name, value in call.items() if name not in IMAGES_PER_PROMPT} | own


def bits(output: SteeringOutput) -> list[Tensor]:
    return [output.images, output.rewards, output.log_weights, output.latents, *output.ancestors]


@pytest.mark.few(1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seeds", [1, pytest.param(5, marks=FULL)])
def test_images_and_ancestors_do_not_depend_on_micro_batches(family: str, seeds: int) -> None:
    """Micro-batches of denoiser rows, and of images that are decoded and scored."""
    pipe, tally, moved = cached_pipe(family), Tally(), False

    def run(rows: int | None, chunk: int, seed: int) -> SteeringOutput:
        options = {"lam": 500.0, "resample_steps": [0, 1, 2], "ess_threshold": 1.0, "chunk_size": chunk}
        with micro_batched(pipe, rows) as view:
            return FKSteeringPipeline(view, redness)(**options, **call_of(family, K, seed)).in_slot_order()

    for seed in range(seeds):
        whole = run(None, 2 * K, seed)
        moved = moved or any((one != torch.arange(K)).any() for one in whole.ancestors)
        for rows, chunk in [(1, K), (2, K), (3, K), (K, K), (None, 1), (None, 2), (None, 3), (3, 2)]:
            output = run(rows, chunk, seed)
            same = len(output.ancestors) == 3 and all(map(torch.equal, output.ancestors, whole.ancestors))
            near = bool((output.images - whole.images).abs().max() <= 1e-5)
            tally.count("denoiser" if chunk == K else "decoder and reward", same and near)
    assert moved and tally.lost == 0
    if seeds > 1:
        tally.note(f"the same seed with micro-batches of 1, 2, 3 and {K}, {family}")


Run = Callable[[Any, int], SteeringOutput]
PROMPTS = ["a red circle", "a blue star", "two stars", "a star left of a circle"]


def fk(family: str, **options: Any) -> Run:
    def run(pipe: Any, seed: int) -> SteeringOutput:
        settings = {"lam": 500.0, "ess_threshold": 1.0} | options
        return FKSteeringPipeline(pipe, Soft(redness))(
            **call_of(family, 3, seed) | {"prompt": PROMPTS[seed % 4]} | settings
        )

    return run


def best_of_n(pipe: Any, seed: int) -> SteeringOutput:
    return BestOfNPipeline(pipe, redness)(**call_of("sd", 3, seed) | {"prompt": PROMPTS[seed % 4]})


def reno(pipe: Any, seed: int) -> SteeringOutput:
    own = with_scheduler(pipe, LCMScheduler.from_config(pipe.scheduler.config))
    options = {"prompt": PROMPTS[seed % 4], "iterations": 3, "guidance_scale": 0.0}
    return ReNOPipeline(own, Soft(redness))(**call_of("sd", 2, seed, 1) | options)


DIFFERENT: list[Run] = [fk("sd"), fk("sd", reward_guidance=0.1), fk("sd", particle_schedule={2: 2}), best_of_n, reno]
SHARED: dict[str, list[Run]] = {name: [fk(name)] for name in PIPELINES} | {"different methods": DIFFERENT}


# Not Wan: its VAE stores decoding state in the module.
IN_THREADS = [
    pytest.param(one, marks=[] if one in (*SOME, "sd3", "different methods") else FULL)
    for one in (*PIPELINES, "different methods")
    if one != "wan"
]


@pytest.mark.few(1)
@pytest.mark.parametrize("shared", IN_THREADS)
@pytest.mark.parametrize("times", [1, pytest.param(10, marks=FULL)])
def test_threads_that_share_a_pipeline_give_the_results_of_calls_in_sequence(shared: str, times: int) -> None:
    """Four threads start at once, with their own seeds and prompts, and the shortest switch interval."""
    pipe, runs, tally = cached_pipe("sd" if shared not in PIPELINES else shared), SHARED[shared], Tally()
    together, before = Barrier(4), sys.getswitchinterval()

    def begun(seed: int) -> SteeringOutput:
        together.wait(60)
        return runs[seed % len(runs)](pipe, seed)

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            for number in range(times):
                seeds = range(4 * number, 4 * number + 4)
                in_turn = [runs[seed % len(runs)](pipe, seed) for seed in seeds]
                for one, other in zip(in_turn, pool.map(begun, seeds), strict=True):
                    tally.count("runs", all(map(torch.equal, bits(one), bits(other))))
    finally:
        sys.setswitchinterval(before)
    assert tally.lost == 0
    if times > 1:
        tally.note(f"threads that share a pipeline, {shared}")
