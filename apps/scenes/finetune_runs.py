"""The finetuning runs that docs/results.md compares: what each trains on, and how it is judged."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from steer.apps.finetune_config import FinetuneConfig, read_config
from steer.apps.models import load_pipeline
from steer.apps.prompts import find_prompts
from steer.apps.scenes.synthetic_choices import CHOICES, write_choices
from steer.apps.specs import reward_here
from steer.pipelines import FinetuneResult
from steer.pipelines.held_out import Evaluated
from steer.pipelines.samples import prompts_at
from steer.staged import write_text

JUDGED = 96  # prompts that were learnt from, and as many that no training ever saw
# Equal images and equal updates for all; each method's own options, and learning rate, are those of its configuration.
EQUAL = {
    "prompts_per_step": "4",
    "samples_per_prompt": "8",
    "micro_batch": "32",
    "steps_per_round": "2",
    "max_steps": "60",
    "eval_every": "20",
    "eval_samples": "1",
    "checkpoint_every": "20",
    "log_with": "[]",
}


@dataclass(frozen=True)
class Plan:
    """A run: an embedded configuration, the keys it changes as on the command line, and what it shows."""

    config: str
    shows: str
    changes: Mapping[str, str] = field(default_factory=dict)

    def read(self, folder: Path) -> FinetuneConfig:
        """All of its settings."""
        return read_config(self.config, EQUAL | dict(self.changes) | {"output_dir": str(folder)})


def seeds_of(method: str, prompts: str, seeds: int, **changes: str) -> dict[str, Plan]:
    """The same run with several seeds."""
    told = {"prompts": f"scenes-{prompts}"} | changes
    shows = f"{method}, {prompts} prompts"
    return {
        f"{method}-{prompts}-{seed}": Plan(f"{method}-scenes", shows, told | {"seed": str(seed)})
        for seed in range(seeds)
    }


STALE = {"prompts": "scenes-many", "steps_per_round": "10"}  # a round's last update is nine updates old
FOOLED = {"learning_rate": "3e-3", "max_steps": "80", "eval_every": "10", "checkpoint_every": "10"}
WATCHED = {"patience": "2"}
GUARDED = WATCHED | {"kl_weight": "1e-3", "kl_target": "50"}
# As many images an update as the others, two for each choice.
CHOSEN = {"prompts": "null", "prompts_per_step": "16", "samples_per_prompt": "2"}
PLANS = {
    **seeds_of("prdp", "many", 3),
    **seeds_of("ddpo", "many", 3),
    **seeds_of("prdp", "few", 3),
    **seeds_of("ddpo", "few", 3),
    **seeds_of("grpo", "many", 1),
    **seeds_of("grpo", "few", 1),
    "prdp-stale": Plan("prdp-scenes", "prdp, ten updates a round", STALE),
    "prdp-stale-unclipped": Plan("prdp-scenes", "the same without the clip", STALE | {"options.clip": "1e9"}),
    "d3po-jpeg": Plan("d3po-scenes", "d3po on jpeg", {"reward": "jpeg"}),
    "d3po-scene": Plan("d3po-scenes", "d3po on scene", {"reward": "scene", "eval_rewards": "[aesthetic:scenes]"}),
    "d3po-choices": Plan("d3po-scenes", "d3po on 500 choices", CHOSEN),
    "d3po-unguarded": Plan("d3po-scenes", "d3po, a high rate", FOOLED),
    "d3po-watched": Plan("d3po-scenes", "the same, watched by the held-out reward", FOOLED | WATCHED),
    "d3po-guarded": Plan("d3po-scenes", "the same, watched, and held by a KL penalty", FOOLED | GUARDED),
}


def train(name: str, folder: Path) -> FinetuneResult:
    """Trains folder/NAME as planned, from where it stopped; judged/STEP.json holds the rewards of every prompt."""
    plan, out = PLANS[name], folder / name
    choices = folder / "choices"
    if plan.changes.get("prompts") == "null":
        write_choices(choices)
        config = Plan(plan.config, plan.shows, dict(plan.changes) | {"choices": str(choices)}).read(out)
    else:
        config = plan.read(out)
    pipe = load_pipeline(config.job.model)
    pipe.set_progress_bar_config(disable=True)
    assert config.job.reward is not None
    method = config.method(pipe, reward_here(config.job.reward))
    prompts = find_prompts(config.job.prompts or "scenes-training")
    learnt = prompts if config.job.choices is None else prompts[:CHOICES]
    eval_prompts = [*prompts_at(0, JUDGED, learnt, config.settings.seed), *unseen(JUDGED)]
    options: dict[str, Any] = {
        "eval_prompts": eval_prompts,
        "eval_rewards": [reward_here(spec) for spec in config.job.eval_rewards],
        "resume": True,
        "on_evaluation": partial(judged, out),
    }
    if config.job.choices is not None:
        return method.train_on_choices(choices, out, config.settings, **options)
    return method.train(prompts, out, config.settings, **options)


def unseen(count: int) -> list[str]:
    """Of the held-out prompts so many, evenly spaced: of every task as many as there are."""
    prompts = find_prompts("scenes-heldout")
    return [prompts[place * len(prompts) // count] for place in range(count)]


def judged(out: Path, found: Evaluated) -> None:
    """Keeps what an evaluation found, prompt by prompt: those that were learnt from, then the others."""
    told = {name: values.mean(1).tolist() for name, values in found.rewards.items()}
    write_text(out / "judged" / f"{found.step:04d}.json", json.dumps({"prompts": found.prompts, "rewards": told}))


def read_judged(out: Path) -> dict[int, dict[str, Any]]:
    """What `judged` kept, by update."""
    return {int(path.stem): json.loads(path.read_text()) for path in sorted((out / "judged").glob("*.json"))}
