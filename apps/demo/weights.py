"""Finetuned weights that a visitor trained, on their way from one tab to the other."""

from dataclasses import dataclass
from pathlib import Path

PACKED = "finetuned"  # what the zip unpacks to, and what its files call the folder of the run


@dataclass(frozen=True)
class Weights:
    """Finetuned weights to steer with: `steer.apps.adapters.find_finetuned(str(folder))` reads them.

    model            that they were trained from
    label            what they are, for people
    reward           that they were trained on; None: choices
    steps, guidance  that they were trained with: there they do most
    """

    model: str
    folder: Path
    label: str
    reward: str | None
    steps: int
    guidance: float

    @property
    def told(self) -> str:
        """Where they lie for whoever unpacked the zip: what images, commands and programs say of them."""
        return f"{PACKED}/final"
