"""The studies of the embedded model: tables of contenders for `steer evaluate`'s own run, and a training plan.

Each table is evaluated on the same prompts and seeds by the reward that steers and by the exact one; evaluation.md,
evaluation.json and the pictures in --out hold means with intervals, differences from the first contender, and costs.
"""

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from steer.apps.evaluation.report import summary
from steer.apps.evaluation.run import Contender, evaluate
from steer.apps.finetuning import FinetuneConfig, finetune, read_config
from steer.apps.prompts import load_prompts
from steer.apps.scenes.preferences import CHOICES, write_choices
from steer.assets import MODELS
from steer.files import write_text
from steer.pipelines.training.method import prompts_at
from steer.reward import Reward
from steer.rewards.scene import SceneReward

SAMPLING: dict[str, Any] = {"steps": 20, "guidance": 4.0}
LAM = 25.0  # of Feynman–Kac steering, chosen on scenes-tuning, never on the held-out prompts
SIZES = (1, 2, 4, 8, 16)  # K
BATCH = 32  # images in one call, where a method can


class ExactlyRight:
    """1 for an image that meets all requirements of its prompt, else 0."""

    name, differentiable = "right", False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (SceneReward()(images, prompts) == 1).float()


def prompts_of(options: argparse.Namespace, count: int | None = None) -> list[str]:
    """All prompts of --list, or --count of them (by default `count`) after a shuffle that is always the same."""
    prompts = load_prompts(options.list)
    if (count := options.count or count) is not None:
        random.Random(0).shuffle(prompts)
    return prompts[:count]


def fk(size: int, label: str | None = None, **options: Any) -> Contender:
    """Feynman–Kac steering with K particles and the λ of the studies."""
    return Contender(method="fk", options={"particles": size, "lam": LAM} | options, label=label)


def best_of(n: int, label: str | None = None, **options: Any) -> Contender:
    """Best-of-n."""
    return Contender(method="best-of-n", options={"particles": n} | options, label=label)


def main_contenders(options: argparse.Namespace) -> list[Contender]:
    """Base, best-of-K and Feynman–Kac steering of --model, with --lam, --reward-guidance and --eta."""
    given = {name: getattr(options, name) for name in ("lam", "reward_guidance", "eta")}
    steering = {"lam": LAM} | {name: value for name, value in given.items() if value is not None}
    size, model = {"particles": options.particles}, str(options.model)
    return [
        Contender(model, label="base"),
        Contender(model, method="best-of-n", options=size),
        Contender(model, method="fk", options=size | steering),
    ]


def steering_contenders(options: argparse.Namespace) -> list[Contender]:
    """Every way to spend denoiser evaluations on one prompt; the larger model where there is one."""
    contenders = [Contender(label="base")]
    contenders += [best_of(n) for n in SIZES[1:]] + [fk(size) for size in SIZES]
    contenders += [Contender(method=m, options={"particles": k}) for m in ("svdd", "beam") for k in (4, 8)]
    contenders.append(Contender(method="noise-search", options={"particles": 1, "iterations": 5}))
    if options.large in MODELS or (Path(options.large) / "model_index.json").exists():
        contenders += [Contender(options.large), Contender(options.large, method="best-of-n")]
    return contenders


def ablation_contenders(options: argparse.Namespace) -> list[Contender]:
    """The standard settings of Feynman–Kac steering, and one of them changed at a time."""
    changes: list[dict[str, Any]] = [{"potential": name} for name in ("max", "sum", "now")]
    changes += [{"lam": lam} for lam in (5.0, 10.0, 60.0)] + [{"ess_threshold": 1.0}, {"eta": 1.0}]
    named = [fk(4, " ".join(f"{name}={value}" for name, value in change.items()), **change) for change in changes]
    controls = [Contender(method=method) for method in ("best-of-n", "svdd", "beam")]
    return [fk(4, "standard"), *named, *controls]


FEWER, FEWEST, TOP = "8:4", "8:4,14:2", {"particle_schedule_rule": "top_k"}  # particles from solver steps on


def economy_contenders(options: argparse.Namespace) -> list[Contender]:
    """Eight particles to the end, and cheaper ways: fewer particles later, a target, cheap previews."""
    schedules: list[tuple[int, dict[str, Any]]] = [
        *((size, {}) for size in (8, 4, 2)),
        *((size, {"particle_schedule": FEWER}) for size in (8, 16)),
        (8, {"particle_schedule": FEWEST}),
        *((8, {"particle_schedule": steps} | TOP) for steps in (FEWER, FEWEST, "14:2", "17:1")),
        (12, {"particle_schedule": FEWEST} | TOP),
        (8, {"target_reward": 0.8}),
        *((8, {"preview": preview}) for preview in ("tiny", "linear")),
        *((size, {"particle_schedule": FEWEST, "preview": "tiny"} | TOP) for size in (8, 12)),
    ]
    return [fk(size, **changes) for size, changes in schedules]


def screening_contenders(options: argparse.Namespace) -> list[Contender]:
    """Best-of-n and Feynman–Kac steering from random and from screened starting noise."""
    screened: list[dict[str, Any]] = [{"noise_candidates": 16, "screening_steps": steps} for steps in (2, 4, 6)]
    contenders = [best_of(n) for n in (4, 8, 16)] + [best_of(4, **start) for start in screened]
    contenders += [fk(size) for size in (4, 8, 12)]
    return contenders + [fk(size, noise_candidates=many) for size, many in ((4, 8), (4, 16), (8, 16))]


def preview_contenders(options: argparse.Namespace) -> list[Contender]:
    """Feynman–Kac steering by previews of the full decoder, of the tiny one and of the linear map."""
    return [fk(8, preview=preview) for preview in ("full", "tiny", "linear")]


def noise_contenders(options: argparse.Namespace) -> list[Contender]:
    """Optimised noise of the one-step model beside its controls, and the multi-step model that taught it."""
    turbo, single = "scenes-turbo", {"particles": 1, "steps": 1}
    contenders = [Contender(turbo, options={"steps": steps}) for steps in (1, 2, 4)]
    contenders += [Contender("scenes", options={"steps": steps}) for steps in (20, 50)]
    contenders += [Contender(turbo, None, "reno", single | {"iterations": n}) for n in (1, 5, 10, 25, 50)]
    contenders += [Contender(turbo, None, "best-of-n", {"particles": n, "steps": 1}) for n in (10, 50, 200)]
    return contenders + [Contender(turbo, None, "noise-search", single | {"iterations": n}) for n in (3, 13, 51)]


@dataclass(frozen=True)
class Study:
    """A table of contenders.

    about  what it compares, for --help
    count  prompts of --list where --count is not given; None: all
    """

    about: str
    contenders: Callable[[argparse.Namespace], list[Contender]]
    count: int | None = None
    seeds: int = 1

    def run(self, options: argparse.Namespace) -> dict[str, Any]:
        """Evaluate the contenders in --out/STAGE; the same command resumes. Returns evaluation.json."""
        others = [name for name in ("scene",) if name != options.reward]
        rewards: list[str | Reward] = [options.reward, *others, ExactlyRight()]
        return evaluate(
            self.contenders(options),
            prompts_of(options, self.count),
            rewards,
            self.seeds,
            options.out / options.stage,
            SAMPLING,
            batch=BATCH,
            device=options.device,
        )


CONTENDER_TABLES = {
    "evaluate": Study("base, best-of-N and steering of --model", main_contenders),
    "steering": Study("FK and its controls at equal evaluations and seconds", steering_contenders),
    "ablations": Study("settings of steering one at a time (--list scenes-tuning)", ablation_contenders, 64),
    "economies": Study("steering with fewer and cheaper evaluations", economy_contenders, 64),
    "starts-study": Study("FK and best-of-n with screened starting noise", screening_contenders, 48),
    "preview-study": Study("FK by full, tiny and linear previews", preview_contenders, 64),
    "reno": Study("noise optimisation and its controls", noise_contenders, 104, seeds=2),
}


def write_figures(options: argparse.Namespace, figures: Mapping[str, Any]) -> None:
    """Write the figures of a stage to --json, by default --out/STAGE.json."""
    write_text(options.json or options.out / f"{options.stage}.json", json.dumps(figures, indent=1) + "\n")


def _table(options: argparse.Namespace) -> None:
    report = CONTENDER_TABLES[options.stage].run(options)
    write_figures(options, report)
    print(summary(report))


# Equal images and updates for all; each method's own options and learning rate are those of its configuration.
SHARED_CHANGES = {
    "train_batch_size": "4",
    "num_generations": "8",
    "micro_batch": "32",
    "steps_per_generation": "2",
    "max_steps": "60",
    "save_steps": "20",
    "eval_prompts_count": "96",
    "num_generations_eval": "1",
    "log_with": "[]",
}
NUM_EVAL_PROMPTS = 96  # prompts that were learnt from, and as many that no training ever saw


@dataclass(frozen=True)
class RunConfig:
    """A training run: an embedded configuration and the keys it changes, as on the command line."""

    config: str
    changes: Mapping[str, str] = field(default_factory=dict)

    def read(self, folder: Path) -> FinetuneConfig:
        """Read the configuration with its changes. Raises InputError."""
        return read_config(self.config, SHARED_CHANGES | dict(self.changes) | {"output_dir": str(folder)})


def seeds_of(method: str, prompts: str, seeds: int) -> dict[str, RunConfig]:
    """The same run with several seeds."""
    return {
        f"{method}-{prompts}-{seed}": RunConfig(f"{method}-scenes", {"prompts": f"scenes-{prompts}", "seed": str(seed)})
        for seed in range(seeds)
    }


OFF_POLICY = {"prompts": "scenes-many", "steps_per_generation": "10"}  # a rollout's last update is nine updates old
HIGH_LEARNING_RATE = {"learning_rate": "3e-3", "max_steps": "80", "eval_steps": "10", "save_steps": "10"}
EARLY_STOPPING = HIGH_LEARNING_RATE | {"early_stopping_patience": "2"}
PREFERENCES = {"prompts": "null", "train_batch_size": "16", "num_generations": "2"}  # as many images an update
RUN_CONFIGS = {
    **seeds_of("prdp", "many", 3),
    **seeds_of("ddpo", "many", 3),
    **seeds_of("prdp", "few", 3),
    **seeds_of("ddpo", "few", 3),
    **seeds_of("grpo", "many", 1),
    **seeds_of("grpo", "few", 1),
    "prdp-off-policy": RunConfig("prdp-scenes", OFF_POLICY),
    "prdp-off-policy-unclipped": RunConfig("prdp-scenes", OFF_POLICY | {"clip": "1e9"}),
    "d3po-jpeg": RunConfig("d3po-scenes", {"reward": "jpeg"}),
    "d3po-scene": RunConfig("d3po-scenes", {"reward": "scene", "eval_rewards": "[aesthetic:scenes]"}),
    "d3po-preferences": RunConfig("d3po-scenes", PREFERENCES),
    "d3po-unguarded": RunConfig("d3po-scenes", HIGH_LEARNING_RATE),
    "d3po-early-stopping": RunConfig("d3po-scenes", EARLY_STOPPING),
    "d3po-early-stopping-kl": RunConfig("d3po-scenes", EARLY_STOPPING | {"kl_weight": "1e-3", "kl_target_nats": "50"}),
}


def train(name: str, folder: Path) -> FinetuneConfig:
    """Train one run of the plan in folder/NAME as `steer finetune` does, or resume it; a finished one is left alone."""
    plan, out, preferences = RUN_CONFIGS[name], folder / name, folder / "choices"
    if plan.changes.get("prompts") == "null":
        write_choices(preferences)
        plan = RunConfig(plan.config, {**plan.changes, "preferences": str(preferences)})
    config = plan.read(out)
    if not (out / "final").exists():
        finetune(config, resume=(out / "checkpoints").exists())
    return config


def finetuning_study(folder: Path, only: Sequence[str], count: int = NUM_EVAL_PROMPTS) -> dict[str, Any]:
    """Train the runs whose names begin with one of `only` (by default all), and evaluate each beside the base model.

    A group of runs that learnt from the same prompts is one evaluation in folder/evaluation/PROMPTS, on prompts that
    were learnt from and on prompts that no training saw: the tasks "seen" and "unseen".
    """
    names = [name for name in RUN_CONFIGS if not only or name.startswith(tuple(only))]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(train(name, folder).job.prompts or "scenes-training", []).append(name)
    heldout = load_prompts("scenes-heldout")
    unseen = [heldout[place * len(heldout) // count] for place in range(count)]  # evenly spaced: of every task
    reports = {}
    for prompts, runs in groups.items():
        learnt = load_prompts(prompts)
        seen = list(dict.fromkeys(prompts_at(0, count, learnt[:CHOICES], seed=0)))
        base = Contender("scenes", options={"steps": 10, "guidance": 1.0, "eta": 1.0})
        adapters = [Contender(base.model, str(folder / name / "final"), options=base.options) for name in runs]
        reports[prompts] = evaluate(
            [base, *adapters],
            [*seen, *unseen],
            ["aesthetic:scenes", "scene", "jpeg"],
            seeds=1,
            out=folder / "evaluation" / prompts,
            tags=["seen"] * len(seen) + ["unseen"] * len(unseen),
            batch=BATCH,
        )
    return reports


def _finetuning(options: argparse.Namespace) -> None:
    reports = finetuning_study(options.out, options.only)
    write_figures(options, reports)
    for prompts, report in reports.items():
        print(f"{prompts}\n{summary(report)}")


Stage = tuple[Callable[[argparse.Namespace], None], str]
STUDIES: dict[str, Stage] = {
    **{name: (_table, f"{study.about}, to --out") for name, study in CONTENDER_TABLES.items()},
    "finetuning": (_finetuning, "train what is not finished of 22 small runs in --out, and evaluate them"),
}
