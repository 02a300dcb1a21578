"""What comes with the project: the embedded models and rewards, prompt lists, and configurations.

scenes-large and scenes-flow lie in the repository alone: the package stays below 40 MB.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent
MODELS = {name: ROOT / name for name in ("scenes", "scenes-turbo", "scenes-flow", "scenes-large")}
TEXT_MODELS = {name: ROOT / name for name in ("scenes-text",)}
ADAPTERS = {"scenes-lcm": ROOT / "scenes-lcm"}  # LoRA adapters of few steps, of scenes
CLIPS = {"scenes": ROOT / "clip-scenes"}
TINY_VAES = {"scenes": ROOT / "scenes-tiny-vae"}
REWARDS = {kind: {"scenes": ROOT / f"{kind}-scenes"} for kind in ("preference", "aesthetic")}
LISTS = ("scenes-heldout", "scenes-tuning", "scenes-training", "scenes-few", "scenes-many")
TEXT_LISTS = ("scenes-prefixes", "scenes-prefixes-heldout")  # beginnings of prompts, for models of texts
PROMPTS = {name: ROOT / "prompts" / f"{name}.jsonl" for name in (*LISTS, *TEXT_LISTS)}
ACCELERATE = {path.stem: path for path in sorted((ROOT / "accelerate").glob("*.yaml"))}
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}
