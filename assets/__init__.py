"""What comes with the project: the embedded models and rewards, prompt lists, and configurations of finetuning."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent
MODELS = {name: ROOT / name for name in ("scenes", "scenes-turbo")}
CLIPS = {"scenes": ROOT / "clip-scenes"}
REWARDS = {kind: {"scenes": ROOT / f"{kind}-scenes"} for kind in ("preference", "aesthetic")}
PROMPTS = {name: ROOT / "prompts" / f"{name}.jsonl" for name in ("scenes-heldout", "scenes-tuning", "scenes-training")}
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}
