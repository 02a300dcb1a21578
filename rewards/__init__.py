"""Rewards: one a file. This table is all there is to registering one: name → (module:attribute, what it measures)."""

REWARDS: dict[str, tuple[str, str]] = {
    "scene": ("steer.rewards.scene:SceneReward", "share of the prompt's requirements that a scene meets, exact, 0..1"),
    "scene-soft": ("steer.rewards.scene_soft:SceneSoftReward", "the same by template matching: graded, differentiable"),
    "jpeg": ("steer.rewards.jpeg:JpegCompressibility", "minus the size as a JPEG of quality 95, in kB: plain pictures"),
    "jpeg-incompressible": ("steer.rewards.jpeg:JpegIncompressibility", "the size as a JPEG in kB: busy pictures"),
    "colour": (
        "steer.rewards.colour:ColourMatch",
        "colour:NAME or colour:#RRGGBB, mean closeness, 0..1, differentiable",
    ),
    "brightness": (
        "steer.rewards.colour:Brightness",
        "mean luma 0..1, or closeness to brightness:TARGET, differentiable",
    ),
}
