"""The job of the Steer tab: steer one prompt after another, with an event for each step."""

import math
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from steer.apps.components import set_scheduler
from steer.apps.demo.pictures import data_uri
from steer.apps.demo.steer_options import on_disk
from steer.apps.demo.studio import Studio, Ticket, Weights
from steer.apps.errors import wrap_errors
from steer.apps.grids import Axis
from steer.apps.methods import METHODS, DisableAdapter, Job
from steer.apps.models import adapter_applied, read_loras
from steer.apps.plots import short
from steer.apps.sampling import SavedImage, base_output, samples_base, write_images
from steer.apps.settings import SamplingConfig, default_of
from steer.files import make_folder
from steer.pipelines.base import Cost, Iteration, SteeringOutput
from steer.pipelines.fk_steering import StepReport
from steer.pipelines.training.events import Stopped
from steer.pipelines.training.preference_files import pixels_of
from steer.reward import Reward

THUMBNAIL = 160  # pixels of a preview's longer side
LONGEST_NAME = 80  # bytes of a prompt in the names of its images
NOTHING_KEPT_HINT, MEMORY_HINT = "nothing of this run is kept", "fewer particles need less"
EARLY_PREVIEWS = (0.0, 0.15)  # shares of a run, before the first rewards, to show a picture early
MAX_FRAMES = 12  # frames of a noise optimisation, which has many more iterations


@dataclass(frozen=True)
class Frame:
    """The particles at an evaluated step, or the finished images: previews, rewards, ancestors; ESS before resampling.

    step       step of `total`, from 1
    ancestors  by slot; None in a method without resampling
    """

    step: int
    total: int
    images: tuple[Image.Image, ...]
    rewards: tuple[float, ...]
    ess: float | None = None
    ancestors: tuple[int, ...] | None = None
    finished: bool = False

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """The images as data: URIs, cached, because every update of the view contains all earlier frames."""
        return tuple(map(data_uri, self.images))

    @property
    def name(self) -> str:
        return "finished" if self.finished else f"step {self.step}"

    @property
    def known(self) -> list[float]:
        return [reward for reward in self.rewards if math.isfinite(reward)]

    def describe(self, slot: int) -> str:
        reward, place = self.rewards[slot], self.name if self.finished else f"at {self.name}"
        return f"particle {slot + 1} {place}, reward {short(reward) if math.isfinite(reward) else 'unknown'}"


@dataclass(frozen=True)
class Loading:
    """An event: the model is being loaded."""

    model: str

    def __str__(self) -> str:
        return f"Loading {self.model} …"


@dataclass(frozen=True)
class Step:
    """Progress: a step of prompt `number` of `count`, in the phase of a method, or "beside": of the base images.

    before, after  steps of the phases before and after this one
    """

    number: int
    count: int
    phase: str
    step: int
    total: int
    before: int = 0
    after: int = 0

    @property
    def share(self) -> float:
        """The finished share of the run's steps, 0 to 1."""
        return (self.number + (self.before + self.step) / (self.before + self.total + self.after)) / self.count

    def __str__(self) -> str:
        which = f"Prompt {self.number + 1} of {self.count}. " if self.count > 1 else ""
        phase = "Base images" if self.phase == "beside" else METHODS[self.phase].phase
        return f"{which}{phase}: {self.step} of {self.total}"


@dataclass(frozen=True)
class PromptResult:
    """The finished images of a prompt, best first, and the base images of the same seed, by slot.

    order   the slot of the run that each image comes from
    cost    cost of steering, and of the base images if they are a separate run
    frames  the particles at the evaluated steps
    """

    prompt: str
    settings: SamplingConfig
    images: tuple[SavedImage, ...]
    order: tuple[int, ...]
    base: tuple[SavedImage, ...]
    cost: Cost
    base_cost: Cost | None
    frames: tuple[Frame, ...] = ()


def steering(
    studio: Studio,
    prompts: Sequence[str],
    settings: SamplingConfig,
    folder: Path,
    weights: Weights | None = None,
    loras: Sequence[str] = (),
) -> Callable[[Ticket], None]:
    """Make a job for the worker that steers every prompt, with the adapters that the settings name.

    weights, loras  finetuned weights of the visitor, and paths of uploaded LoRA files
    Raises InputError for a reward that visitors may not use.
    """
    reward = studio.reward(settings.reward)
    places = {Path(path).name: Path(path) for path in loras}
    places |= {} if weights is None else {weights.archive_path: weights.folder}
    adapter = None if settings.lora is None else on_disk(settings.lora, places)

    def work(ticket: Ticket) -> None:
        ticket.say(Loading(settings.model))
        for other in sorted(folder.parent.glob("run-*"), key=lambda one: one.stat().st_mtime)[:-1]:
            shutil.rmtree(other, ignore_errors=True)  # the page may still load the latest one
        with (
            wrap_errors("this run", NOTHING_KEPT_HINT, MEMORY_HINT),
            studio.model(settings.model) as pipe,
            scheduler_applied(pipe, settings.scheduler),
            adapter_applied(pipe, adapter) as off,
        ):
            steer_all(pipe, reward, prompts, settings, folder, ticket, off)

    return work


@contextmanager
def scheduler_applied(pipe: Any, text: str | None) -> Iterator[None]:
    """Replace the scheduler of a pipeline inside the block. Raises InputError for one of another kind of model."""
    own = pipe.scheduler
    if text is not None:
        set_scheduler(pipe, text)
    try:
        yield
    finally:
        pipe.scheduler = own


def steer_all(
    pipe: Any,
    reward: Reward,
    prompts: Sequence[str],
    settings: SamplingConfig,
    folder: Path,
    ticket: Ticket,
    adapter_disabled: DisableAdapter = nullcontext,
) -> None:
    """Steer every prompt; sends Step, Frame and, for each prompt, PromptResult events.

    adapter_disabled  context in which the pipeline is without its finetuned weights
    """
    make_folder(folder)
    for number, prompt in enumerate(prompts):

        def step(*progress: Any, number: int = number) -> None:
            ticket.say(Step(number, len(prompts), *progress))

        which = f"prompt{number + 1}-" if len(prompts) > 1 else ""
        prefix = f"{_slug(prompt)}{settings.method}-seed{settings.seed}-{which}{folder.name}-"
        job = Job(pipe, reward, prompt, settings, state_file=None, adapter_disabled=adapter_disabled)
        ticket.say(_steer_one(job, folder, prefix, ticket, step))


class _StepCounts:
    """The steps of the phases of a prompt: the method's, and then the base images'."""

    def __init__(self, settings: SamplingConfig) -> None:
        self.base, self.method = (settings.steps or 1) if samples_base(settings) else 0, 0

    def of_method(self, step: int, total: int) -> tuple[int, int, int, int]:
        """Return the arguments of `Step` that follow its phase."""
        self.method = total
        return step, total, 0, self.base


def _slug(prompt: str) -> str:
    """Return a prompt as the prefix of a file's name, with a dash after it; "" without letters and digits."""
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-").encode()[:LONGEST_NAME].decode(errors="ignore").strip("-")
    return f"{words}-" if words else ""


def _steer_one(job: Job, folder: Path, prefix: str, ticket: Ticket, step: Callable[..., None]) -> PromptResult:
    method, frames, counts = job.settings.method, list[Frame](), _StepCounts(job.settings)

    def show(number: int, total: int, images: Tensor, rewards: Tensor, *resampling: Any) -> None:
        thumbnails = tuple(Image.fromarray(pixels_of(image.detach().clamp(0, 1))) for image in images)
        for thumbnail in thumbnails:
            thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
        frames.append(Frame(number + 1, total, thumbnails, tuple(rewards[0].tolist()), *resampling))
        ticket.say(frames[-1])

    def on_step(report: StepReport) -> None:
        step(method, *counts.of_method(report.step + 1, report.total))
        if (evaluation := report.evaluation) is not None and report.previews is not None:
            ess, ancestors = evaluation.ess[0].item(), tuple(evaluation.ancestors[0].tolist())
            show(report.step, report.total, report.previews, evaluation.rewards, ess, ancestors)
        elif report.previews is not None and method != "base":  # without rewards, all particles stay
            count = len(report.previews)
            unknown = torch.full((1, count), math.nan)
            show(report.step, report.total, report.previews, unknown, None, tuple(range(count)))

    def on_iteration(one: Iteration) -> None:
        step(method, *counts.of_method(one.number + 1, one.total))
        if one.images is not None and one.number % max(1, one.total // MAX_FRAMES) == 0:
            show(one.number, one.total, one.images, one.rewards)

    early = tuple(round(share * (job.settings.steps or 0)) for share in EARLY_PREVIEWS)
    observed = replace(job, on_step=on_step, on_iteration=on_iteration, preview_steps=None, early_previews=early)
    output = METHODS[method].run(observed)
    beside = replace(job, on_step=lambda report: step("beside", report.step + 1, report.total, counts.method))
    base_job, base = _base_unless_stopped(beside, output)
    return PromptResult(
        prompt=job.prompt,
        settings=job.settings,
        images=tuple(write_images(job, output, folder, prefix)),
        order=tuple(output.order[0].tolist()),
        base=() if base is None else tuple(write_images(base_job, base, folder, f"{prefix}base-", base=True)),
        cost=output.cost,
        base_cost=None if base is None or base.cost is output.cost else base.cost,
        frames=tuple(frames),
    )


def _base_unless_stopped(job: Job, output: SteeringOutput) -> tuple[Job, SteeringOutput | None]:
    """Sample the base images; None if not wanted, or stopped: the steered images are finished."""
    try:
        return base_output(job, output) or (job, None)
    except Stopped:
        return job, None


# Shared options, as options of the command and as arguments in Python.
OPTIONS = ("model", "lora", "scheduler", "method", "reward", "particles", "steps", "guidance", "seed")
CALL = ("negative_prompt", "height", "width")
ARGUMENTS = {"particles": "num_particles", "steps": "num_inference_steps", "guidance": "guidance_scale"}
PYTHON = """import torch
from steer.apps.models import load_pipeline
from steer import {name}

pipe = load_pipeline({model!r}{loading})
{adapter}out = {name}(pipe, reward={reward!r})(
    {prompt!r},
{arguments}
    generator=torch.Generator().manual_seed({seed}),
){ordered}
out.images[0].save("best.png")
print(out.rewards)
"""


def given_options(settings: SamplingConfig, shared: Iterable[str]) -> dict[str, Any]:
    """Return the given ones of the shared options, and the options of the method that are not its defaults."""
    given = {name: value for name in shared if (value := getattr(settings, name)) is not None}
    own = {name: getattr(settings.options, name) for name in settings.option_names}
    return given | {name: value for name, value in own.items() if value != default_of(settings.method, name)}


def as_python(prompt: str, settings: SamplingConfig) -> str:
    """Write a program that makes the same images."""
    method, arguments = METHODS[settings.method], given_options(settings, (*ARGUMENTS, *CALL))
    loading = {name: value for name in ("dtype", "scheduler") if (value := getattr(settings, name))}
    return PYTHON.format(
        name=method.pipeline.__name__,
        model=settings.model,
        loading="".join(f", {name}={value!r}" for name, value in loading.items()),
        adapter=_load_adapters(settings.lora) if settings.lora else "",
        reward=settings.reward,
        prompt=prompt,
        arguments="\n".join(f"    {ARGUMENTS.get(name, name)}={value!r}," for name, value in arguments.items()),
        seed=settings.seed,
        ordered=".in_slot_order()" if method.in_slot_order else "",
    )


def _load_adapters(lora: str) -> str:
    """Write the lines that load adapters, each from the folder of the program."""
    terms = read_loras(lora)
    if len(terms) == 1 and terms[0][1] == 1:
        return f"pipe.load_lora_weights({terms[0][0]!r})  # unpacked\n"
    names, weights = [f"lora{number}" for number in range(len(terms))], [weight for _, weight in terms]
    loads = zip(names, terms, strict=True)
    lines = [f"pipe.load_lora_weights({path!r}, adapter_name={name!r})" for name, (path, _) in loads]
    return "\n".join([*lines, f"pipe.set_adapters({names!r}, {weights!r})\n"])


def as_command(prompt: str, settings: SamplingConfig, axes: Sequence[Axis] = ()) -> str:
    """Write a command that makes the same images, or a grid of them with one or two axes."""
    words = ["grid"] if axes else ["sample"] if settings.compare else ["sample", "--no-compare"]
    for flag, axis in zip(("--x", "--y"), axes, strict=False):
        words += [flag, f"{axis.name}={('|' if any(',' in value for value in axis.values) else ',').join(axis.values)}"]
    varied = {axis.name for axis in axes}
    for name, value in given_options(settings, (*OPTIONS, *CALL)).items():
        if name not in varied:
            text = str(value).removesuffix(".0") if isinstance(value, float) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    dashed = ["--", prompt] if prompt.startswith("-") else [prompt]
    return shlex.join(["steer", *words, *dashed])
