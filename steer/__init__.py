"""steer: better images from a diffusion model and a reward, without being fooled by the score.

`steer.pipelines`, `steer.rewards`, `steer.apps` and `steer.assets` stand beside this folder at the top
of the checkout. An installed wheel holds them below `steer/`; a checkout finds them through `__path__`.
"""

from pathlib import Path

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "pipelines" / "__init__.py").exists() and (_root / "pyproject.toml").exists():
    __path__.append(str(_root))
