"""What comes with the project: the embedded models and prompt lists."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent
MODELS = {"scenes": ROOT / "scenes"}
PROMPTS = {name: ROOT / "prompts" / f"{name}.jsonl" for name in ("scenes-heldout", "scenes-tuning")}
