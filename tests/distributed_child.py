"""The program of several processes: torchrun --nproc-per-node 2 distributed_child.py FOLDER TASK…"""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import PIPELINES
from finetune_runs import METHODS, PROMPTS, config_of, train, trainer_of
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from steer.pipelines.training.distributed import AccelerateContext, main_first
from steer.pipelines.training.method import sampler_of
from steer.pipelines.training.rollouts import OnlineRollouts
from steer.training.guards import chi_square, kl
from steer.training.trainable import LoRA


def fresh() -> Any:
    """The same tiny pipeline every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = PIPELINES["sd"]()
    made.set_progress_bar_config(disable=True)
    return made


def first(folder: Path) -> None:
    """`main_first` works before anything else has asked accelerate for the process index."""
    with main_first(cpu=True):
        trajectories_seen = (folder / "first.txt").exists()
        (folder / "first.txt").touch()
    assert PartialState().num_processes == 2 and trajectories_seen == (PartialState().process_index == 1)


def gradients(folder: Path) -> None:
    """Gradients and metrics of one off-policy update of every method: METHOD-PROCESS.safetensors."""
    accelerator = Accelerator(cpu=True)
    context = AccelerateContext(accelerator)
    for name in METHODS:
        # Chunks that hold more than one row, so that processes and chunks do not coincide.
        config = config_of(name, train_batch_size=4, num_generations=3, micro_batch=4, steps_per_generation=1)
        method = trainer_of(name, fresh(), folder, config)
        lora = LoRA(method.pipe, rank=2)
        prepared = accelerator.prepare(lora.denoiser)
        sampler = sampler_of(method.pipe, config, {"unet": prepared})
        rollout = OnlineRollouts(PROMPTS, method).collect(0, sampler, lora, lambda: None, context)
        on_policy = name == "reward-backprop"
        if not on_policy:
            for seed, parameter in enumerate(lora.parameters.values()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.data += 0.02 * noise
        with context.no_sync(prepared) as exchange:
            value, metrics = method.gradient(
                sampler,
                rollout.batch,
                penalties={kl: 0.3, chi_square: 0.1},
                on_policy=on_policy,
                backward=accelerator.backward,
                on_chunk=lambda: None,
                before_last=exchange,
                context=context,
            )
        gradients_by_name = {
            key: parameter.grad for key, parameter in lora.parameters.items() if parameter.grad is not None
        }
        assert len(gradients_by_name) == len(lora.parameters)
        metrics |= {
            "loss": value,
            "processes": context.world_size,
            "rows": sum(len(one.rows) for one in rollout.batch.chunks),
        }
        save_file(gradients_by_name, folder / f"{name}-{context.rank}.safetensors", {"metrics": json.dumps(metrics)})


def resumed(folder: Path) -> None:
    """Runs of four updates, one of them resumed inside a rollout buffer; a tracker does not change the result."""
    for method in ("prdp", "ddpo"):
        tracked = config_of(method, max_steps=4, log_with=("tensorboard",))
        train(method, fresh(), folder / f"{method}-straight", tracked)
        train(method, fresh(), folder / f"{method}-parted", config_of(method, max_steps=3))
        train(method, fresh(), folder / f"{method}-parted", config_of(method, max_steps=4))


class InterruptingReward:
    """Brightness, until at its seventh call something happens to the second process."""

    name, differentiable = "struck", False

    def __init__(self, interrupt: Any) -> None:
        self.calls, self.interrupt = 0, interrupt

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.calls += 1
        if self.calls == 7 and os.environ["RANK"] == "1":
            self.interrupt()
        return images.mean((1, 2, 3))


def interrupted(folder: Path) -> None:
    """A signal that one process alone receives."""
    reward = InterruptingReward(lambda: os.kill(os.getpid(), signal.SIGTERM))
    options = {"reward": reward, "eval_prompts": (), "eval_rewards": ()}
    result = train("grpo", fresh(), folder / "interrupted", config_of("grpo", max_steps=50), **options)
    metrics = {name: value for name, value in asdict(result).items() if name in ("step", "stopped")}
    (folder / f"interrupted-{os.environ['RANK']}.json").write_text(json.dumps(metrics))


def killed(folder: Path) -> None:
    """The second process is gone, as one that the system killed, and died.txt says when."""

    def die() -> None:
        (folder / "died.txt").write_text(str(time.time()))
        os._exit(9)

    options = {"reward": InterruptingReward(die), "eval_prompts": (), "eval_rewards": ()}
    train("grpo", fresh(), folder / "dies", config_of("grpo", max_steps=50, save_steps=1), **options)


def sharded(folder: Path) -> None:
    """Runs of four updates, the denoiser's weights divided by FSDP2; and one in two components."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    # Accelerate divides weights on accelerators alone; PyTorch does it on the CPU too.
    AcceleratorState._reset_state()
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    for kind, changed in (("full", {"lora_rank": 0}), ("lora", {})):
        train("prdp", fresh(), folder / f"{kind}-straight", config_of("prdp", max_steps=4, **changed))
        train("prdp", fresh(), folder / f"{kind}-parted", config_of("prdp", max_steps=3, **changed))
        pipe = fresh()
        train("prdp", pipe, folder / f"{kind}-parted", config_of("prdp", max_steps=4, **changed))
        assert all(isinstance(parameter, DTensor) for parameter in pipe.unet.parameters())


if __name__ == "__main__":
    torch.set_num_threads(1)
    doing = {f.__name__: f for f in (first, gradients, resumed, interrupted, killed, sharded)}
    for what in sys.argv[2:]:
        doing[what](Path(sys.argv[1]))
    distributed.destroy_process_group()  # PyTorch may abort a process that exits without
