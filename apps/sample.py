"""The job behind `steer sample`: prompts in, a folder of images and a report out; it goes on where it stopped."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from steer.apps.adapters import find_finetuned, wearing
from steer.apps.animation import Frames
from steer.apps.faster import Faster
from steer.apps.finished import base_of, written
from steer.apps.methods import METHODS, Job
from steer.apps.models import load_pipeline
from steer.apps.named_errors import errors_named
from steer.apps.pictures import draw_ancestry, draw_grid
from steer.apps.processes import Processes, processes
from steer.apps.progress import draw_progress
from steer.apps.prompt_arguments import asked_of, asked_settings, used_columns
from steer.apps.prompt_rows import PromptRow
from steer.apps.prompts import check_prompt, note_unused, unused_columns
from steer.apps.sample_record import Entry, Record, Report, open_record, writing_to
from steer.apps.sample_settings import SampleSettings
from steer.apps.specs import reward_here
from steer.errors import InputError
from steer.pipelines import Iteration, SteeringOutput

SEARCH, FRAMES = "search.safetensors", "frames"  # of a prompt that is not finished
LESS = "fewer particles need less"


def sample(
    prompts: Sequence[str | PromptRow],
    settings: SampleSettings,
    out: Path,
    device: str | None = None,
    reward_timeout: float | None = None,
    animation: bool = False,
    faster: Faster | None = None,
) -> Report:
    """Steers every prompt, writes images, pictures and report.json to `out`, and returns the report.

    After each prompt what is on disk is whole; the same call again does only what is missing. Each prompt has the same
    seed, so that its images do not depend on its place in the list, nor on which of several processes makes them; of
    equal prompts the n-th has seed + n. Columns of a row that are named after arguments of the pipeline are its own.
    The processes share what is missing, and the main one merges and draws. With `animation`, a film of each noise
    optimisation.
    """
    here = processes()
    with here.main_first():
        settings.check()
        faster = faster or Faster()
        faster.check()
        rows = [_checked(row, settings) for row in prompts]
        if animation and not METHODS[settings.method].iterates:
            raise InputError(f"--animation shows iterations, and --method {settings.method} has none: leave it out")
        reward = reward_here(settings.reward, reward_timeout)
        METHODS[settings.method].check(settings, reward)
        if settings.lora is not None:
            find_finetuned(settings.lora)
    record, todo = here.from_main(lambda: _opened(out, rows, settings, animation))
    if todo:
        with here.main_first():
            pipe = load_pipeline(settings.model, here.device(device), settings.dtype, **settings.loading)
        pipe.set_progress_bar_config(leave=False, desc="steps", disable=None if here.is_main else True)
        asked = asked_of(rows, settings, pipe)
        note_unused("prompts", unused_columns(rows, used_columns(pipe)))
        with wearing(pipe, settings.lora) as off:
            for n in _shared(todo, here, settings.method, len(rows)):
                one, folder = asked[n], out / f"{n:03d}-{_slug(rows[n].prompt)}"
                job = Job(pipe, reward, one.prompt, one.settings, folder / SEARCH, unworn=off, faster=faster)
                entry = _finished(replace(job, arguments=one.arguments), folder, animation) | _columns(rows[n])
                with writing_to(out):
                    record.keep(n, entry, here.count == 1)
                    _clean(folder)
                _stop_with(entry, record, here)
    here.wait()
    with writing_to(out):
        report = here.from_main(lambda: record.merged(len(rows)))
        if here.is_main:
            _draw(report, out)
    return report


def _checked(row: str | PromptRow, settings: SampleSettings) -> PromptRow:
    """A row that can be sampled, as far as that is known without the model. Raises InputError."""
    made = row if isinstance(row, PromptRow) else PromptRow(row)
    check_prompt(made.prompt, "prompt")
    asked_settings(made, settings)
    return made


def _columns(row: PromptRow) -> Entry:
    """The other columns of a row, for the report."""
    return {"columns": dict(row.columns)} if row.columns else {}


def _opened(
    out: Path, rows: Sequence[PromptRow], settings: SampleSettings, animation: bool
) -> tuple[Record, list[int]]:
    """The record of `out`, and which prompts it lacks."""
    record = open_record(out, [row.prompt for row in rows], settings, [row.columns for row in rows])
    return record, record.missing(len(rows), animation)


def _shared(todo: Sequence[int], here: Processes, method: str, count: int) -> Iterator[int]:
    """This process's part of what is to be done, of `count` prompts; the main process shows how far it is with its."""
    mine = [todo[place] for place in here.share(len(todo))]
    if here.count == 1:
        yield from tqdm(mine, method, initial=count - len(todo), total=count, unit="prompt", disable=None)
    else:
        about = f"{method}, 1 of {here.count} processes"
        yield from tqdm(mine, about, unit="prompt", disable=None if here.is_main else True)


def _draw(report: Report, out: Path) -> None:
    draw_grid(report, out)
    (draw_progress if METHODS[report["method"]].iterates else draw_ancestry)(report, out)


def _stop_with(entry: Entry, record: Record, here: Processes) -> None:
    """Raises InputError where the run of this prompt ended before its time, with all that there is on disk."""
    if entry.get("stopped"):
        if here.count == 1:
            with writing_to(record.out):
                _draw(record.save(), record.out)
        raise InputError(
            f"prompt {entry['prompt']!r}: {entry['stopped']}; its best images so far are kept, the same command goes "
            "on after it"
        )


def _finished(job: Job, folder: Path, animation: bool) -> Entry:
    """One prompt: its images on disk, and its entry in the report. Raises InputError that names the prompt."""
    with errors_named(f"prompt {job.prompt!r}", "finished prompts are kept", LESS):
        return _sampled(job, folder, animation)


def _sampled(job: Job, folder: Path, animation: bool) -> Entry:
    frames = Frames(folder / FRAMES)
    output = (replace(job, on_iteration=frames.keep) if animation else job).run()
    entry: Entry = {
        "prompt": job.prompt,
        "images": _write_images(output, job, folder),
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
    entry |= _flagged(output)
    if output.start is not None:
        entry |= {"seeds": list(output.start.seeds), "noise": _write_noise(output, job, folder)}
        entry |= {"trace": _trace(output.trace), "stopped": output.stopped}
    if animation:
        frames.write(entry, output.images[0], folder / "progress.gif")
        entry["animation"] = f"{folder.name}/progress.gif"
    if (base := base_of(job, output)) is not None:
        entry["base"] = {"images": _write_images(base, job, folder, base=True), "rewards": base.rewards[0].tolist()}
        entry["base"] |= _flagged(base)
    return entry


def _flagged(output: SteeringOutput) -> dict[str, list[bool]]:
    """Which images the safety checker blackened, where the pipeline has one; their rewards are of before."""
    flags = output.nsfw_content_detected
    return {} if flags is None else {"nsfw_content_detected": flags[0].tolist()}


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


def _write_images(output: SteeringOutput, job: Job, folder: Path, base: bool = False) -> list[str]:
    """Saves images in order, each with its recipe; their names from the output folder on."""
    pictures = written(job, output, folder, "base-" if base else "", base)
    return [f"{folder.name}/{picture.path.name}" for picture in pictures]


def _slug(prompt: str) -> str:
    return re.sub("[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].rstrip("-")
