"""steer: better images from a diffusion model and a reward, without being fooled by the score."""

__version__ = "0.1.0"
