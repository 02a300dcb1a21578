"""The studies that were made with the embedded model: each writes what it found to --json, some a picture beside it."""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any


def prompts_of(options: argparse.Namespace) -> list[str]:
    """Those of --list, or --count of them after a shuffle that is always the same."""
    from steer.apps.prompts import read_prompts
    from steer.assets import PROMPTS

    prompts = read_prompts(PROMPTS[options.list])
    if options.count is not None:
        random.Random(0).shuffle(prompts)
    return prompts[: options.count]


def _evaluate(options: argparse.Namespace) -> None:
    from steer.apps.scenes.evaluate import CALL, STEERING, compare

    prompts = prompts_of(options)
    asked = {name: getattr(options, name) for name in ("lam", "reward_guidance", "eta")}
    steering = STEERING | {name: value for name, value in asked.items() if value is not None}
    _report(compare(str(options.model), prompts, options.reward, options.particles, steering, CALL), options.json)


def _foresight(options: argparse.Namespace) -> None:
    from steer.apps.scenes.evaluate import CALL, foresight

    prompts, steps = prompts_of(options), range(2, 20, 3)
    _report(foresight(str(options.model), prompts, options.reward, options.particles, steps, CALL), options.json)


def _curves(options: argparse.Namespace) -> None:
    from steer.apps.scenes.evaluate import curves, draw_curves

    method_results = curves(options.out / "many", options.reward)
    _report(method_results, options.json)
    draw_curves(method_results, options.json.with_suffix(".png"))


def _steering(options: argparse.Namespace) -> None:
    from steer.apps.scenes.steering_studies import contenders, draw_steering, steering_study

    options.count = options.count or 211  # all of the list, but shuffled: some methods get the first ones only
    rivals = contenders(large=options.large)
    method_results = steering_study(options.out / "steering", options.reward, prompts_of(options), rivals)
    _report(method_results, options.json)
    draw_steering(method_results, options.json.with_suffix(".png"))


def _ablations(options: argparse.Namespace) -> None:
    from steer.apps.scenes.steering_studies import ablations, draw_ablations, variants

    options.list, options.count = "scenes-tuning", options.count or 64
    method_results = ablations(options.out / "ablations", options.reward, prompts_of(options), variants())
    _report(method_results, options.json)
    draw_ablations(method_results, options.json.with_suffix(".png"))


def _economies(options: argparse.Namespace) -> None:
    from steer.apps.scenes.steering_studies import draw_economies, economies
    from steer.apps.scenes.steering_studies import economy_variants as variants

    options.count = options.count or 64
    method_results = economies(options.out / "economies", options.reward, prompts_of(options), variants())
    _report(method_results, options.json)
    draw_economies(method_results, options.json.with_suffix(".png"))


def _starts_study(options: argparse.Namespace) -> None:
    from steer.apps.scenes.noise_studies import starts_study

    options.count = options.count or 48
    _report(starts_study(options.out / "starts", options.reward, prompts_of(options)), options.json)


def _preview_study(options: argparse.Namespace) -> None:
    from steer.apps.scenes.evaluate import CALL
    from steer.apps.scenes.steering_studies import preview_study

    _report(preview_study(str(options.model), prompts_of(options), CALL), options.json)


def _finetuning(options: argparse.Namespace) -> None:
    from steer.apps.scenes.finetune_studies import draw_guards, draw_methods, study

    method_results = study(options.out, options.only)
    _report(method_results, options.json)
    draw_methods(method_results, options.json.with_suffix(".png"))
    draw_guards(method_results, options.json.with_name(f"{options.json.stem}-guards.png"))


def _reno(options: argparse.Namespace) -> None:
    from steer.apps.scenes.noise_studies import draw_study, study

    method_results = study("scenes-turbo", "scenes", options.reward, prompts_of(options))
    _report(method_results, options.json)
    draw_study(method_results, options.json.with_suffix(".png"))


def _reno_then(options: argparse.Namespace) -> None:
    from steer.apps.scenes.noise_studies import reno_then_steering

    _report(reno_then_steering("scenes-turbo", "scenes", options.reward, prompts_of(options)), options.json)


def _reno_cost(options: argparse.Namespace) -> None:
    from steer.apps.scenes.noise_studies import costs

    _report(costs("scenes", "scenes-turbo"), options.json)


def _report(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


STUDIES: dict[str, tuple[Callable[[argparse.Namespace], None], str]] = {
    "evaluate": (_evaluate, "base, best-of-N and steering on --list, judged by the exact scene reward, to --json"),
    "foresight": (_foresight, "how well the reward of x̂0 at each step foretells the end, to --json"),
    "curves": (
        _curves,
        "best-of-n of those by --reward and its members, judged by the exact reward, to --json and a picture",
    ),
    "steering": (_steering, "FK and its controls on --list, at equal evaluations and seconds, to --json and a picture"),
    "ablations": (_ablations, "settings of steering one at a time on scenes-tuning, to --json and a picture"),
    "economies": (_economies, "steering with fewer and cheaper evaluations on --list, to --json and a picture"),
    "starts-study": (_starts_study, "what short runs foretell, and FK and best-of-n with screened starts, to --json"),
    "finetuning": (_finetuning, "train what is not finished of 22 small runs in --out, and compare them, to --json"),
    "preview-study": (
        _preview_study,
        "how cheap previews of x̂0 rank particles on --list, and what they take, to --json",
    ),
    "reno": (_reno, "noise optimisation and its controls on prompts of --list, to --json and a picture"),
    "reno-then": (_reno_then, "whether optimised noise serves the multi-step model, on prompts of --list, to --json"),
    "reno-cost": (_reno_cost, "memory and time of noise optimisation, to --json"),
}
