"""Rollouts of masked diffusion over tokens: drawn from categorical kernels, stored, and replayed with gradients.

z_s of every step is stored as ids. `steer.diffusion.masked.MaskedKernel` gives its density p(z_s | z_t), so losses of
log-probabilities and the KL to the reference are the same as for images (`steer.training.gradient`).
"""

import copy
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Generator, Tensor

from steer.diffusion.masked import MaskedKernel
from steer.diffusion.precision import Precision, in_float32
from steer.diffusion.preview import filter_call_kwargs
from steer.diffusion.seeds import derived_seed
from steer.errors import InputError
from steer.reward import Texts
from steer.training.drakes import RelaxedRun, relaxed_run
from steer.training.rollout import ReplayCallback, Rows, Sampler, StepWindow, Trajectories


class TokenSampler(Sampler):
    """A sampler of trajectories of a `MaskedDiffusionPipeline`, on its own weights.

    call, prepared, precision, autocast  as in `Sampler`
    A trajectory starts from its prompt; the samples of a prompt differ only by the seeds of `Rows.noises`.
    """

    several = False  # the pipeline has one denoiser

    def __init__(
        self,
        pipe: Any,
        call: Mapping[str, Any],
        prepared: Mapping[str, Callable[..., Any]] | None = None,
        precision: Precision = "float32",
        autocast: bool = False,
    ) -> None:
        unknown = [name for name in call if name not in filter_call_kwargs(pipe, call)]
        if unknown:
            raise InputError(f"{type(pipe).__name__} takes no argument {unknown[0]!r}")
        self._pipe, self._denoiser = copy.copy(pipe), (prepared or {}).get("denoiser", pipe.denoiser)
        vars(self._pipe)["scheduler"] = copy.copy(pipe.scheduler)
        self._steps, self._length = call["num_inference_steps"], call.get("length")
        self._precision_context = in_float32([pipe.denoiser], autocast) if precision == "float32" else nullcontext

    def rollout(self, rows: Rows, window: StepWindow | None = None) -> tuple[Trajectories, Any]:
        """Draw the rows as one batch; also return their texts, with the ids (N, L)."""
        latents, log_probs = [], []
        with torch.no_grad():
            z_t = self._start(rows)
            for k, t in enumerate(self._pipe.scheduler.timesteps):
                kernel = self._kernel(z_t, t)
                seeds = [derived_seed(seed, f"step {k}") for seed in rows.noises]
                draws = [kernel.at([n]).sample(Generator().manual_seed(seed)) for n, seed in enumerate(seeds)]
                z_s = torch.cat(draws)
                latents.append(z_s.cpu())
                log_probs.append(kernel.log_prob(z_s).cpu())
                z_t = z_s
        stored = Trajectories(rows, torch.stack(latents, 1), tuple(range(self._steps)), torch.stack(log_probs, 1))
        return stored, Texts(self._pipe.decode(z_t), z_t)

    def replay(
        self, stored: Trajectories, at: ReplayCallback, only: Collection[int] | None = None, grad: bool = False
    ) -> None:
        """Call `at(t, kernel, z_s)` for each step t = 0 … T − 1: p(· | z_t) by the current weights, and z_s.

        With `grad` the kernel has a graph, which is freed before the next step unless the callback keeps it.

        only  the steps t to visit; for others the denoiser is not called
        """
        z_t = self._start(stored.rows)
        for k, t in enumerate(self._pipe.scheduler.timesteps):
            z_s = stored.latents[:, k].to(z_t.device)
            if only is None or k in only:
                with torch.set_grad_enabled(grad):
                    at(k, self._kernel(z_t, t), z_s)
            z_t = z_s

    def relaxed(self, rows: Rows, reference: Callable[..., Any], last_steps: int, temperature: float) -> RelaxedRun:
        """Run the rows by relaxed steps, with a graph through the last ones (`steer.training.drakes`).

        reference  denoiser that the KL is computed to; the noise follows from the first row's seed
        """
        generator = Generator().manual_seed(derived_seed(rows.noises[0], "relaxed"))
        start, mask_id = self._start(rows), self._pipe.mask_id
        policy, prior = (lambda p, one=one: one(p).sample for one in (self._denoiser, reference))
        with self._precision_context():
            return relaxed_run(policy, prior, start, mask_id, self._steps, last_steps, temperature, generator)

    def _start(self, rows: Rows) -> Tensor:
        """Return z_1 (N, L), the prompts and masks, and set the solver steps."""
        ids: Tensor = self._pipe.encode(list(rows.prompts), self._length)
        self._pipe.scheduler.set_timesteps(self._steps, device=ids.device)
        return ids

    def _kernel(self, z_t: Tensor, t: Tensor) -> MaskedKernel:
        with self._precision_context():
            kernel: MaskedKernel = self._pipe.kernel(z_t, t, self._denoiser)
        return kernel
