"""Rewards written by a language model."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from steer.apps.scenes.world import draw, random_scene


def drawn_scenes(folder: Path, count: int) -> Path:
    """A folder of drawn scenes and their prompts."""
    folder.mkdir()
    lines = []
    for number in range(count):
        rng = np.random.default_rng(number)
        scene = random_scene(rng)
        Image.fromarray(draw(scene, rng)).save(folder / f"{number:03}.png")
        lines.append(json.dumps({"image": f"{number:03}.png", "prompt": scene.prompt}))
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder
