"""The common diffusers schedulers, in the settings that matter; every class is in test_scheduler_classes.py."""

import functools
from collections.abc import Callable
from typing import Any

import diffusers
from diffusers.utils import is_torchsde_available

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's


def build(name: str, **config: Any) -> Any:
    """A scheduler by the short name in diffusers."""
    return getattr(diffusers, f"{name}Scheduler")(**config)


def _diffusion(name: str, **config: Any) -> Callable[..., Any]:
    return functools.partial(build, name, **BETAS, **config)


def _flow(name: str, **config: Any) -> Callable[..., Any]:
    return functools.partial(build, name, prediction_type="flow_prediction", use_flow_sigmas=True, **config)


def without_noise(timestep: float) -> int:
    """SASolver's τ(t) that makes it an ODE solver."""
    return 0


# Whatever noise they draw goes to slots, not to particles: a permuted run cannot be compared with a plain one.
STOCHASTIC: dict[str, Callable[..., Any]] = {
    "DDPM": _diffusion("DDPM", clip_sample=False),
    "LCM": _diffusion("LCM"),
    "EulerAncestralDiscrete": _diffusion("EulerAncestralDiscrete"),
    "KDPM2AncestralDiscrete": _diffusion("KDPM2AncestralDiscrete"),
    "DPMSolverMultistep-sde": _diffusion("DPMSolverMultistep", algorithm_type="sde-dpmsolver++"),
}
if is_torchsde_available():
    STOCHASTIC["DPMSolverSDE"] = _diffusion("DPMSolverSDE", noise_sampler_seed=0)

DETERMINISTIC: dict[str, Callable[..., Any]] = {
    "DDIM": _diffusion("DDIM", clip_sample=False, steps_offset=1),
    "DDIM-clipped": _diffusion("DDIM", clip_sample=True, steps_offset=1),
    "PNDM": _diffusion("PNDM", skip_prk_steps=True, steps_offset=1),
    "PNDM-warm-up": _diffusion("PNDM", skip_prk_steps=False, steps_offset=1),
    "TCD": _diffusion("TCD"),
    "EulerDiscrete": _diffusion("EulerDiscrete"),
    "EulerDiscrete-karras": _diffusion("EulerDiscrete", use_karras_sigmas=True),
    "LMSDiscrete": _diffusion("LMSDiscrete"),
    "HeunDiscrete": _diffusion("HeunDiscrete"),
    "KDPM2Discrete": _diffusion("KDPM2Discrete"),
    "DPMSolverMultistep": _diffusion("DPMSolverMultistep"),
    "DPMSolverMultistep-3": _diffusion("DPMSolverMultistep", solver_order=3, use_karras_sigmas=True),
    "DPMSolverSinglestep": _diffusion("DPMSolverSinglestep"),
    "UniPCMultistep": _diffusion("UniPCMultistep"),
    "UniPCMultistep-3": _diffusion("UniPCMultistep", solver_order=3),
    "DEISMultistep": _diffusion("DEISMultistep"),
    "SASolver": _diffusion("SASolver", tau_func=without_noise),
}

FLOW: dict[str, Callable[..., Any]] = {
    "FlowMatchEulerDiscrete": functools.partial(build, "FlowMatchEulerDiscrete", shift=3.0),
    "FlowMatchHeunDiscrete": functools.partial(build, "FlowMatchHeunDiscrete", shift=3.0),
    "FlowMatchLCM": functools.partial(build, "FlowMatchLCM", shift=3.0),
    "DPMSolverMultistep": _flow("DPMSolverMultistep", flow_shift=3.0),
    "DPMSolverSinglestep": _flow("DPMSolverSinglestep", flow_shift=3.0),
    "UniPCMultistep": _flow("UniPCMultistep", flow_shift=3.0),
    "DEISMultistep": _flow("DEISMultistep", flow_shift=3.0),
    "SASolver": _flow("SASolver", flow_shift=3.0, tau_func=without_noise),
}
DIFFUSION = DETERMINISTIC | STOCHASTIC
