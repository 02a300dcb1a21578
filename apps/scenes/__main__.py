"""python -m steer.apps.scenes STAGE: training of the embedded models in assets/, and their studies."""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path

from steer.apps.scenes.studies import STUDIES, Stage, prompts_of, write_figures


def main() -> None:
    """Parse the stage and its options, and run it."""
    parser = argparse.ArgumentParser(
        prog="python -m steer.apps.scenes",
        description="; ".join(f"{name}: {about}" for name, (_, about) in STAGES.items()),
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, default=Path("runs/scenes"), help="folder of checkpoints and logs")
    parser.add_argument("--steps", type=int, help="optimiser steps in all; the same command resumes an interrupted run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--start", type=Path, help="model that `text` begins with, or `denoiser` where --out has no state"
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="processor time of each recipe of `pilot`")
    parser.add_argument("--size", default="scenes", help="model of `denoiser`: scenes or scenes-large")
    parser.add_argument("--vae", type=Path, help="finished autoencoder for `denoiser`; by default the one in --out")
    parser.add_argument("--model", type=Path, default=Path("assets/scenes"))
    parser.add_argument("--prompts", type=Path, default=Path("assets/prompts"))
    parser.add_argument("--trained", default="denoiser", help="model in --out that `export` writes: denoiser or turbo")
    parser.add_argument("--count", type=int, help="prompts of --list; by default the study's own number, or all")
    parser.add_argument("--list", default="scenes-heldout", help="prompt list of the studies")
    parser.add_argument("--particles", type=int, default=4, help="K of `evaluate`")
    parser.add_argument(
        "--reward", default="scene-soft", help="the reward that steers and picks; the ensemble of `curves`"
    )
    parser.add_argument("--lam", type=float, help="λ of `evaluate`; by default the one tuned for scene-soft")
    parser.add_argument("--reward-guidance", type=float, help="γ of `evaluate`: guidance by the reward's gradient")
    parser.add_argument("--eta", type=float, help="η of the steering in `evaluate`; by default the solver's own")
    parser.add_argument("--large", default="scenes-large", help="larger model of `steering`, where there is one")
    parser.add_argument(
        "--only", nargs="*", default=[], help="runs of `finetuning`, or recipes of `pilot`, by the start of their names"
    )
    parser.add_argument("--json", type=Path, help="copy of the figures; by default --out/STAGE.json")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    run, _ = STAGES[options.stage]
    run(options)


def _autoencoder(options: argparse.Namespace) -> None:
    from steer.apps.scenes.training import autoencoder_accuracy, train_autoencoder

    vae = train_autoencoder(options.out / "autoencoder", options.steps or 2500, options.device)
    print(f"{autoencoder_accuracy(vae):.2%} of fresh scenes pass after the autoencoder")


def _denoiser(options: argparse.Namespace) -> None:
    from diffusers import AutoencoderKL

    from steer.apps.scenes.training import RECIPES, train_denoiser

    vae = AutoencoderKL.from_pretrained(options.vae or options.out / "autoencoder" / "vae").eval()
    train_denoiser(options.out / "denoiser", vae, RECIPES[options.size], options.steps or 85_000, start=options.start)


def _checkpoint(options: argparse.Namespace) -> None:
    from diffusers import AutoencoderKL

    from steer.apps.scenes.training import RECIPES, save_checkpoint

    vae = AutoencoderKL.from_pretrained(options.vae or options.out / "autoencoder" / "vae").eval()
    save_checkpoint(options.out / "denoiser", vae, RECIPES[options.size], options.model)


def _pilot(options: argparse.Namespace) -> None:
    from diffusers import AutoencoderKL

    from steer.apps.scenes.training import pilot

    vae = AutoencoderKL.from_pretrained(options.vae or options.out / "autoencoder" / "vae").eval()
    pilot(options.out / "pilot", vae, options.seconds, options.only)


def _check(options: argparse.Namespace) -> None:
    from diffusers import AutoencoderKL

    from steer.apps.scenes.training import autoencoder_accuracy

    vae = AutoencoderKL.from_pretrained(options.model / "vae").to(options.device).eval()
    print(f"{autoencoder_accuracy(vae):.2%} of fresh scenes pass after the autoencoder")


def _export(options: argparse.Namespace) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(options.out / options.trained / "pipeline")
    pipe.unet.half()
    pipe.vae.half()
    pipe.save_pretrained(options.model)


def _captions(options: argparse.Namespace) -> None:
    from steer.apps.scenes.preferences import new_clip_folder, write_captions

    new_clip_folder(options.out / "clip-new")
    write_captions(options.out / "captions.parquet", 40_000)


def _pairs(options: argparse.Namespace) -> None:
    from steer.apps.scenes.preferences import IMAGES_PER_PROMPT, sample_prompts, trained_prompts, write_pairs

    folder = options.out / "samples"
    list(sample_prompts(folder, str(options.model), trained_prompts(1760), IMAGES_PER_PROMPT))
    print(json.dumps(write_pairs(folder, options.out)))


def _many(options: argparse.Namespace) -> None:
    from steer.apps.scenes.preferences import sample_prompts

    list(sample_prompts(options.out / "many", str(options.model), prompts_of(options, 48), 256))


def _turbo(options: argparse.Namespace) -> None:
    from steer.apps.scenes.distil import distil

    distil(options.out / "turbo", options.model, options.steps or 10_000)


def _tiny_vae(options: argparse.Namespace) -> None:
    from steer.apps.scenes.distil import train_tiny_decoder

    train_tiny_decoder(options.out / "tiny-vae", options.model, options.steps or 7000)


def _text(options: argparse.Namespace) -> None:
    from steer.apps.scenes.text import parse_rate, train_text

    pipe = train_text(options.out / "text", options.steps or 6000, options.start)
    print(f"{parse_rate(pipe):.2%} of samples at 20 steps parse")


def _prompts(options: argparse.Namespace) -> None:
    from steer.apps.scenes.world import write_prompt_lists

    write_prompt_lists(options.prompts)


def _analysis(name: str) -> Callable[[argparse.Namespace], None]:
    """Return the stage that runs an analysis of `steer.apps.scenes.analyses`."""

    def run(options: argparse.Namespace) -> None:
        from steer.apps.scenes.analyses import ANALYSES

        figures = ANALYSES[name](options)
        write_figures(options, figures)
        print(json.dumps(figures, indent=1))

    return run


ANALYSIS_STAGES: dict[str, Stage] = {
    "foresight": (_analysis("foresight"), "how well the reward of x̂0 at each step predicts the final one, to --json"),
    "curves": (_analysis("curves"), "best-of-n of `many`'s images by --reward and others, to --json and a picture"),
    "reno-then": (_analysis("reno-then"), "whether optimised noise serves the multi-step model, to --json"),
}
STAGES = (
    {
        "autoencoder": (_autoencoder, "train the autoencoder and whiten its latents"),
        "denoiser": (_denoiser, "train the denoiser and its text encoder on those latents"),
        "checkpoint": (
            _checkpoint,
            "write the averaged weights of an unfinished `denoiser` to --model; --start resumes it",
        ),
        "pilot": (_pilot, "compare recipes for the denoiser at equal processor time (--seconds, --only)"),
        "check": (_check, "share of fresh scenes that pass after the autoencoder"),
        "export": (_export, "write the finished pipeline to --model, UNet and autoencoder in half precision"),
        "captions": (_captions, "write 40,000 drawn scenes with captions, and a new CLIP's configuration"),
        "pairs": (_pairs, "sample four images of 1,760 trained prompts and let noisy annotators choose between them"),
        "many": (_many, "sample 256 images of 48 prompts of --list, or of --count"),
        "turbo": (
            _turbo,
            "distil --model to few steps; `export --trained turbo --model assets/scenes-turbo` writes it",
        ),
        "tiny-vae": (_tiny_vae, "train a small autoencoder for previews of --model's latents; its folder is the asset"),
        "text": (_text, "train scenes-text on the words of the prompts; its folder is the asset"),
        "prompts": (_prompts, "write the prompt lists to --prompts"),
    }
    | STUDIES
    | ANALYSIS_STAGES
)

if __name__ == "__main__":
    main()
