"""The finished images of a prompt, as PNGs that hold their recipes, and the base images beside them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from steer.apps.methods import Job
from steer.apps.png_metadata import Recipe, recipe_of, write_png
from steer.pipelines import SteeringOutput


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
    with job.unworn():
        return job.run("base")


def written(job: Job, output: SteeringOutput, folder: Path, prefix: str = "", base: bool = False) -> Iterator[Picture]:
    """Writes the images of an output, in their order: PREFIX00.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, image in enumerate(output.images):
        picture = Picture(folder / f"{prefix}{rank:02d}.png", recipe_of(job, output, rank, base))
        write_png(image, picture.path, picture.recipe)
        yield picture
