"""The job of the Steer tab: steer one prompt after another, with an event for each step."""

import re
import shlex
import shutil
from base64 import b64encode
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from steer.apps.demo.studio import Studio, Ticket, Weights
from steer.apps.errors import wrap_errors
from steer.apps.methods import METHODS, DisableAdapter, Job
from steer.apps.models import adapter_applied
from steer.apps.sampling import SavedImage, base_output, write_images
from steer.apps.settings import SamplingConfig, default_of
from steer.files import make_folder
from steer.pipelines.base import Cost, Iteration
from steer.pipelines.fk_steering import StepReport
from steer.pipelines.training.preference_files import pixels_of
from steer.reward import Reward

THUMBNAIL = 160  # pixels of a preview's longer side
LONGEST_NAME = 80  # bytes of a prompt in the names of its images
NOTHING_KEPT_HINT, MEMORY_HINT = "nothing of this run is kept", "fewer particles need less"
MAX_FRAMES = 12  # of a noise optimisation, which has many more iterations


def data_uri(image: Image.Image) -> str:
    """Encode an image for a page, with no file to serve."""
    file = BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=88, subsampling=0)
    return f"data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}"


@dataclass(frozen=True)
class Frame:
    """The particles at an evaluated step: previews, rewards, ancestors; ESS before resampling.

    step       of `total`, from 1
    ancestors  by slot; None in a method without resampling
    """

    step: int
    total: int
    images: tuple[Image.Image, ...]
    rewards: tuple[float, ...]
    ess: float | None = None
    ancestors: tuple[int, ...] | None = None

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """The images as data: URIs, cached, because every update of the view holds all earlier frames."""
        return tuple(map(data_uri, self.images))


@dataclass(frozen=True)
class Loading:
    """An event: the model is being loaded."""

    model: str

    def __str__(self) -> str:
        return f"Loading {self.model} …"


@dataclass(frozen=True)
class Step:
    """Progress: a step of prompt `number` of `count`, in a phase such as fk or base."""

    number: int
    count: int
    phase: str
    step: int
    total: int


@dataclass(frozen=True)
class PromptResult:
    """The finished images of a prompt, best first, and the base ones of the same seed, by slot.

    order  the slot of the run that each image comes from
    cost   of steering; that of the base images, where they were not the same run
    """

    prompt: str
    settings: SamplingConfig
    images: tuple[SavedImage, ...]
    order: tuple[int, ...]
    base: tuple[SavedImage, ...]
    cost: Cost
    base_cost: Cost | None


def steering(
    studio: Studio, prompts: Sequence[str], settings: SamplingConfig, folder: Path, weights: Weights | None = None
) -> Callable[[Ticket], None]:
    """Make a job for the worker that steers every prompt, with `weights` where the settings name an adapter.

    Raises InputError for a reward that visitors may not use.
    """
    reward = studio.reward(settings.reward)
    adapter = None if weights is None or settings.lora is None else str(weights.folder)

    def work(ticket: Ticket) -> None:
        ticket.say(Loading(settings.model))
        for other in sorted(folder.parent.glob("run-*"), key=lambda one: one.stat().st_mtime)[:-1]:
            shutil.rmtree(other, ignore_errors=True)  # the page may still load the latest
        with (
            wrap_errors("this run", NOTHING_KEPT_HINT, MEMORY_HINT),
            studio.model(settings.model) as pipe,
            adapter_applied(pipe, adapter) as off,
        ):
            steer_all(pipe, reward, prompts, settings, folder, ticket, off)

    return work


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

    adapter_disabled  inside, the pipeline is without its finetuned weights
    """
    make_folder(folder)
    for number, prompt in enumerate(prompts):

        def step(phase: str, step: int, total: int, number: int = number) -> None:
            ticket.say(Step(number, len(prompts), phase, step, total))

        job = Job(
            pipe, reward, prompt, settings, state_file=None, adapter_disabled=adapter_disabled
        )  # nothing resumes here
        which = f"prompt{number + 1}-" if len(prompts) > 1 else ""
        ticket.say(
            _steer_one(job, folder, f"{_slug(prompt)}{settings.method}-seed{settings.seed}-{which}", ticket, step)
        )


def _slug(prompt: str) -> str:
    """A prompt as the start of a file's name, with a dash after it; "" without letters and digits."""
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-").encode()[:LONGEST_NAME].decode(errors="ignore").strip("-")
    return f"{words}-" if words else ""


def _steer_one(
    job: Job, folder: Path, start: str, ticket: Ticket, step: Callable[[str, int, int], None]
) -> PromptResult:
    settings, prefix = job.settings, f"{start}{folder.name}-"

    def on_step(report: StepReport) -> None:
        step(settings.method, report.step + 1, report.total)
        if report.evaluation is not None and report.previews is not None:
            ticket.say(_frame(report))

    def on_iteration(one: Iteration) -> None:
        step(settings.method, one.number + 1, one.total)
        if one.images is not None and one.number % max(1, one.total // MAX_FRAMES) == 0:
            images = tuple(_thumbnail(image) for image in one.images)
            ticket.say(Frame(one.number + 1, one.total, images, _row(one.rewards)))

    hooked_job = replace(job, on_step=on_step, on_iteration=on_iteration, preview_steps=None)
    output = METHODS[settings.method].run(hooked_job)
    base = base_output(replace(job, on_step=lambda report: step("beside", report.step + 1, report.total)), output)
    return PromptResult(
        prompt=job.prompt,
        settings=settings,
        images=tuple(write_images(job, output, folder, prefix)),
        order=tuple(output.order[0].tolist()),
        base=() if base is None else tuple(write_images(job, base, folder, f"{prefix}base-", base=True)),
        cost=output.cost,
        base_cost=None if base is None or base.cost is output.cost else base.cost,
    )


def _frame(report: StepReport) -> Frame:
    evaluation, previews = report.evaluation, report.previews
    assert evaluation is not None and previews is not None
    return Frame(
        step=report.step + 1,
        total=report.total,
        images=tuple(_thumbnail(image) for image in previews),
        rewards=_row(evaluation.rewards),
        ess=evaluation.ess[0].item(),
        ancestors=tuple(evaluation.ancestors[0].tolist()),
    )


def _row(values: Tensor) -> tuple[float, ...]:
    return tuple(values[0].tolist())


def _thumbnail(image: Tensor) -> Image.Image:
    picture = Image.fromarray(pixels_of(image.detach().clamp(0, 1)))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture


CLASSES = {
    "fk": "FKSteeringPipeline",
    "best-of-n": "BestOfNPipeline",
    "base": "BestOfNPipeline",
    "reno": "ReNOPipeline",
}
# Shared options of the command.
OPTIONS = ("model", "lora", "method", "reward", "particles", "steps", "guidance", "seed")
PYTHON = """import torch
from steer.apps.models import load_pipeline
from steer import {name}

pipe = load_pipeline({model!r}{dtype})
{adapter}out = {name}(pipe, reward={reward!r})(
    {prompt!r},
{arguments}
    generator=torch.Generator().manual_seed({seed}),
){ordered}
out.images[0].save("best.png")
print(out.rewards)
"""


def changed_options(settings: SamplingConfig) -> dict[str, Any]:
    """Return the options of the method that are not its defaults."""
    values = {name: getattr(settings.options, name) for name in settings.option_names}
    return {name: value for name, value in values.items() if value != default_of(settings.method, name)}


def as_python(prompt: str, settings: SamplingConfig) -> str:
    """Write a program that makes the same images."""
    arguments: dict[str, Any] = {
        "num_particles": settings.particles,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
    }
    arguments |= changed_options(settings)
    return PYTHON.format(
        name=CLASSES[settings.method],
        model=settings.model,
        dtype=f", dtype={settings.dtype!r}" if settings.dtype else "",
        adapter=f"pipe.load_lora_weights({settings.lora!r})  # unpacked\n" if settings.lora else "",
        reward=settings.reward,
        prompt=prompt,
        arguments="\n".join(f"    {name}={value!r}," for name, value in arguments.items() if value is not None),
        seed=settings.seed,
        ordered=".in_slot_order()" if settings.method == "base" else "",
    )


def as_command(prompt: str, settings: SamplingConfig) -> str:
    """Write a command that makes the same images."""
    given = {name: value for name in OPTIONS if (value := getattr(settings, name)) is not None}
    given |= changed_options(settings)
    words = [
        word
        for name, value in given.items()
        for word in (f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value))
    ]
    dashed = ["--", prompt] if prompt.startswith("-") else [prompt]
    return shlex.join(["steer", "sample", *words, *([] if settings.compare else ["--no-compare"]), *dashed])
