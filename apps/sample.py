"""The job behind `steer sample`: prompts in, a folder of images and a report out; it goes on where it stopped."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from steer.apps.models import load_pipeline
from steer.apps.pictures import draw_ancestry, draw_grid
from steer.apps.specs import reward_here
from steer.choices import choose
from steer.errors import InputError
from steer.pipelines import BestOfNPipeline, FKSteeringPipeline, SteeringOutput
from steer.potentials import POTENTIALS, TEMPERINGS
from steer.resampling import RESAMPLERS
from steer.reward import Reward

Report = dict[str, Any]


@dataclass(frozen=True)
class SampleSettings:
    """What decides the images. Saved in the report, and compared when a run goes on."""

    model: str
    method: str
    reward: str
    particles: int
    steps: int | None
    guidance: float | None
    lam: float
    potential: str
    resampler: str
    tempering: str
    ess_threshold: float
    eta: float | None
    seed: int
    compare: bool
    dtype: str | None

    def check(self) -> None:
        """Raises InputError for a name or number that cannot be, before any model is loaded."""
        choose("method", self.method, METHODS)
        choose("potential", self.potential, POTENTIALS)
        choose("resampler", self.resampler, RESAMPLERS)
        choose("tempering", self.tempering, TEMPERINGS)
        if self.particles < 1:
            raise InputError(f"--particles must be at least 1, got {self.particles}")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"--steps must be at least 1, got {self.steps}")
        if not 0 < self.ess_threshold <= 1:
            raise InputError(f"--ess-threshold must be above 0 and at most 1, got {self.ess_threshold}")
        for name, number in (("--lam", self.lam), ("--guidance", self.guidance)):
            if number is not None and not math.isfinite(number):
                raise InputError(f"{name} must be a finite number, got {number}")

    @property
    def call(self) -> dict[str, Any]:
        """What every method is called with; None stands for the default."""
        return {
            "num_particles": self.particles,
            "eta": self.eta,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
        }


def sample(
    prompts: Sequence[str],
    settings: SampleSettings,
    out: Path,
    device: str | None = None,
    reward_timeout: float | None = None,
) -> Report:
    """Steers every prompt, writes images, grid.png, ancestry.png and report.json to `out`, and returns the report.

    After each prompt the report on disk is whole; the same call again does only what is missing. Each prompt
    has the same seed, so that its images do not depend on its place in the list.
    """
    settings.check()
    reward = reward_here(settings.reward, reward_timeout)
    report = _opened(out, prompts, settings)
    entries = report["prompts"]
    todo = [n for n in range(len(prompts)) if n >= len(entries) or not _whole(entries[n], out)]
    if todo:
        pipe = load_pipeline(settings.model, device, settings.dtype)
        pipe.set_progress_bar_config(leave=False, desc="denoising", disable=None)
        done = len(prompts) - len(todo)
        for n in tqdm(todo, desc=settings.method, unit="prompt", initial=done, total=len(prompts), disable=None):
            entries[n : n + 1] = [_finished(pipe, reward, prompts[n], settings, out / f"{n:03d}-{_slug(prompts[n])}")]
            report["cost"] = _total_cost(entries)
            _save(report, out)
    draw_grid(report, out)
    draw_ancestry(report, out)
    return report


def _finished(pipe: Any, reward: Reward, prompt: str, settings: SampleSettings, folder: Path) -> dict[str, Any]:
    """One prompt's entry. What diffusers refuses, memory or the disk end as an InputError that names the prompt."""
    try:
        return _sampled(pipe, reward, prompt, settings, folder)
    except InputError:
        raise
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"prompt {prompt!r}: {reason} (finished prompts are kept)") from error


def _fk(pipe: Any, reward: Reward, prompt: str, settings: SampleSettings, call: dict[str, Any]) -> SteeringOutput:
    return FKSteeringPipeline(pipe, reward)(
        prompt,
        lam=settings.lam,
        potential=settings.potential,
        resampler=settings.resampler,
        tempering=settings.tempering,
        ess_threshold=settings.ess_threshold,
        **call,
    )


def _best_of_n(
    pipe: Any, reward: Reward, prompt: str, settings: SampleSettings, call: dict[str, Any]
) -> SteeringOutput:
    return BestOfNPipeline(pipe, reward)(prompt, **call)


def _base(pipe: Any, reward: Reward, prompt: str, settings: SampleSettings, call: dict[str, Any]) -> SteeringOutput:
    return BestOfNPipeline(pipe, reward)(prompt, **call).in_slot_order()


METHODS = {"fk": _fk, "best-of-n": _best_of_n, "base": _base}


def _sampled(pipe: Any, reward: Reward, prompt: str, settings: SampleSettings, folder: Path) -> dict[str, Any]:
    """One prompt: its images on disk, and its entry in the report."""

    def run(method: str) -> SteeringOutput:
        call = {name: value for name, value in settings.call.items() if value is not None}
        return METHODS[method](
            pipe, reward, prompt, settings, call | {"generator": torch.Generator().manual_seed(settings.seed)}
        )

    output = run(settings.method)
    entry = {
        "prompt": prompt,
        "images": _write_images(output.images, folder, ""),
        "rewards": output.rewards[0].tolist(),
        "parts": {name: scores[0].tolist() for name, scores in output.parts.items()},
        "log_weights": output.log_weights[0].tolist(),
        "log_normaliser": output.log_normaliser[0].item(),
        "ess": [value[0].item() for value in output.ess],
        "ancestors": [value[0].tolist() for value in output.ancestors],
        "steps": [evaluation.step for evaluation in output.history],
        "step_rewards": [evaluation.rewards[0].tolist() for evaluation in output.history],
        "order": output.order[0].tolist(),
        "cost": asdict(output.cost),
    }
    if settings.compare and settings.method != "base":
        # The batch that best-of-n sorted is the base batch itself.
        base = output.in_slot_order() if settings.method == "best-of-n" else run("base")
        entry["base"] = {"images": _write_images(base.images, folder, "base-"), "rewards": base.rewards[0].tolist()}
    return entry


def _write_images(images: Sequence[Image.Image], folder: Path, prefix: str) -> list[str]:
    """Saves images in order; their names from the output folder on."""
    if not all(isinstance(image, Image.Image) for image in images):
        raise InputError("this model makes videos: call steer.pipelines from Python, `steer sample` writes images")
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{prefix}{number:02d}.png" for number in range(len(images))]
    for name, image in zip(names, images, strict=True):
        image.save(folder / name)
    return [f"{folder.name}/{name}" for name in names]


def _slug(prompt: str) -> str:
    return re.sub("[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].rstrip("-")


def _total_cost(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {
        name: sum(entry["cost"][name] for entry in entries) for name in ("nfe", "decodes", "reward_calls", "seconds")
    }


def _opened(out: Path, prompts: Sequence[str], settings: SampleSettings) -> Report:
    """The report in `out` as far as it got, or a new one. Raises InputError where the folder cannot take this run."""
    path = out / "report.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        _save_text("", out / ".writable")
        (out / ".writable").unlink()
        old = json.loads(path.read_text()) if path.exists() else None
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path} is not a report of steer ({error}); choose another --out") from error
    if not path.exists():
        given = {"model": settings.model, "method": settings.method, "settings": asdict(settings)}
        return given | {"prompts": [], "cost": _total_cost([])}
    if not (isinstance(old, dict) and isinstance(old.get("settings"), dict) and isinstance(old.get("prompts"), list)):
        raise InputError(f"{path} is not a report of steer; choose another --out")
    for name, value in asdict(settings).items():
        if (there := old["settings"].get(name)) != value:
            raise InputError(f"--out {out} holds a run with {name} {there!r}, not {value!r}; choose another --out")
    before = [entry.get("prompt") if isinstance(entry, dict) else None for entry in old["prompts"]]
    if before != list(prompts[: len(before)]):
        raise InputError(f"--out {out} holds a run of other prompts; choose another --out")
    return old


def _whole(entry: dict[str, Any], out: Path) -> bool:
    """Whether all images of an entry are there, inside the output folder."""
    names = [*entry.get("images", [None]), *entry.get("base", {}).get("images", [])]
    return all(isinstance(name, str) and ".." not in name and (out / name).is_file() for name in names)


def _save(report: Report, out: Path) -> None:
    _save_text(json.dumps(report, indent=1), out / "report.json")


def _save_text(text: str, path: Path) -> None:
    """All of the file or, after a crash, all of the one before."""
    staged = path.with_name(path.name + ".new")
    with staged.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
