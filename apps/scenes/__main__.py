"""python -m steer.apps.scenes STAGE: training of the embedded models in assets/, and studies beside docs/studies."""

import argparse
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DiffusionPipeline

from steer.apps.errors import describe_os_error
from steer.apps.prompts import evenly_chosen, load_prompts
from steer.apps.scenes import analyses, distil, flow, preferences, training, world
from steer.errors import InputError
from steer.files import write_text
from steer.pipelines.text.masked_diffusion import left_out


def main() -> None:
    """Parse the stage and its options, and run it."""
    parser = argparse.ArgumentParser(
        prog="python -m steer.apps.scenes",
        description="; ".join(f"{name}: {about}" for name, (_, about) in STAGES.items()),
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, default=Path("runs/scenes"), help="folder of checkpoints and logs")
    parser.add_argument("--steps", type=int, help="optimiser steps in all; the same command resumes an interrupted run")
    parser.add_argument("--device", help=f"of {' and '.join(ON_A_DEVICE)}; by default cpu")
    parser.add_argument(
        "--start",
        type=Path,
        help="what `text`, `turbo` (an adapter of `lcm`) and `denoiser` begin with where --out has no state",
    )
    seconds = "processor time of each recipe of `pilot`; seconds of updates of each run of `finetuning`"
    parser.add_argument("--seconds", "--seconds-each", type=float, default=300.0, help=seconds)
    parser.add_argument("--seeds", type=int, default=3, help="of each run of `finetuning`")
    parser.add_argument("--vae", type=Path, help="finished autoencoder for `denoiser`; by default the one in --out")
    parser.add_argument("--model", type=Path, default=Path("assets/scenes"))
    parser.add_argument("--prompts", type=Path, default=Path("assets/prompts"))
    parser.add_argument(
        "--trained", default="denoiser", help="model in --out that `export` writes: denoiser, large, flow or turbo"
    )
    parser.add_argument("--count", type=int, help="prompts of --list, shuffled; by default all")
    parser.add_argument("--list", default="scenes-heldout", help="prompt list of the studies")
    parser.add_argument("--reward", default="scene-soft", help="reward of the studies")
    parser.add_argument("--plan", type=Path, help="runs of `finetuning`, in docs/studies")
    parser.add_argument(
        "--only", nargs="*", default=[], help="runs of --plan, or recipes of `pilot`, by the start of their names"
    )
    parser.add_argument("--json", type=Path, help="copy of the figures; by default --out/STAGE.json")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        figures = run(options)
    except (InputError, OSError) as error:
        reason = describe_os_error(error) if isinstance(error, OSError) else str(error)
        parser.exit(2, f"{parser.prog}: {reason}\n")
    if isinstance(figures, dict):
        write_text(options.json or options.out / f"{options.stage}.json", json.dumps(figures, indent=1) + "\n")


def run(options: argparse.Namespace) -> Any:
    """Run a stage, and return its figures or what else its function returns. Raises InputError, OSError."""
    if options.device is not None and options.stage not in ON_A_DEVICE:
        raise InputError(f"{options.stage} takes no --device, only {' and '.join(ON_A_DEVICE)} do: leave it out")
    return STAGES[options.stage][0](options)


def prompts_of(options: argparse.Namespace) -> list[str]:
    """All prompts of --list, or --count of them after a shuffle that is always the same."""
    prompts = load_prompts(options.list)
    if options.count is not None:
        random.Random(0).shuffle(prompts)
    return prompts[: options.count]


def _vae(options: argparse.Namespace) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(options.vae or options.out / "autoencoder" / "vae").eval()


def _teacher(options: argparse.Namespace) -> Path:
    """Return --model, a folder in diffusers' format."""
    model: Path = options.model
    if not (model / "model_index.json").is_file():
        raise InputError(f"--model {model}: no model_index.json there; give the folder of a pipeline")
    return model


def _print_accuracy(vae: AutoencoderKL) -> None:
    print(f"{training.autoencoder_accuracy(vae):.2%} of fresh scenes pass after the autoencoder")


def _export(options: argparse.Namespace) -> None:
    folder = options.out / options.trained / "pipeline"
    pipe = DiffusionPipeline.from_pretrained(folder, **left_out(folder))
    for name in {"unet", "transformer", "vae"} & pipe.components.keys():
        pipe.components[name].half()
    pipe.save_pretrained(options.model)
    for path in (options.model / "model_index.json", *options.model.glob("*/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # where it was trained is of no use elsewhere
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _captions(options: argparse.Namespace) -> None:
    preferences.new_clip_folder(options.out / "clip-new")
    preferences.write_captions(options.out / "captions.parquet", 40_000)


def _pairs(options: argparse.Namespace) -> None:
    folder, prompts = options.out / "samples", preferences.trained_prompts(1760)
    preferences.sample_prompts(folder, str(options.model), prompts)
    print(json.dumps(preferences.write_pairs(folder, options.out)))


def _finetuning(options: argparse.Namespace) -> dict[str, Any]:
    from steer.apps.scenes import finetuning

    plan = finetuning.read_plan(options.plan or Path("docs/studies/finetuning-methods.yaml"))
    given = str(options.model), options.reward, options.seconds, options.seeds, options.only
    figures = finetuning.finetuning_study(plan, options.out, *given)
    path = options.json or options.out / f"{options.stage}.json"
    finetuning.draw_finetuning_curves(figures, path.with_suffix(".png"))
    write_text(path.with_suffix(".md"), f"{finetuning.curves_table(figures)}\n")
    print(finetuning.curves_table(figures))
    return figures


def _text(options: argparse.Namespace) -> None:
    from steer.apps.scenes.text import parse_rate, train_text

    pipe = train_text(options.out / "text", options.steps or 6000, options.start)
    print(f"{parse_rate(pipe):.2%} of samples at 20 steps parse")


def _prompt_lists(options: argparse.Namespace) -> None:
    from steer.apps.scenes.text import write_prefix_lists

    world.write_prompt_lists(options.prompts)
    write_prefix_lists(options.prompts)


def _curves(options: argparse.Namespace) -> dict[str, Any]:
    report = json.loads((options.out / "evaluation.json").read_text())
    figures = analyses.curves(report, report["rewards"][1])
    analyses.draw_curves(figures, (options.json or options.out / "curves.json").with_suffix(".png"))
    return figures


def _unsteered(options: argparse.Namespace) -> dict[str, Any]:
    prompts = evenly_chosen(load_prompts(options.list), options.count)
    path = (options.json or options.out / "unsteered.json").with_suffix(".png")
    return analyses.draw_unsteered(str(options.model), prompts, path)


ON_A_DEVICE = ("autoencoder", "check")  # stages that take --device
STAGES: dict[str, tuple[Callable[[argparse.Namespace], Any], str]] = {  # function, whose dict is the figures, and help
    "autoencoder": (
        lambda given: _print_accuracy(
            training.train_autoencoder(given.out / "autoencoder", given.steps or 2500, given.device or "cpu")
        ),
        "train the autoencoder and whiten its latents",
    ),
    "denoiser": (
        lambda given: training.train_denoiser(
            given.out / "denoiser", _vae(given), training.Recipe(), given.steps or 11_000, start=given.start
        ),
        "train the denoiser and its text encoder on those latents",
    ),
    "large": (
        lambda given: training.train_large(given.out / "large", _teacher(given), given.steps or 3200),
        "deepen the denoiser of --model, three times the parameters, and train it on",
    ),
    "flow": (
        lambda given: flow.train_flow(given.out / "flow", _vae(given), given.steps or flow.STEPS),
        "train a flow-matching transformer in Stable Diffusion 3 format on those latents",
    ),
    "checkpoint": (
        lambda given: training.save_checkpoint(given.out / "denoiser", _vae(given), training.Recipe(), given.model),
        "write the averaged weights of an unfinished `denoiser` to --model, for --start",
    ),
    "pilot": (
        lambda given: training.pilot(given.out / "pilot", _vae(given), given.seconds, given.only),
        "compare recipes for the denoiser at equal processor time (--seconds, --only)",
    ),
    "check": (
        lambda given: _print_accuracy(
            AutoencoderKL.from_pretrained(given.model / "vae").to(given.device or "cpu").eval()
        ),
        "share of fresh scenes that pass after the autoencoder",
    ),
    "export": (_export, "write the finished pipeline to --model, denoiser and autoencoder in half precision"),
    "captions": (_captions, "write 40,000 drawn scenes with captions, and a new CLIP's configuration"),
    "pairs": (_pairs, "sample four images of 1,760 trained prompts and let noisy annotators choose between them"),
    "turbo": (
        lambda given: distil.distil(given.out / "turbo", _teacher(given), given.steps or 8000, start=given.start),
        "distil --model to few steps; `export --trained turbo --model assets/scenes-turbo` writes it",
    ),
    "lcm": (
        lambda given: distil.distil_lora(given.out / "lcm", _teacher(given), given.steps or 3000),
        "distil --model to a LoRA adapter of one to four steps; its folder is the asset",
    ),
    "tiny-vae": (
        lambda given: distil.train_tiny_decoder(given.out / "tiny-vae", _teacher(given), given.steps or 7000),
        "train a small autoencoder for previews of --model's latents; its folder is the asset",
    ),
    "text": (_text, "train scenes-text on the words of the prompts; its pipeline is the asset"),
    "prompts": (_prompt_lists, "write the prompt lists to --prompts"),
    "finetuning": (
        _finetuning,
        "train the runs of --plan on --reward at equal seconds, unless finished, to --json, a table and a figure",
    ),
    "curves": (_curves, "best-of-n by an ensemble and others, from the evaluation in --out, to --json and a picture"),
    "unsteered": (
        _unsteered,
        "draw an image of --count evenly spaced prompts of --list, right or wrong, beside --json",
    ),
    "reno-then": (
        lambda given: analyses.reno_then_steering("scenes-turbo", "scenes", given.reward, prompts_of(given)),
        "whether optimised noise serves the multi-step model, to --json",
    ),
}

if __name__ == "__main__":
    main()
