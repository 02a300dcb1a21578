"""python -m steer.apps.scenes STAGE: how the embedded model in assets/ was made."""

import argparse
import json
import logging
import random
from pathlib import Path
from typing import Any


def main() -> None:
    """Reads the stage and its options, and runs it."""
    parser = argparse.ArgumentParser(
        prog="python -m steer.apps.scenes",
        description="; ".join(f"{name}: {about}" for name, (_, about) in STAGES.items()),
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, default=Path("runs/scenes"), help="folder of checkpoints and logs")
    parser.add_argument("--steps", type=int, help="optimiser steps in all; an interrupted run goes on where it stopped")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", default="scenes", help="what `denoiser` trains: scenes or scenes-large")
    parser.add_argument("--vae", type=Path, help="finished autoencoder for `denoiser`; by default the one in --out")
    parser.add_argument("--model", type=Path, default=Path("assets/scenes"))
    parser.add_argument("--prompts", type=Path, default=Path("assets/prompts"))
    parser.add_argument("--trained", default="denoiser", help="what `export` takes from --out: denoiser or turbo")
    parser.add_argument("--count", type=int, help="prompts of --list, drawn from it; by default all")
    parser.add_argument("--list", default="scenes-heldout", help="prompt list of `evaluate`")
    parser.add_argument("--particles", type=int, default=4, help="K of `evaluate`")
    parser.add_argument(
        "--reward", default="scene-soft", help="what steers in `evaluate` and `foresight`; the ensemble of `curves`"
    )
    parser.add_argument("--lam", type=float, help="λ of `evaluate`; by default the one tuned for scene-soft")
    parser.add_argument("--reward-guidance", type=float, help="γ of `evaluate`: steps that lean along the gradient")
    parser.add_argument("--eta", type=float, help="η of the steering in `evaluate`; by default the solver's own")
    parser.add_argument("--large", default="scenes-large", help="what `steering` compares with, where there is one")
    parser.add_argument("--only", nargs="*", default=[], help="how the names of those runs of `finetuning` begin")
    parser.add_argument("--json", type=Path, default=Path("runs/scenes/evaluate.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    run, _ = STAGES[options.stage]
    run(options)


def _autoencoder(options: argparse.Namespace) -> None:
    from steer.apps.scenes.autoencoder import autoencoder_accuracy, train_autoencoder

    vae = train_autoencoder(options.out / "autoencoder", options.steps or 2500, options.device)
    print(f"{autoencoder_accuracy(vae):.2%} of fresh scenes pass after the autoencoder")


def _denoiser(options: argparse.Namespace) -> None:
    from diffusers import AutoencoderKL

    from steer.apps.scenes.denoiser import SIZES, train_denoiser

    vae = AutoencoderKL.from_pretrained(options.vae or options.out / "autoencoder" / "vae").to(options.device).eval()
    train_denoiser(options.out / "denoiser", vae, SIZES[options.size], options.steps or 3300, options.device)


def _check(options: argparse.Namespace) -> None:
    from diffusers import AutoencoderKL

    from steer.apps.scenes.autoencoder import autoencoder_accuracy

    vae = AutoencoderKL.from_pretrained(options.model / "vae").to(options.device).eval()
    print(f"{autoencoder_accuracy(vae):.2%} of fresh scenes pass after the autoencoder")


def _export(options: argparse.Namespace) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(options.out / options.trained / "pipeline")
    pipe.unet.half()
    pipe.vae.half()
    pipe.save_pretrained(options.model)


def _prompts_of(options: argparse.Namespace) -> list[str]:
    """Those of --list, or --count of them after a shuffle that is always the same."""
    from steer.apps.prompts import read_prompts
    from steer.assets import PROMPTS

    prompts = read_prompts(PROMPTS[options.list])
    if options.count is not None:
        random.Random(0).shuffle(prompts)
    return prompts[: options.count]


def _evaluate(options: argparse.Namespace) -> None:
    from steer.apps.scenes.evaluate import CALL, STEERING, compare

    prompts = _prompts_of(options)
    asked = {name: getattr(options, name) for name in ("lam", "reward_guidance", "eta")}
    steering = STEERING | {name: value for name, value in asked.items() if value is not None}
    _report(compare(str(options.model), prompts, options.reward, options.particles, steering, CALL), options.json)


def _foresight(options: argparse.Namespace) -> None:
    from steer.apps.scenes.evaluate import CALL, foresight

    prompts, steps = _prompts_of(options), range(2, 20, 3)
    _report(foresight(str(options.model), prompts, options.reward, options.particles, steps, CALL), options.json)


def _captions(options: argparse.Namespace) -> None:
    from steer.apps.scenes.preferences import new_clip_folder, write_captions

    new_clip_folder(options.out / "clip-new")
    write_captions(options.out / "captions.parquet", 40_000)


def _pairs(options: argparse.Namespace) -> None:
    from steer.apps.scenes.annotators import write_pairs
    from steer.apps.scenes.preferences import EACH, sample_prompts, trained_prompts

    folder = options.out / "samples"
    list(sample_prompts(folder, str(options.model), trained_prompts(1760), EACH))
    print(json.dumps(write_pairs(folder, options.out)))


def _many(options: argparse.Namespace) -> None:
    from steer.apps.scenes.preferences import sample_prompts

    options.count = options.count or 48
    list(sample_prompts(options.out / "many", str(options.model), _prompts_of(options), 256))


def _curves(options: argparse.Namespace) -> None:
    from steer.apps.scenes.overoptimise import curves, draw_curves

    found = curves(options.out / "many", options.reward)
    _report(found, options.json)
    draw_curves(found, options.json.with_suffix(".png"))


def _steering(options: argparse.Namespace) -> None:
    from steer.apps.scenes.steering_pictures import draw_steering
    from steer.apps.scenes.steering_study import contenders, steering_study

    options.count = options.count or 211  # all of the list, but shuffled: some methods get the first ones only
    rivals = contenders(large=options.large)
    found = steering_study(options.out / "steering", options.reward, _prompts_of(options), rivals)
    _report(found, options.json)
    draw_steering(found, options.json.with_suffix(".png"))


def _starts_study(options: argparse.Namespace) -> None:
    from steer.apps.scenes.starts_study import starts_study

    options.count = options.count or 48
    _report(starts_study(options.out / "starts", options.reward, _prompts_of(options)), options.json)


def _ablations(options: argparse.Namespace) -> None:
    from steer.apps.scenes.steering_ablations import ablations, variants
    from steer.apps.scenes.steering_pictures import draw_ablations

    options.list, options.count = "scenes-tuning", options.count or 64
    found = ablations(options.out / "ablations", options.reward, _prompts_of(options), variants())
    _report(found, options.json)
    draw_ablations(found, options.json.with_suffix(".png"))


def _finetuning(options: argparse.Namespace) -> None:
    from steer.apps.scenes.finetune_pictures import draw_guards, draw_methods
    from steer.apps.scenes.finetune_study import study

    found = study(options.out, options.only)
    _report(found, options.json)
    draw_methods(found, options.json.with_suffix(".png"))
    draw_guards(found, options.json.with_name(f"{options.json.stem}-guards.png"))


def _turbo(options: argparse.Namespace) -> None:
    from steer.apps.scenes.distil import distil

    distil(options.out / "turbo", options.model, options.steps or 10_000)


def _reno(options: argparse.Namespace) -> None:
    from steer.apps.scenes.noise_study import draw_study, study

    found = study("scenes-turbo", "scenes", options.reward, _prompts_of(options))
    _report(found, options.json)
    draw_study(found, options.json.with_suffix(".png"))


def _reno_then(options: argparse.Namespace) -> None:
    from steer.apps.scenes.noise_then import second_stage

    _report(second_stage("scenes-turbo", "scenes", options.reward, _prompts_of(options)), options.json)


def _reno_cost(options: argparse.Namespace) -> None:
    from steer.apps.scenes.noise_cost import costs

    _report(costs("scenes", "scenes-turbo"), options.json)


def _report(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _prompts(options: argparse.Namespace) -> None:
    from steer.apps.scenes.lists import write_prompt_lists

    write_prompt_lists(options.prompts)


STAGES = {
    "autoencoder": (_autoencoder, "train the autoencoder and whiten its latents"),
    "denoiser": (_denoiser, "train the denoiser and its text encoder on those latents"),
    "check": (_check, "share of fresh scenes that pass after the autoencoder"),
    "export": (_export, "write the finished pipeline to --model, UNet and autoencoder in half precision"),
    "evaluate": (_evaluate, "base, best-of-N and steering on --list, judged by the exact scene reward, to --json"),
    "foresight": (_foresight, "how well the reward of x̂0 at each step foretells the end, to --json"),
    "captions": (_captions, "write 40,000 drawn scenes with captions, and a new CLIP's configuration"),
    "pairs": (_pairs, "sample four images of 1,760 trained prompts and let noisy annotators choose between them"),
    "many": (_many, "sample 256 images of 40 prompts of --list, or of --count"),
    "curves": (
        _curves,
        "best-of-n of those by --reward and its members, judged by the exact reward, to --json and a picture",
    ),
    "steering": (_steering, "FK and its controls on --list, at equal evaluations and seconds, to --json and a picture"),
    "ablations": (_ablations, "settings of steering one at a time on scenes-tuning, to --json and a picture"),
    "starts-study": (_starts_study, "what short runs foretell, and FK and best-of-n with screened starts, to --json"),
    "finetuning": (_finetuning, "train what is not finished of 22 small runs in --out, and compare them, to --json"),
    "turbo": (_turbo, "distil --model to few steps; `export --trained turbo --model assets/scenes-turbo` writes it"),
    "reno": (_reno, "noise optimisation and its controls on prompts of --list, to --json and a picture"),
    "reno-then": (_reno_then, "whether optimised noise serves the multi-step model, on prompts of --list, to --json"),
    "reno-cost": (_reno_cost, "memory and time of noise optimisation, to --json"),
    "prompts": (_prompts, "write the prompt lists to --prompts"),
}

if __name__ == "__main__":
    main()
