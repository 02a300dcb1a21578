"""A noise optimisation as a short film: its images as they come, kept small on disk until the prompt is finished."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from steer.apps.pictures import INK
from steer.pipelines import Iteration
from steer.pipelines.population import as_type
from steer.staged import staged

LARGEST = 512  # pixels of a side; more would only make the file heavy
SMALLEST = 256  # smaller images are enlarged, or their caption would not fit
CAPTION = 26  # pixels
SECONDS, LAST = 0.12, 2.0  # that a frame stays, and the last one


class Frames:
    """A folder with one picture an iteration, the images of all slots side by side.

    Which slot ends best is known at the end only. On disk they cost no memory, and a run that was interrupted has them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, iteration: Iteration) -> None:
        """Saves the images of an iteration, whole or not at all."""
        assert iteration.images is not None, "observers are given the images"
        pixels = iteration.images if iteration.images.dim() == 4 else iteration.images[:, 0]  # of a video the first
        images: Sequence[Image.Image] = as_type(pixels.detach().float().cpu().clamp(0, 1), "pil")
        for image in images:
            image.thumbnail((LARGEST, LARGEST))
        width, height = images[0].size
        row = Image.new("RGB", (width * len(images), height))
        for slot, image in enumerate(images):
            row.paste(image, (width * slot, 0))
        with staged(self._path(iteration.number)) as new:
            row.save(new, format="PNG")

    def write(self, entry: Mapping[str, Any], best: Image.Image, path: Path) -> None:
        """Writes the animation of the seed that ended best; its last frame is the image that it ended with."""
        slot, size, series = entry["order"][0], len(entry["order"]), entry["trace"]["rewards"]
        shown = [
            captioned(self._image(number, slot, size), f"iteration {number}", rewards[slot])
            for number, rewards in enumerate(series)
            if self._path(number).exists()
        ]
        last = best.convert("RGB")
        last.thumbnail((LARGEST, LARGEST))
        frames = [*shown, captioned(last, "best", entry["rewards"][0])]
        times = [round(1000 * SECONDS)] * len(shown) + [round(1000 * LAST)]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.png"

    def _image(self, number: int, slot: int, size: int) -> Image.Image:
        with Image.open(self._path(number)) as row:
            width = row.width // size
            return row.crop((width * slot, 0, width * (slot + 1), row.height)).convert("RGB")


def captioned(image: Image.Image, text: str, reward: float) -> Image.Image:
    """The image over a line of text: words on the left, the reward on the right."""
    larger = max(1, -(-SMALLEST // image.width))
    image = image.resize((image.width * larger, image.height * larger), Image.Resampling.NEAREST)
    frame = Image.new("RGB", (image.width, image.height + CAPTION), "white")
    frame.paste(image)
    draw, font = ImageDraw.Draw(frame), ImageFont.load_default(size=14)
    middle = image.height + CAPTION / 2
    draw.text((8, middle), text, INK, font, anchor="lm")
    draw.text((image.width - 8, middle), f"{reward:.3f}", INK, font, anchor="rm")
    return frame
