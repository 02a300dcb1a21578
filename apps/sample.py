"""The job behind `steer sample`: prompts in, a folder of images and a report out; it goes on where it stopped."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm.auto import tqdm

from steer.apps.animation import Frames
from steer.apps.methods import METHODS, Job, SampleSettings
from steer.apps.models import load_pipeline
from steer.apps.pictures import draw_ancestry, draw_grid
from steer.apps.progress import draw_progress
from steer.apps.specs import reward_here
from steer.errors import InputError
from steer.pipelines import Cost, Iteration, SteeringOutput
from steer.staged import write_text

__all__ = ["SampleSettings", "sample"]

Report = dict[str, Any]
Entry = dict[str, Any]
SEARCH, FRAMES = "search.safetensors", "frames"  # of a prompt that is not finished


def sample(
    prompts: Sequence[str],
    settings: SampleSettings,
    out: Path,
    device: str | None = None,
    reward_timeout: float | None = None,
    animation: bool = False,
) -> Report:
    """Steers every prompt, writes images, pictures and report.json to `out`, and returns the report.

    After each prompt the report on disk is whole; the same call again does only what is missing. Each prompt
    has the same seed, so that its images do not depend on its place in the list. With `animation`, a film of each
    noise optimisation.
    """
    settings.check()
    if animation and not METHODS[settings.method].iterates:
        raise InputError(f"--animation shows iterations, and --method {settings.method} has none: leave it out")
    reward = reward_here(settings.reward, reward_timeout)
    METHODS[settings.method].check(settings, reward)
    report = _opened(out, prompts, settings)
    entries = report["prompts"]
    todo = [n for n in range(len(prompts)) if n >= len(entries) or not _whole(entries[n], out, animation)]
    if todo:
        pipe = load_pipeline(settings.model, device, settings.dtype)
        pipe.set_progress_bar_config(leave=False, desc="steps", disable=None)
        done = len(prompts) - len(todo)
        for n in tqdm(todo, desc=settings.method, unit="prompt", initial=done, total=len(prompts), disable=None):
            folder = out / f"{n:03d}-{_slug(prompts[n])}"
            job = Job(pipe, reward, prompts[n], settings, folder / SEARCH)
            entries[n : n + 1] = [_finished(job, folder, animation)]
            report["cost"] = _total_cost(entries)
            _save(report, out)
            _clean(folder)
            _stop_with(entries[n], report, out)
    _draw(report, out)
    return report


def _draw(report: Report, out: Path) -> None:
    draw_grid(report, out)
    (draw_progress if METHODS[report["method"]].iterates else draw_ancestry)(report, out)


def _stop_with(entry: Entry, report: Report, out: Path) -> None:
    """Raises InputError where the run of this prompt ended before its time, with all that there is on disk."""
    if entry.get("stopped"):
        _draw(report, out)
        raise InputError(
            f"prompt {entry['prompt']!r}: {entry['stopped']}; its best images so far are kept, the same command goes "
            "on after it"
        )


def _finished(job: Job, folder: Path, animation: bool) -> Entry:
    """One prompt's entry. What diffusers refuses, memory or the disk end as an InputError that names the prompt."""
    try:
        return _sampled(job, folder, animation)
    except InputError:
        raise
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"prompt {job.prompt!r}: {reason} (finished prompts are kept)") from error


def _sampled(job: Job, folder: Path, animation: bool) -> Entry:
    """One prompt: its images on disk, and its entry in the report."""
    settings, frames = job.settings, Frames(folder / FRAMES)
    output = METHODS[settings.method].run(replace(job, on_iteration=frames.keep) if animation else job)
    entry: Entry = {
        "prompt": job.prompt,
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
    if output.start is not None:
        entry |= {"seeds": list(output.start.seeds), "noise": _write_noise(output, job, folder)}
        entry |= {"trace": _trace(output.trace), "stopped": output.stopped}
    if animation:
        frames.write(entry, output.images[0], folder / "progress.gif")
        entry["animation"] = f"{folder.name}/progress.gif"
    if settings.compare and settings.method != "base":
        # The batch that best-of-n sorted is the base batch itself.
        base = output.in_slot_order() if settings.method == "best-of-n" else METHODS["base"].run(job)
        entry["base"] = {"images": _write_images(base.images, folder, "base-"), "rewards": base.rewards[0].tolist()}
    return entry


def _trace(iterations: Sequence[Iteration]) -> dict[str, Any]:
    """Numbers by iteration and slot, with as many digits as fp32 has."""

    def rows(values: Sequence[torch.Tensor]) -> list[list[float]]:
        return [[float(f"{number:.7g}") for number in value[0].tolist()] for value in values]

    return {
        "rewards": rows([one.rewards for one in iterations]),
        "norms": rows([one.norms for one in iterations]),
        "best": rows([one.best for one in iterations]),
        "parts": {name: rows([one.parts[name] for one in iterations]) for name in iterations[0].parts},
    }


def _write_noise(output: SteeringOutput, job: Job, folder: Path) -> str:
    """Saves the noise of each image, in their order, with all that the plain pipeline needs to make them again."""
    assert output.start is not None, "of an optimised noise"
    call = {name: value for name, value in job.call.items() if name not in ("generator", "num_particles")}
    told = {"model": job.settings.model, "prompt": job.prompt, "call": call, "seeds": output.start.seeds}
    folder.mkdir(parents=True, exist_ok=True)
    # One text, because safetensors writes several in any order, and the same run is to give the same bytes.
    metadata = {"start": json.dumps(told)}
    save_file({"noise": output.start.noise.cpu().contiguous()}, folder / "noise.safetensors", metadata)
    return f"{folder.name}/noise.safetensors"


def _clean(folder: Path) -> None:
    """Removes what only an unfinished prompt needs."""
    (folder / SEARCH).unlink(missing_ok=True)
    shutil.rmtree(folder / FRAMES, ignore_errors=True)


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


def _total_cost(entries: Sequence[Entry]) -> dict[str, float]:
    """Over all prompts; older entries count no gradients."""
    return {cost.name: sum(entry["cost"].get(cost.name, 0) for entry in entries) for cost in fields(Cost)}


def _opened(out: Path, prompts: Sequence[str], settings: SampleSettings) -> Report:
    """The report in `out` as far as it got, or a new one. Raises InputError where the folder cannot take this run."""
    path = out / "report.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / ".writable", "")
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
    younger = {one.name: one.default for one in fields(SampleSettings) if one.default is not MISSING}
    for name, value in asdict(settings).items():
        if (there := (younger | old["settings"]).get(name)) != value:
            raise InputError(f"--out {out} holds a run with {name} {there!r}, not {value!r}; choose another --out")
    before = [entry.get("prompt") if isinstance(entry, dict) else None for entry in old["prompts"]]
    if before != list(prompts[: len(before)]):
        raise InputError(f"--out {out} holds a run of other prompts; choose another --out")
    return old | {"settings": asdict(settings)}


def _whole(entry: Entry, out: Path, animation: bool) -> bool:
    """Whether all files of an entry are there, inside the output folder."""
    names = [*entry.get("images", [None]), *entry.get("base", {}).get("images", [])]
    names += [entry["noise"]] if "noise" in entry else []
    names += [entry.get("animation")] if animation else []
    return all(isinstance(name, str) and ".." not in name and (out / name).is_file() for name in names)


def _save(report: Report, out: Path) -> None:
    write_text(out / "report.json", json.dumps(report, indent=1))
