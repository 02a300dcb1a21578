"""The job behind `steer sample`: prompts in, a folder of images and a report out; it goes on where it stopped."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from steer.apps.errors import errors_named, refusal
from steer.apps.methods import METHODS, ComputeOptions, Job, SampleSettings
from steer.apps.models import adapter_applied, find_adapter, load_pipeline
from steer.apps.plots import Frames, draw_ancestry, draw_grid, draw_progress
from steer.apps.processes import Processes, processes
from steer.apps.prompts import (
    PromptRow,
    asked_of,
    asked_settings,
    check_prompt,
    note_unused,
    unused_columns,
    used_columns,
)
from steer.apps.recipes import Recipe, recipe_of, write_png
from steer.apps.reward_specs import reward_here
from steer.errors import InputError
from steer.files import summed, unsummed, write_text
from steer.pipelines.base import Cost, Iteration, SteeringOutput


@dataclass(frozen=True)
class Picture:
    """A finished image: a PNG that holds its recipe."""

    path: Path
    recipe: Recipe


def base_of(job: Job, output: SteeringOutput) -> SteeringOutput | None:
    """The images of the same seed without steering and finetuned weights, in slot order, where they were asked for."""
    plain = job.settings.lora is None
    if not job.settings.compare or (plain and job.settings.method == "base"):
        return None
    if plain and job.settings.method == "best-of-n":
        return output.in_slot_order()  # the batch that it sorted is the base batch itself
    with job.adapter_disabled():
        return job.run("base")


def written(job: Job, output: SteeringOutput, folder: Path, prefix: str = "", base: bool = False) -> Iterator[Picture]:
    """Writes the images of an output, in their order: PREFIX00.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, image in enumerate(output.images):
        picture = Picture(folder / f"{prefix}{rank:02d}.png", recipe_of(job, output, rank, base))
        write_png(image, picture.path, picture.recipe)
        yield picture


Report = dict[str, Any]
Entry = dict[str, Any]
REPORT, FINISHED = "report.json", "finished"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class Record:
    """The entries of the prompts that are finished, by their number in the list.

    told  what report.json says beside them: model, method, settings
    """

    out: Path
    told: Report
    entries: dict[int, Entry]

    def missing(self, count: int, animation: bool) -> list[int]:
        """The numbers, of `count` prompts, whose entry or one of whose files is not there, or cut off."""
        return [n for n in range(count) if not _whole(self.entries.get(n, {}), self.out, animation)]

    def keep(self, number: int, entry: Entry, alone: bool) -> None:
        """Writes the entry of a finished prompt: to report.json where this process is alone, else beside it."""
        self.entries[number] = entry
        part = self.out / FINISHED / f"{number:05d}.json"
        if alone:
            self.save()
            part.unlink(missing_ok=True)
        else:
            write_text(part, summed(self.told | {"number": number, "prompts": [entry]}))

    def save(self) -> Report:
        """Writes report.json, as far as no prompt is missing in between, and returns it."""
        entries: list[Entry] = []
        while len(entries) in self.entries:
            entries.append(self.entries[len(entries)])
        report = self.told | {"prompts": entries, "cost": total_cost(entries)}
        write_text(self.out / REPORT, summed(report))
        return report

    def merged(self, count: int) -> Report:
        """The report of all `count` prompts, on disk too, where there is now no other record of them.

        Raises InputError where one is not there.
        """
        self.entries.update(_finished_elsewhere(self.out, self.told["settings"]))
        report = self.save()
        if len(report["prompts"]) < count:
            raise InputError(
                f"--out {self.out} lacks prompt {len(report['prompts']) + 1} of {count}: processes on several machines "
                "need one folder that all of them see"
            )
        shutil.rmtree(self.out / FINISHED, ignore_errors=True)
        return report


def open_record(
    out: Path, prompts: Sequence[str], settings: SampleSettings, columns: Sequence[Mapping[str, Any]] = ()
) -> Record:
    """The record in `out` as far as it got, or a new one.

    columns  of each prompt's row
    Raises InputError where the folder cannot take this run.
    """
    check_writable(out)
    path = out / REPORT
    given = asdict(settings)
    told: Report = {"model": settings.model, "method": settings.method}
    entries: dict[int, Entry] = {}
    if path.exists():
        old = _read(path, out, given)
        told |= {name: value for name, value in old.items() if name not in ("prompts", "cost")}
        entries.update(enumerate(old["prompts"]))
    entries.update(_finished_elsewhere(out, given))
    for number, entry in entries.items():
        if number >= len(prompts) or not isinstance(entry, dict) or entry.get("prompt") != prompts[number]:
            raise InputError(f"--out {out} holds a run of other prompts; choose another --out")
        if (dict(columns[number]) if columns else {}) != entry.get("columns", {}):
            raise InputError(f"--out {out} holds a run with other columns of prompt {number + 1}; choose another --out")
        if not _is_entry(entry):
            raise InputError(f"--out {out}: prompt {number + 1} in its report is none of steer; choose another --out")
    return Record(out, told | {"settings": given}, entries)


def check_writable(out: Path) -> None:
    """Makes the folder. Raises InputError where nothing can be written to it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / ".writable", "")
        (out / ".writable").unlink()
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there ({error.strerror})") from error


@contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """What the disk refuses inside ends as an InputError that names the folder."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"--out {out}: {refusal(error)}; finished prompts are kept, the same command goes on"
        ) from error


def total_cost(entries: Sequence[Entry]) -> dict[str, float]:
    """Over all prompts; older entries count no gradients."""
    return {cost.name: sum(entry["cost"].get(cost.name, 0) for entry in entries) for cost in fields(Cost)}


def _finished_elsewhere(out: Path, given: Mapping[str, Any]) -> dict[int, Entry]:
    """Entries that are not merged yet. Raises InputError for those of another run."""
    found: dict[int, Entry] = {}
    for path in sorted((out / FINISHED).glob("*.json")):
        part = _read(path, out, given)
        if type(number := part.get("number")) is not int or len(part["prompts"]) != 1:
            raise InputError(f"{path} is not a report of steer; choose another --out")
        found[number] = part["prompts"][0]
    return found


def _read(path: Path, out: Path, given: Mapping[str, Any]) -> Report:
    """A report in `out`, or one of a single prompt. Raises InputError where it is none, or of other settings."""
    try:
        old = unsummed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--out {out}: cannot read {path.name} ({error.strerror})") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a report of steer ({error}); choose another --out") from error
    if not (isinstance(old, dict) and isinstance(old.get("settings"), dict) and isinstance(old.get("prompts"), list)):
        raise InputError(f"{path} is not a report of steer; choose another --out")
    younger = {one.name: one.default for one in fields(SampleSettings) if one.default is not MISSING}
    for name, value in given.items():
        if (there := (younger | old["settings"]).get(name)) != value:
            raise InputError(
                f"--out {path.parent} holds a run with {name} {there!r}, not {value!r}; choose another --out"
            )
    return old


def _is_entry(entry: Entry) -> bool:
    """Whether what is read of it here has the kinds that steer writes."""
    base, cost = entry.get("base", {}), entry.get("cost")
    if not isinstance(base, dict) or not isinstance(cost, dict):
        return False
    lists = (entry.get("images", []), base.get("images", []))
    return all(isinstance(one, list) for one in lists) and all(type(one) in (int, float) for one in cost.values())


def _whole(entry: Entry, out: Path, animation: bool) -> bool:
    """Whether all files of an entry are there to their ends, inside the output folder."""
    names = [*entry.get("images", [None]), *entry.get("base", {}).get("images", [])]
    names += [entry["noise"]] if "noise" in entry else []
    names += [entry.get("animation")] if animation else []
    return all(isinstance(name, str) and ".." not in name and _ends(out / name) for name in names)


def _ends(path: Path) -> bool:
    """Whether a file is there, and a PNG to its end, which a power cut or a broken copy may have taken."""
    if not os.path.isfile(path) or not path.stat().st_size:  # which a name that is too long is not, to Path an error
        return False
    with path.open("rb") as file:
        file.seek(-min(len(PNG_END), path.stat().st_size), os.SEEK_END)
        return path.suffix != ".png" or file.read() == PNG_END


SEARCH, FRAMES = "search.safetensors", "frames"  # of a prompt that is not finished
LESS = "fewer particles need less"


def sample(
    prompts: Sequence[str | PromptRow],
    settings: SampleSettings,
    out: Path,
    device: str | None = None,
    reward_timeout: float | None = None,
    animation: bool = False,
    faster: ComputeOptions | None = None,
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
        faster = faster or ComputeOptions()
        faster.check()
        rows = [_checked(row, settings) for row in prompts]
        if animation and not METHODS[settings.method].iterates:
            raise InputError(f"--animation shows iterations, and --method {settings.method} has none: leave it out")
        reward = reward_here(settings.reward, reward_timeout)
        METHODS[settings.method].check(settings, reward)
        if settings.lora is not None:
            find_adapter(settings.lora)
    record, todo = here.from_main(lambda: _opened(out, rows, settings, animation))
    if todo:
        with here.main_first():
            pipe = load_pipeline(settings.model, here.device(device), settings.dtype, **settings.loading)
        pipe.set_progress_bar_config(leave=False, desc="steps", disable=None if here.is_main else True)
        asked = asked_of(rows, settings, pipe)
        note_unused("prompts", unused_columns(rows, used_columns(pipe)))
        with adapter_applied(pipe, settings.lora) as off:
            for n in _shared(todo, here, settings.method, len(rows)):
                one, folder = asked[n], out / f"{n:03d}-{_slug(rows[n].prompt)}"
                job = Job(pipe, reward, one.prompt, one.settings, folder / SEARCH, adapter_disabled=off, faster=faster)
                entry = _finished_entry(replace(job, arguments=one.arguments), folder, animation) | _columns(rows[n])
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


def _finished_entry(job: Job, folder: Path, animation: bool) -> Entry:
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
        "components": {name: scores[0].tolist() for name, scores in output.components.items()},
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
        "parts": {name: rows([one.components[name] for one in iterations]) for name in iterations[0].components},
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
