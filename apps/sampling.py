"""The job behind `steer sample`: prompts in, images or texts and a report out. Interrupted runs resume."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from steer.apps.archives import write_archive
from steer.apps.components import check_components
from steer.apps.errors import check_writable, describe_os_error, wrap_errors
from steer.apps.expansion import is_text_model, load_expander
from steer.apps.methods import METHODS, ComputeOptions, DisableAdapter, Job
from steer.apps.models import adapter_applied, find_adapter, load_pipeline, pipeline_type
from steer.apps.plots import Frames, draw_ancestry, draw_grid, draw_progress
from steer.apps.processes import LaunchContext, launch_context
from steer.apps.prompts import (
    SETTINGS,
    PromptRow,
    SampleRequest,
    argument_names,
    call_arguments,
    check_prompt,
    check_size,
    note_unused,
    row_config,
    sample_requests,
    unused_columns,
)
from steer.apps.recipes import Recipe, make_recipe, write_png
from steer.apps.reward_specs import resolve_reward
from steer.apps.settings import SHARED, SamplingConfig, flags_of
from steer.diffusion.two_prompts import two_prompts
from steer.errors import InputError
from steer.files import dumps_with_checksum, read_image, read_json, write_text
from steer.pipelines.base import Cost, Iteration, SteeringOutput
from steer.reward import as_texts


@dataclass(frozen=True)
class SavedImage:
    """A finished image, and the recipe in its PNG."""

    path: Path
    recipe: Recipe


CONTROLS = ("base", "best_of")  # entries of a prompt beside its steered images


def base_output(job: Job, output: SteeringOutput) -> tuple[Job, SteeringOutput] | None:
    """Sample the images of the same seed without steering and finetuned weights; None if not wanted.

    Returns their job and output, in slot order. For a method with starts, as many are sampled as it finishes.
    """
    if not samples_base(job.settings):
        compared = job.settings.compare and job.settings.method == "best-of-n"
        return (job, output.in_slot_order()) if compared else None  # its batch is the base batch
    own = _control_job(job, "base", output.rewards.shape[1]) if METHODS[job.settings.method].has_starts else job
    with job.adapter_disabled():
        return own, own.run("base")


def samples_base(settings: SamplingConfig) -> bool:
    """Return whether the base images of a run are sampled in a separate batch."""
    return settings.compare and (settings.lora is not None or settings.method not in ("base", "best-of-n"))


def best_of_n(job: Job, count: int) -> tuple[Job, SteeringOutput]:
    """Sample `count` base images, and return their job and output with only the best one."""
    control = _control_job(job, "best-of-n", count, best_of=None, lora=None, noise_candidates=None)
    with job.adapter_disabled():
        return control, control.run().best(1)


def _control_job(job: Job, method: str, count: int, **changes: Any) -> Job:
    """Return a job of `count` images by another method, with the shared settings and the steps of this job."""
    own = {name: getattr(job.settings, name) for name in SHARED} | {"method": method, "particles": count} | changes
    for name, argument in (("steps", "num_inference_steps"), ("guidance", "guidance_scale")):
        if own[name] is None:
            own[name] = METHODS[job.settings.method].defaults.get(argument)
    return replace(job, settings=SamplingConfig.of(**own), on_iteration=None, state_file=None)


def write_images(
    job: Job, output: SteeringOutput, folder: Path, prefix: str = "", base: bool = False
) -> Iterator[SavedImage]:
    """Write the images of an output, in order: PREFIX00.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, image in enumerate(output.images):
        picture = SavedImage(folder / f"{prefix}{rank:02d}.png", make_recipe(job, output, rank, base))
        write_png(image, picture.path, picture.recipe)
        yield picture


Report = dict[str, Any]
Entry = dict[str, Any]
REPORT, FINISHED = "report.json", "finished"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class PartialReport:
    """The report of the finished prompts, by their index in the list.

    header  the other keys of report.json: model, method, settings
    """

    out: Path
    header: Report
    entries: dict[int, Entry]

    def missing(self, count: int, animation: bool) -> list[int]:
        """List the indices, of `count` prompts, whose entry or one of whose files is missing or truncated."""
        return [n for n in range(count) if not _is_complete(self.entries.get(n, {}), self.out, animation)]

    def keep(self, number: int, entry: Entry, single_process: bool) -> None:
        """Write the entry of a finished prompt: to report.json in a single process, else to a separate file."""
        self.entries[number] = entry
        part = self.out / FINISHED / f"{number:05d}.json"
        if single_process:
            self.save()
            part.unlink(missing_ok=True)
        else:
            write_text(part, dumps_with_checksum(self.header | {"number": number, "prompts": [entry]}))

    def save(self) -> Report:
        """Write report.json up to the first missing prompt, and return it."""
        missing = min({*range(len(self.entries) + 1)} - self.entries.keys())
        entries = [self.entries[n] for n in range(missing)]
        # Entries of older versions count no gradients.
        cost = {one.name: sum(entry["cost"].get(one.name, 0) for entry in entries) for one in fields(Cost)}
        report = self.header | {"prompts": entries, "cost": cost}
        write_text(self.out / REPORT, dumps_with_checksum(report))
        return report

    def merge(self, count: int) -> Report:
        """Merge the entries of all processes into report.json, delete their files, and return the report.

        Raises InputError for a missing prompt.
        """
        self.entries.update(_unmerged_entries(self.out, self.header["settings"]))
        report = self.save()
        if len(report["prompts"]) < count:
            raise InputError(
                f"--out {self.out} lacks prompt {len(report['prompts']) + 1} of {count}: processes on several machines "
                "must share one folder"
            )
        shutil.rmtree(self.out / FINISHED, ignore_errors=True)
        return report


def open_report(
    out: Path, prompts: Sequence[str], settings: SamplingConfig, columns: Sequence[Mapping[str, Any]] = ()
) -> PartialReport:
    """Open the report in `out`, or a new one.

    columns  columns of each prompt's row
    Raises InputError for a folder of another run.
    """
    check_writable(out)
    config = settings.plain()
    header: Report = {"model": settings.model, "method": settings.method}
    entries: dict[int, Entry] = {}
    if (out / REPORT).exists():
        old = _read(out / REPORT, config)
        header |= {name: value for name, value in old.items() if name not in ("prompts", "cost")}
        entries.update(enumerate(old["prompts"]))
    entries.update(_unmerged_entries(out, config))
    for number, entry in entries.items():
        problem = None
        if number >= len(prompts) or not isinstance(entry, dict) or entry.get("prompt") != prompts[number]:
            problem = " holds a run of other prompts"
        elif (dict(columns[number]) if columns else {}) != entry.get("columns", {}):
            problem = f" holds a run with other columns of prompt {number + 1}"
        elif not _is_valid_entry(entry):
            problem = f": prompt {number + 1} of its report is not as steer writes it"
        if problem:
            raise InputError(f"--out {out}{problem}; choose another --out")
    return PartialReport(out, header | {"settings": config}, entries)


@contextmanager
def output_errors(out: Path) -> Iterator[None]:
    """Turn errors of the disk into an InputError that names the folder."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"--out {out}: {describe_os_error(error)}; finished prompts are kept: run the command again to resume"
        ) from error


def _unmerged_entries(out: Path, config: Mapping[str, Any]) -> dict[int, Entry]:
    """Read the entries that are not merged yet. Raises InputError for entries of another run."""
    entries_by_number: dict[int, Entry] = {}
    for path in sorted((out / FINISHED).glob("*.json")):
        part = _read(path, config)
        if type(number := part.get("number")) is not int or len(part["prompts"]) != 1:
            raise InputError(f"{path} is not a report of steer; choose another --out")
        entries_by_number[number] = part["prompts"][0]
    return entries_by_number


def _read(path: Path, config: Mapping[str, Any]) -> Report:
    """Read a report, or the report of a single prompt. Raises InputError for other files or settings."""
    old = read_json(path, "a report of steer", "; choose another --out")
    if not (isinstance(old.get("settings"), dict) and isinstance(old.get("prompts"), list)):
        raise InputError(f"{path} is not a report of steer; choose another --out")
    stored = SamplingConfig.of(method=config["method"]).plain() | old["settings"]  # older reports lack some settings
    for name, value in config.items():
        if stored.get(name) != value:
            given = f"{stored.get(name)!r}, not {value!r}"
            raise InputError(f"--out {path.parent} holds a run with {name} {given}; choose another --out")
    return old


def _is_valid_entry(entry: Entry) -> bool:
    """Return whether the values used in this module have the types that steer writes."""
    sides, cost = [entry.get(side, {}) for side in CONTROLS], entry.get("cost")
    return (
        all(isinstance(side, dict) for side in sides)
        and isinstance(cost, dict)
        and all(isinstance(one.get("images", []), list) for one in (entry, *sides))
        and all(type(one) in (int, float) for one in cost.values())
    )


def _is_complete(entry: Entry, out: Path, animation: bool) -> bool:
    """Return whether all files of an entry are in the output folder, and PNGs are not truncated as by a power cut."""
    names = [*entry.get("images", [] if "texts" in entry else [None])]
    names += [name for side in CONTROLS for name in entry.get(side, {}).get("images", [])]
    names += [entry["noise"]] if "noise" in entry else []
    names += [entry.get("animation")] if animation else []
    for name in names:
        # Path.is_file raises for a name that is too long.
        if not isinstance(name, str) or ".." in name or not os.path.isfile(out / name):
            return False
        with (out / name).open("rb") as file:
            file.seek(max(os.path.getsize(out / name) - len(PNG_END), 0))
            if not (end := file.read()) or (name.endswith(".png") and end != PNG_END):
                return False
    return True


TEXTS = "texts.jsonl"
SEARCH, FRAMES = "search.safetensors", "frames"  # files of an unfinished prompt
READ = "reward_prompt"  # argument with the original of an expanded prompt, for the reward
MEMORY_HINT = "fewer particles need less"


def sample(
    prompts: Sequence[str | PromptRow],
    settings: SamplingConfig,
    out: Path,
    device: str | None = None,
    reward_timeout: float | None = None,
    animation: bool = False,
    compute_options: ComputeOptions | None = None,
    checklist: str | None = None,
) -> Report:
    """Sample every prompt, write images, figures and report.json to `out`, and return the report.

    The folder is complete after each prompt; the same call resumes an interrupted run. All prompts have the same seed,
    so that images depend neither on the order of prompts nor on the process; the n-th of equal prompts has seed + n.
    Columns of a row that are named after arguments of the pipeline set these arguments. Processes split the missing
    prompts; the main process merges and draws. `animation` writes a GIF of each noise optimisation; `checklist` is a
    reward that lists the requirements of a prompt, ticked or crossed below each image of grid.png. A text model writes
    texts.jsonl in place of images; options of images are refused.
    """
    context = launch_context()
    with context.local_main_process_first():
        compute_options = compute_options or ComputeOptions()
        compute_options.check()
        if is_text_model(settings.model):
            _check_texts(settings, animation, compute_options, checklist)
        rows = [_checked(row, settings) for row in prompts]
        if animation and not METHODS[settings.method].is_iterative:
            raise InputError(f"--animation shows iterations and --method {settings.method} has none: leave it out")
        reward = resolve_reward(settings.reward, reward_timeout)
        METHODS[settings.method].check(settings, reward)
        check = load_checklist(checklist)
        check_model_settings(settings)
    record, pending = context.broadcast_from_main(lambda: _open_report(out, rows, settings, animation))
    if pending:
        with _opened_models(settings, device, compute_options, context) as (pipe, adapter_disabled, expand):
            requests = sample_requests(rows, settings, pipe)
            note_unused("prompts", unused_columns(rows, [*SETTINGS, *argument_names(type(pipe))]))
            for n in _local_prompts(pending, context, settings.method, len(rows)):
                request, folder = requests[n], out / f"{n:03d}-{_slug(rows[n].prompt)}"
                job = replace(
                    Job(pipe, reward, request.prompt, request.settings, folder / SEARCH, arguments=request.arguments),
                    adapter_disabled=adapter_disabled,
                    compute_options=compute_options,
                    **_expanded(pipe, request, expand),
                )
                entry = _sample_prompt(job, rows[n], folder, animation)
                with output_errors(out):
                    record.keep(n, entry, context.world_size == 1)
                    _clean(folder)
                _raise_if_stopped(entry, record, context)
    context.wait_for_everyone()
    with output_errors(out):
        report = context.broadcast_from_main(lambda: record.merge(len(rows)))
        if context.is_main_process:
            _draw(report, out, check)
    return report


def _check_texts(
    settings: SamplingConfig, animation: bool, compute_options: ComputeOptions, checklist: str | None
) -> None:
    """Raise InputError for options that do not apply to texts, and for several processes."""
    if METHODS[settings.method].is_iterative:
        raise InputError(f"--method {settings.method} optimises the noise of images: use fk, svdd, beam or best-of-n")
    of_images = ("expand", "original", "noise_candidates", "guidance", "negative_prompt", "height", "width", "vae")
    given = {flags_of(name)[0]: getattr(settings, name) is not None for name in (*of_images, "best_of")}
    given |= {"--animation": animation, "--checklist": checklist is not None}
    given |= {"--attention": compute_options.attention != "auto", "--compile": compute_options.compiled}
    given |= {"--micro-batch": compute_options.micro_batch is not None, "--offload": bool(compute_options.offload)}
    if unused := [flag for flag, is_given in given.items() if is_given]:
        raise InputError(f"{unused[0]}: model {settings.model!r} makes texts: leave it out")
    if launch_context().world_size > 1:
        raise InputError(f"model {settings.model!r} makes texts: sample them in a single process")


Checklist = Callable[[torch.Tensor, Sequence[str]], list[dict[str, bool]]]
Expander = Callable[[str, int], str]  # prompt, seed → longer prompt


def load_checklist(text: str | None) -> Checklist | None:
    """Load the checklist of a reward; None without a name. Raises InputError for a reward without a checklist."""
    if text is None:
        return None
    check: Checklist | None = getattr(resolve_reward(text), "checklist", None)
    if check is None:
        raise InputError(f"--checklist {text}: this reward lists no requirements: use scene, or leave it out")
    return check


def with_checklists(report: Report, out: Path, check: Checklist | None) -> Report:
    """Return the report with the checklists of its images, if there are any."""
    if check is None:
        return report

    def with_checks(side: Entry, prompt: str) -> Entry:
        return side | {"checklist": [check(read_image(out / name)[None], [prompt])[0] for name in side["images"]]}

    entries = []
    for entry in report["prompts"]:
        sides = {side: with_checks(entry[side], entry["prompt"]) for side in CONTROLS if side in entry}
        entries.append(with_checks(entry, entry["prompt"]) | sides)
    return report | {"prompts": entries}


@contextmanager
def opened_model(
    settings: SamplingConfig, device: str | None = None, show_progress: bool = True, **loading: str
) -> Iterator[tuple[Any, DisableAdapter]]:
    """Load the pipeline of settings, with their adapter inside the block; yields it and a context without the adapter.

    show_progress  whether the pipeline shows its steps
    loading        further arguments of `load_pipeline`
    """
    pipe = load_pipeline(settings.model, device, settings.dtype, **settings.loading, **loading)
    pipe.set_progress_bar_config(leave=False, desc="steps", disable=None if show_progress else True)
    with adapter_applied(pipe, settings.lora) as off:
        yield pipe, off


@contextmanager
def _opened_models(
    settings: SamplingConfig, device: str | None, compute_options: ComputeOptions, context: LaunchContext
) -> Iterator[tuple[Any, DisableAdapter, Expander | None]]:
    """Open the model, and the text model that expands prompts, if any, first in one process of each machine."""
    with ExitStack() as stack:
        with context.local_main_process_first():
            opened = opened_model(settings, context.device(device), context.is_main_process, **compute_options.loading)
            pipe, off = stack.enter_context(opened)
            expand = load_expander(settings.expand, device) if settings.expand is not None else None
        yield pipe, off, expand


def check_model_settings(settings: SamplingConfig) -> None:
    """Check scheduler, autoencoder, adapters and arguments of the call as far as possible without loading the model.

    Raises InputError.
    """
    check_components(settings.loading)
    if settings.call_arguments and (kind := pipeline_type(settings.model)) is not None:
        check_size(call_arguments(kind, settings))
    if settings.lora is not None:
        find_adapter(settings.lora)


def _expanded(pipe: Any, request: SampleRequest, expand: Expander | None) -> dict[str, Any]:
    """Return the expanded prompt of a request, and its original for the reward; nothing without a text model."""
    if expand is None:
        return {}
    prompt = expand(request.prompt, request.settings.seed)
    own = {"prompt": prompt, "arguments": {**request.arguments, READ: request.prompt}}
    return own | {"pipe": guided_by_original(pipe, request.settings, prompt, request.prompt)}


def guided_by_original(pipe: Any, settings: SamplingConfig, prompt: str, original: str) -> Any:
    """Return the pipeline, also guided by the original of an expanded prompt if the settings ask for it."""
    return pipe if settings.original is None else two_prompts(pipe, {prompt: original}, settings.original)


def _checked(row: str | PromptRow, settings: SamplingConfig) -> PromptRow:
    """Check a row as far as possible without the model. Raises InputError."""
    checked = row if isinstance(row, PromptRow) else PromptRow(row)
    check_prompt(checked.prompt, "prompt")
    row_config(checked, settings)
    return checked


def _open_report(
    out: Path, rows: Sequence[PromptRow], settings: SamplingConfig, animation: bool
) -> tuple[PartialReport, list[int]]:
    """Open the report of `out`, and list the missing prompts."""
    record = open_report(out, [row.prompt for row in rows], settings, [row.columns for row in rows])
    return record, record.missing(len(rows), animation)


def _local_prompts(pending: Sequence[int], context: LaunchContext, method: str, count: int) -> Iterator[int]:
    """Iterate over this process's share of the missing prompts; the main process shows a progress bar of its share."""
    share = [pending[place] for place in context.split_indices(len(pending))]
    if context.world_size == 1:
        yield from tqdm(share, method, initial=count - len(pending), total=count, unit="prompt", disable=None)
    else:
        label = f"{method}, 1 of {context.world_size} processes"
        yield from tqdm(share, label, unit="prompt", disable=None if context.is_main_process else True)


def _draw(report: Report, out: Path, check: Checklist | None = None) -> None:
    if is_text_model(report["model"]):
        lines = [json.dumps(line) + "\n" for entry in report["prompts"] for line in _text_lines(entry)]
        write_text(out / TEXTS, "".join(lines))
    else:
        draw_grid(with_checklists(report, out, check), out)
    (draw_progress if METHODS[report["method"]].is_iterative else draw_ancestry)(report, out)


def _text_lines(entry: Entry) -> Iterator[dict[str, Any]]:
    """Yield a line for each text of a prompt, best first; texts without steering come last."""
    for side, steered in ((entry, True), (entry.get("base", {"texts": [], "rewards": []}), False)):
        for text, reward in zip(side["texts"], side["rewards"], strict=True):
            yield {"prompt": entry["prompt"], "text": text, "reward": reward, "steered": steered}


def _raise_if_stopped(entry: Entry, record: PartialReport, context: LaunchContext) -> None:
    """Raise InputError for a prompt whose run stopped early, after writing everything."""
    if not entry.get("stopped"):
        return
    if context.world_size == 1:
        with output_errors(record.out):
            _draw(record.save(), record.out)
    kept = "its best images so far are kept: run the command again to resume after it"
    raise InputError(f"prompt {entry['prompt']!r}: {entry['stopped']}; {kept}")


def _sample_prompt(job: Job, row: PromptRow, folder: Path, animation: bool) -> Entry:
    """Sample one prompt, write its samples, return its entry of the report. Raises InputError with the prompt."""
    frames = Frames(folder / FRAMES)
    with wrap_errors(f"prompt {job.prompt!r}", "finished prompts are kept", MEMORY_HINT):
        output = (replace(job, on_iteration=frames.keep) if animation else job).run()
        entry: Entry = {"prompt": job.arguments.get(READ, job.prompt)}
        entry |= {"expanded": job.prompt} if READ in job.arguments else {}
        entry |= _save_samples(output, job, folder) | describe(output)
        entry |= {} if output.lam is None else {"lam": output.lam}
        entry |= _nsfw_flags(output)
        if output.start is not None:
            entry |= {"seeds": list(output.start.seeds), "noise": _write_noise(output, job, folder)}
            entry |= {"trace": _trace(output.trace), "stopped": output.stopped}
        if output.elites is not None:
            entry["archive"] = write_archive(output.elites, entry["prompt"], folder, folder.parent / entry["images"][0])
        if animation:
            frames.write(entry, output.images[0], folder / "progress.gif")
            entry["animation"] = f"{folder.name}/progress.gif"
        if (base := base_output(job, output)) is not None:
            entry["base"] = _control(*base, folder, "base-", base=True)
        if job.settings.best_of is not None:
            control, best = best_of_n(job, job.settings.best_of)
            entry["best_of"] = _control(control, best, folder, "best-of-") | {"cost": asdict(best.cost)}
        return entry | ({"columns": dict(row.columns)} if row.columns else {})


def _control(job: Job, output: SteeringOutput, folder: Path, prefix: str, base: bool = False) -> Entry:
    """Write the samples of a control, and return its entry."""
    saved = _save_samples(output, job, folder, prefix, base)
    return saved | {"rewards": output.rewards[0].tolist()} | _nsfw_flags(output)


def describe(output: SteeringOutput) -> Entry:
    """Return the numbers of a run of one prompt for the report: rewards, weights, ancestors, cost."""
    return {
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


def _nsfw_flags(output: SteeringOutput) -> dict[str, list[bool]]:
    """List which images the safety checker blackened; images are scored before the check."""
    flags = output.nsfw_content_detected
    return {} if flags is None else {"nsfw_content_detected": flags[0].tolist()}


def _trace(iterations: Sequence[Iteration]) -> dict[str, Any]:
    """Tabulate metrics by iteration and slot, with the seven digits of fp32."""

    def rows(values: Iterable[torch.Tensor]) -> list[list[float]]:
        return [[float(f"{number:.7g}") for number in value[0].tolist()] for value in values]

    components = {name: rows(one.components[name] for one in iterations) for name in iterations[0].components}
    metrics = {name: rows(getattr(one, name) for one in iterations) for name in ("rewards", "norms", "best")}
    return metrics | {"components": components}


def _write_noise(output: SteeringOutput, job: Job, folder: Path) -> str:
    """Save the noise of each image, in order, with the arguments that reproduce it in the plain pipeline."""
    assert output.start is not None, "only noise optimisation has a start"
    call = {name: value for name, value in job.call.items() if name not in ("generator", "num_particles")}
    header: dict[str, Any] = {
        "model": job.settings.model,
        "prompt": job.prompt,
        "call": call,
        "seeds": output.start.seeds,
    }
    if output.start.draw is not None:
        header["draw"] = output.start.draw
    folder.mkdir(parents=True, exist_ok=True)
    # One key: safetensors writes several in any order, and equal runs must give equal bytes.
    metadata = {"start": json.dumps(header)}
    save_file({"noise": output.start.noise.cpu().contiguous()}, folder / "noise.safetensors", metadata)
    return f"{folder.name}/noise.safetensors"


def _clean(folder: Path) -> None:
    """Remove the files of an unfinished prompt."""
    (folder / SEARCH).unlink(missing_ok=True)
    shutil.rmtree(folder / FRAMES, ignore_errors=True)


def _save_samples(output: SteeringOutput, job: Job, folder: Path, prefix: str = "", base: bool = False) -> Entry:
    """Save images in order, each with its recipe; return their paths relative to the output folder, or the texts."""
    if (texts := as_texts(output.images)) is not None:
        return {"texts": list(texts)}
    saved = write_images(job, output, folder, prefix, base)
    return {"images": [f"{folder.name}/{one.path.name}" for one in saved]}


def _slug(prompt: str) -> str:
    return re.sub("[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].rstrip("-")
