"""What the Steer tab runs: one prompt after another, told step by step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from steer.apps.demo.worker import Ticket
from steer.apps.methods import METHODS, Job, SampleSettings
from steer.apps.png_metadata import Recipe, recipe_of, write_png
from steer.pipelines import Iteration, SteeringOutput, StepReport
from steer.pipelines.choice_reading import pixels_of
from steer.pipelines.fk_run import DEFAULT_STEPS
from steer.pipelines.output import Cost
from steer.reward import Reward
from steer.staged import make_folder

THUMBNAIL = 160  # pixels of a preview's longer side
MOST_FRAMES = 12  # of a noise optimisation, which has many more iterations than anybody looks at


@dataclass(frozen=True)
class Frame:
    """The particles at one reading: images of x̂0, rewards, and by slot where they go on from; ESS before resampling.

    step       of `total`, from 1
    ancestors  of each slot the slot before; None in a method whose particles keep to themselves
    """

    step: int
    total: int
    images: tuple[Image.Image, ...]
    rewards: tuple[float, ...]
    ess: float | None = None
    ancestors: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Loading:
    """The model is being loaded."""

    model: str


@dataclass(frozen=True)
class Step:
    """How far a prompt is: number `number` of `count` prompts, in a phase such as fk or base."""

    number: int
    count: int
    phase: str
    step: int
    total: int


@dataclass(frozen=True)
class Picture:
    """A finished image: a PNG that holds its recipe."""

    path: Path
    recipe: Recipe


@dataclass(frozen=True)
class Made:
    """The finished images of a prompt, best first, and the base ones of the same seed, by slot.

    order  the slot of the run that each image comes from
    cost   of steering; that of the base images, where they were not the same run
    """

    prompt: str
    settings: SampleSettings
    images: tuple[Picture, ...]
    order: tuple[int, ...]
    base: tuple[Picture, ...]
    cost: Cost
    base_cost: Cost | None


def steer_all(
    pipe: Any, reward: Reward, prompts: Sequence[str], settings: SampleSettings, folder: Path, ticket: Ticket
) -> None:
    """Steers every prompt; says Step, Frame and, of each prompt, Made."""
    make_folder(folder)
    for number, prompt in enumerate(prompts):

        def step(phase: str, step: int, total: int, number: int = number) -> None:
            ticket.say(Step(number, len(prompts), phase, step, total))

        job = Job(pipe, reward, prompt, settings, folder / f"{number}-search.safetensors")
        ticket.say(_steered(job, folder / f"prompt-{number + 1}", ticket, step))


def _steered(job: Job, stem: Path, ticket: Ticket, step: Callable[[str, int, int], None]) -> Made:
    settings = job.settings

    def on_step(report: StepReport) -> None:
        step(settings.method, report.step + 1, report.total)
        if report.evaluation is not None and report.previews is not None:
            ticket.say(_frame(report))

    def on_iteration(one: Iteration) -> None:
        step(settings.method, one.number + 1, one.total)
        if one.images is not None and one.number % max(1, one.total // MOST_FRAMES) == 0:
            images = tuple(_thumbnail(image) for image in one.images)
            ticket.say(Frame(one.number + 1, one.total, images, _row(one.rewards)))

    watched = replace(job, on_step=on_step, on_iteration=on_iteration, preview_steps=_preview_steps(settings))
    output = METHODS[settings.method].run(watched)
    base = _base(job, output, step)
    return Made(
        prompt=job.prompt,
        settings=settings,
        images=tuple(_kept(job, output, stem)),
        order=tuple(output.order[0].tolist()),
        base=() if base is None else tuple(_kept(job, base, stem.with_name(f"{stem.name}-base"), base=True)),
        cost=output.cost,
        base_cost=None if base is None or settings.method == "best-of-n" else base.cost,
    )


def _base(job: Job, output: SteeringOutput, step: Callable[[str, int, int], None]) -> SteeringOutput | None:
    """The base images of the same seed, where they were asked for: what best-of-n sorted is that batch itself."""
    if not job.settings.compare or job.settings.method == "base":
        return None
    if job.settings.method == "best-of-n":
        return output.in_slot_order()
    return METHODS["base"].run(replace(job, on_step=lambda report: step("base", report.step + 1, report.total)))


def _preview_steps(settings: SampleSettings) -> tuple[int, ...]:
    """Where methods that need no previews show some: where steering would look."""
    steps = settings.steps or 0
    return tuple(sorted({min(round(share * steps), steps - 3) for share in DEFAULT_STEPS})) if steps > 2 else ()


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


def _kept(job: Job, output: SteeringOutput, stem: Path, base: bool = False) -> Iterator[Picture]:
    """Writes the images of an output."""
    for rank, image in enumerate(output.images):
        picture = Picture(stem.with_name(f"{stem.name}-{rank:02d}.png"), recipe_of(job, output, rank, base))
        write_png(image, picture.path, picture.recipe)
        yield picture
