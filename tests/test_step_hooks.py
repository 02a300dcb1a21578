"""Step hooks on every model family and every verified scheduler."""

import copy
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import torch
from conftest import cached_pipe, call_kwargs, with_scheduler
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from gaussian import GaussianPipeline
from schedulers import DIFFUSION, FLOW, STOCHASTIC, build
from torch import Tensor

from steer.diffusion.preview import first_output
from steer.diffusion.step_hooks import SolverStep, hook_steps
from steer.errors import InputError, UnsupportedPipelineError

PARTICLES = 3
STEPS = 4
# Stable Diffusion takes them all; what differs between families is tried on some.
SOME = ("DDIM", "PNDM", "HeunDiscrete", "UniPCMultistep", "EulerAncestralDiscrete", "DPMSolverMultistep")
SOME_FLOW = ("FlowMatchEulerDiscrete", "FlowMatchLCM", "UniPCMultistep", "DPMSolverMultistep")
SCHEDULERS_OF: dict[str, tuple[str, ...]] = {
    "sd": tuple(DIFFUSION),
    "img2img": (*SOME, "KDPM2Discrete", "LCM"),
    "controlnet": (*SOME, "EulerDiscrete"),
    "sdxl": (*SOME, "LMSDiscrete", "DPMSolverSinglestep"),
    "pixart": (*SOME, "SASolver", "DEISMultistep"),
    "sd3": tuple(FLOW),
    "flux": SOME_FLOW,
    "wan": (*SOME_FLOW, "FlowMatchHeunDiscrete"),
}
PAIRS = [(family, name) for family, names in SCHEDULERS_OF.items() for name in names]
WITHOUT_NOISE = [(family, name) for family, name in PAIRS if name not in (*STOCHASTIC, "FlowMatchLCM")]


def tiny(family: str, scheduler: str) -> Any:
    table = FLOW if family in ("sd3", "flux", "wan") else DIFFUSION
    shifting = {"use_dynamic_shifting": True} if family == "flux" else {}  # Flux always sends the shift of a size
    return with_scheduler(cached_pipe(family), table[scheduler](**shifting))


def run(pipe: Any, family: str, seed: int = 0, **call: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # some pipelines keep the generator from their scheduler
    call = call_kwargs(family, PARTICLES, STEPS) | call
    return first_output(pipe(**call, generator=generator, output_type="pt"))


def watch(pipe: Any, family: str, on_step: Callable[[SolverStep], Any], **call: Any) -> Tensor:
    with hook_steps(pipe, on_step, rows=PARTICLES) as view:
        return run(view, family, **call)


def sd(scheduler: str = "DDIM", **config: Any) -> Any:
    return with_scheduler(cached_pipe("sd"), DIFFUSION[scheduler](**config))


@pytest.mark.few(12)
@pytest.mark.parametrize(("family", "scheduler"), PAIRS)
def test_watching_changes_no_bit_and_counts_every_transition(family: str, scheduler: str) -> None:
    pipe = tiny(family, scheduler)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    steps: list[tuple[int, int, int]] = []
    model_calls: list[int] = []
    images = run(pipe, family)
    handle = denoiser.register_forward_hook(lambda *_: model_calls.append(1))
    try:
        watched = watch(pipe, family, lambda event: steps.append((event.k, event.total, event.calls)))
    finally:
        handle.remove()
    assert torch.equal(watched, images)
    numbers, totals, calls = zip(*steps, strict=True)
    assert numbers == tuple(range(len(steps))) and set(totals) == {len(steps)}
    passes = 2 if family == "wan" else 1  # Wan guides by a second call
    assert sum(calls) * passes == len(model_calls)


@pytest.mark.few(6)
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("strength", [1.0, 0.8, 0.6, 0.4, 0.2])
@pytest.mark.parametrize("scheduler", ["DDIM", "PNDM", "HeunDiscrete", "KDPM2Discrete", "DPMSolverMultistep-3"])
def test_a_part_of_the_run_is_counted_from_where_it_starts(scheduler: str, strength: float, steps: int) -> None:
    numbers: list[tuple[int, int]] = []
    call = {"num_inference_steps": max(steps, math.ceil(1 / strength)), "strength": strength}
    watch(tiny("img2img", scheduler), "img2img", lambda event: numbers.append((event.k, event.total)), **call)
    assert numbers == [(k, len(numbers)) for k in range(len(numbers))]


@pytest.mark.few(8)
@pytest.mark.parametrize(("family", "scheduler"), WITHOUT_NOISE)
def test_a_permutation_of_the_particles_permutes_the_images(family: str, scheduler: str) -> None:
    pipe = tiny(family, scheduler)
    draws = torch.Generator().manual_seed(1)
    origin = torch.arange(PARTICLES)

    def shuffle(event: SolverStep) -> tuple[Tensor, None]:
        nonlocal origin
        ancestors = torch.randperm(PARTICLES, generator=draws)
        ancestors = ancestors.roll(1) if torch.equal(ancestors, torch.arange(PARTICLES)) else ancestors
        origin = origin[ancestors]
        return ancestors, None

    shuffled = watch(pipe, family, shuffle)
    torch.testing.assert_close(shuffled[origin.argsort()], run(pipe, family), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", SCHEDULERS_OF)
def test_the_next_step_starts_from_the_latents_of_the_answer(family: str) -> None:
    pipe = cached_pipe(family)
    given: list[Tensor] = []
    starts: list[Tensor] = []

    def replace(event: SolverStep) -> tuple[Tensor, Tensor]:
        starts.append(event.x)
        given.append(torch.randn(event.prev.shape, generator=torch.Generator().manual_seed(event.k)))
        return torch.tensor([1, 2, 0]), given[-1]  # the latents are those of the slots after the permutation

    watch(pipe, family, replace)
    assert len(starts) > 2
    assert all(torch.equal(start, latents) for start, latents in zip(starts[1:], given[:-1], strict=True))


def test_the_multistep_history_follows_its_particles() -> None:
    """A run whose slots all copy particle 0 midway ends like particle 0, which the history alone can ensure."""
    pipe = sd("DPMSolverMultistep-3")
    copied = watch(
        pipe, "sd", lambda event: (torch.zeros(PARTICLES, dtype=torch.int64), None) if event.k == 2 else None
    )
    torch.testing.assert_close(copied, run(pipe, "sd")[:1].expand_as(copied), atol=1e-5, rtol=0)


SINGLE_MEMORY = {  # of solvers that look back at one place only
    "DPMSolverMultistep": {"solver_order": 1},
    "DPMSolverSinglestep": {},
    "UniPCMultistep": {"solver_order": 1},
    "SASolver": {"predictor_order": 1, "corrector_order": 1},
    "EulerDiscrete": {},
    "DDIM": {},
    "HeunDiscrete": {},
    "KDPM2Discrete": {},
}


@pytest.mark.few(6)
@pytest.mark.parametrize("scheduler", SINGLE_MEMORY)
@pytest.mark.parametrize("at", range(STEPS - 1))
def test_what_came_before_new_latents_is_forgotten(scheduler: str, at: int) -> None:
    """A corrector, or a solver that takes several steps from one place, would go back behind them."""

    def restart(event: SolverStep) -> tuple[None, Tensor] | None:
        latents = torch.randn(event.x.shape, generator=torch.Generator().manual_seed(7))
        return (None, latents) if event.k == at else None

    pipe = sd(scheduler, **SINGLE_MEMORY[scheduler])
    assert torch.equal(watch(pipe, "sd", restart, seed=0), watch(pipe, "sd", restart, seed=1))


@pytest.mark.parametrize(
    ("scheduler", "call"), [("DDPM", {}), ("EulerAncestralDiscrete", {}), ("DDIM", {"eta": 1.0}), ("LCM", {})]
)
def test_copies_part_under_a_noisy_solver(scheduler: str, call: dict[str, float]) -> None:
    def copy_first(event: SolverStep) -> tuple[Tensor, None] | None:
        return (torch.zeros(PARTICLES, dtype=torch.int64), None) if event.k == 1 else None

    images = watch(sd(scheduler), "sd", copy_first, **call)
    assert (images[0] - images[1]).abs().max() > 1e-4 and (images[1] - images[2]).abs().max() > 1e-4


def test_copies_stay_together_under_a_noiseless_solver() -> None:
    images = watch(sd("DDIM"), "sd", lambda event: (torch.zeros(PARTICLES, dtype=torch.int64), None))
    torch.testing.assert_close(images[1:], images[:1].expand_as(images[1:]), atol=1e-5, rtol=0)


def test_x0_is_computed_once_and_its_last_one_is_the_end() -> None:
    pairs: list[tuple[Tensor, Tensor]] = []

    def look(event: SolverStep) -> None:
        assert event.x0() is event.x0()
        pairs.append((event.x0(), event.prev))

    watch(sd("DDIM", set_alpha_to_one=True), "sd", look)
    assert pairs[0][0].dtype == torch.float32 and pairs[0][0].shape == pairs[0][1].shape
    assert not torch.allclose(pairs[0][0], pairs[0][1], atol=0.1)
    # DDIM with set_alpha_to_one ends at timestep 1 − 250 < 0: its last latents are x̂0.
    torch.testing.assert_close(*pairs[-1], atol=1e-5, rtol=0)


def test_the_kernel_of_an_event_takes_rows_with_repeats() -> None:
    ancestors = torch.tensor([2, 2, 0])

    def compare(event: SolverStep) -> None:
        every, some = event.kernel(1.0), event.kernel(1.0, ancestors)
        assert torch.equal(some.mean, every.mean[ancestors]) and torch.equal(some.std, every.std)
        if event.k + 1 < event.total:
            torch.testing.assert_close(event.kernel(0.0).mean, event.prev, atol=1e-5, rtol=0)

    watch(sd("DDIM"), "sd", compare)


def test_a_pipeline_of_the_users_own_is_steered() -> None:
    pipe = GaussianPipeline()
    call = {"batch_size": PARTICLES, "num_inference_steps": 5}
    plain = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    with hook_steps(pipe, lambda event: (torch.tensor([1, 2, 0]), None)) as view:
        shuffled = view(**call, generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(shuffled, plain[torch.tensor([2, 0, 1])])  # five turns of three slots


def test_a_half_precision_run_keeps_its_dtype() -> None:
    pipe = copy.copy(cached_pipe("sd"))
    dtypes: set[torch.dtype] = set()

    def answer_in_fp32(event: SolverStep) -> tuple[None, Tensor]:
        dtypes.update((event.x.dtype, event.prev.dtype))
        return None, event.prev.float()

    for name in ("unet", "vae", "text_encoder"):
        vars(pipe)[name] = copy.deepcopy(getattr(pipe, name)).to(torch.bfloat16)
    assert watch(pipe, "sd", answer_in_fp32).isfinite().all()
    assert dtypes == {torch.bfloat16}


def test_grad_flows_through_the_solver_only_where_asked_for() -> None:
    def latents_need_grad(grad: bool) -> bool:
        flags: list[bool] = []
        pipe = sd("EulerDiscrete")
        with hook_steps(pipe, lambda event: flags.append(event.prev.requires_grad), grad=grad) as view:
            type(pipe).__call__.__wrapped__(view, **call_kwargs("sd", 1, 2), output_type="latent")
        return all(flags)

    assert latents_need_grad(True) and not latents_need_grad(False)


def test_the_pipeline_is_unchanged() -> None:
    pipe = sd("UniPCMultistep")
    scheduler = pipe.scheduler
    attributes, config, class_ = dict(vars(pipe)), dict(pipe.config), type(scheduler)
    state = {name: copy.deepcopy(value) for name, value in vars(scheduler).items()}
    watch(pipe, "sd", lambda event: (torch.tensor([1, 2, 0]), event.prev * 0.9))
    assert vars(pipe).keys() == attributes.keys()
    assert all(value is attributes[name] for name, value in vars(pipe).items())
    assert dict(pipe.config) == config and type(scheduler) is class_ is diffusers.UniPCMultistepScheduler
    assert vars(scheduler).keys() == state.keys() and str(vars(scheduler)) == str(state)


def test_the_view_looks_like_the_pipeline() -> None:
    pipe = sd("DDIM")
    with hook_steps(pipe, lambda event: None) as view:
        assert isinstance(view, type(pipe)) and isinstance(view.scheduler, diffusers.DDIMScheduler)
        assert type(view.scheduler).__name__ == "DDIMScheduler" and view.unet is pipe.unet
        run(view, "sd")


def test_an_error_of_the_hook_reaches_the_caller() -> None:
    def fail(event: SolverStep) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        watch(sd(), "sd", fail)


def test_threads_that_share_one_pipeline_equal_runs_in_turn() -> None:
    pipe = sd("DPMSolverMultistep")

    def one(seed: int) -> Tensor:
        return watch(pipe, "sd", lambda event: (torch.tensor([seed % 3, 2, 0]), None), seed=seed)

    in_turn = [one(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(one, range(4)))
    assert all(torch.equal(a, b) for a, b in zip(in_turn, together, strict=True))


def test_threads_encode_texts_one_at_a_time() -> None:
    """A fast tokenizer keeps the padding of its last call: two calls at once would mix theirs."""
    pipe, inside, most = sd("DDIM"), 0, 0
    encode = pipe.encode_prompt

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)
        inside -= 1
        return encode(*args, **kwargs)

    vars(pipe)["encode_prompt"] = watched
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: watch(pipe, "sd", lambda solver_step: None, seed=seed), range(4)))
    assert most == 1


# --- what is refused, and why


@pytest.mark.parametrize(
    ("name", "reason"), [("IPNDM", "has no add_noise to measure"), ("DDIMInverse", "runs from data to noise")]
)
def test_a_scheduler_that_cannot_be_steered_is_refused(name: str, reason: str) -> None:
    pipe = with_scheduler(cached_pipe("sd"), build(name))
    with pytest.raises(InputError, match=f"{name}Scheduler {reason}"):
        watch(pipe, "sd", lambda event: None)


def test_a_subclass_of_a_verified_scheduler_is_taken() -> None:
    class Mine(diffusers.DDIMScheduler):
        pass

    pipe = with_scheduler(cached_pipe("sd"), Mine.from_config(DIFFUSION["DDIM"]().config))
    assert torch.equal(watch(pipe, "sd", lambda event: None), run(sd("DDIM"), "sd"))


def test_inverted_sigmas_run_from_noise_to_data() -> None:
    pipe = with_scheduler(cached_pipe("sd3"), FLOW["FlowMatchEulerDiscrete"](invert_sigmas=True))
    ends: list[tuple[Tensor, Tensor]] = []
    watch(pipe, "sd3", lambda event: ends.append((event.x0(), event.prev)) and None)
    torch.testing.assert_close(*ends[-1], rtol=1e-4, atol=1e-4)  # the last step ends at its x̂0


def test_edits_between_the_steps_are_part_of_the_transition() -> None:
    """A callback that changes the latents, as inpainting does: particles that trade places end swapped."""

    def edit(pipe: Any, k: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"] * 0.9}

    def swap(event: SolverStep) -> tuple[Tensor, None] | None:
        return (torch.tensor([1, 0, 2]), None) if event.k == 1 else None

    edited = watch(sd(), "sd", lambda event: None, callback_on_step_end=edit)
    assert not torch.equal(edited, run(sd(), "sd"))
    swapped = watch(sd(), "sd", swap, callback_on_step_end=edit)
    torch.testing.assert_close(swapped[[1, 0, 2]], edited, atol=1e-5, rtol=0)


class KnownRegion(diffusers.StableDiffusionPipeline):
    """Puts an image, noised by noise of its own for each row, over half of the latents after each step."""

    @torch.no_grad()
    def __call__(self, steps: int = 4) -> Tensor:
        self.scheduler.set_timesteps(steps)
        x, noise = torch.randn(2, PARTICLES, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        image = torch.ones_like(x)
        for t, after in zip(self.scheduler.timesteps, [*self.scheduler.timesteps[1:], None], strict=True):
            x = self.scheduler.step(x * x.mean((1, 2, 3), keepdim=True), t, x, return_dict=False)[0]
            known = image if after is None else self.scheduler.add_noise(image, noise, after[None])
            x = torch.cat([known[:, :2], x[:, 2:]], 1)
        return x


def test_the_known_region_follows_the_noise_of_its_particle() -> None:
    pipe = copy.copy(sd())
    pipe.__class__ = KnownRegion
    plain = pipe()
    with hook_steps(pipe, lambda event: (torch.tensor([2, 0, 1]), None) if event.k == 1 else None) as view:
        torch.testing.assert_close(view(), plain[[2, 0, 1]], atol=1e-5, rtol=0)


class Guided(diffusers.StableDiffusionPipeline):
    """Guides by a running average over the steps, one row for each particle (HunyuanImage, modular pipelines)."""

    @torch.no_grad()
    def __call__(self, steps: int = 4) -> Tensor:
        self.scheduler.set_timesteps(steps)
        x = torch.randn(PARTICLES, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        for k, t in enumerate(self.scheduler.timesteps):
            self.guider.set_state(k, steps, t)
            self.guider.prepare_inputs({"condition": (x, x)})
            x = self.scheduler.step(self.guider.forward(x * x, -x)[0], t, x).prev_sample
        return x


class GuidedInItsCall(Guided):
    """Keeps the running average in a variable of its call, as ACE-Step does."""

    @torch.no_grad()
    def __call__(self, steps: int = 4) -> Tensor:
        self.scheduler.set_timesteps(steps)
        x = torch.randn(PARTICLES, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        momentum = MomentumBuffer(0.9)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(normalized_guidance(x * x, -x, 3.0, momentum), t, x).prev_sample
        return x


@pytest.mark.parametrize("kind", [Guided, GuidedInItsCall])
def test_the_running_average_of_guidance_follows_its_particle_and_no_call_within_a_call(kind: type) -> None:
    pipe = copy.copy(sd())
    pipe.__class__ = kind
    vars(pipe)["guider"] = diffusers.AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=0.9)
    plain = pipe()

    def move(solver_step: SolverStep) -> tuple[Tensor, None] | None:
        with hook_steps(pipe, lambda event: None) as inner:
            inner(2)
        return (torch.tensor([2, 0, 1]), None) if solver_step.k == 1 else None

    with hook_steps(pipe, move) as view:
        torch.testing.assert_close(view(), plain[[2, 0, 1]], atol=1e-5, rtol=0)


def test_an_autoencoder_of_single_images_decodes_a_batch_row_by_row() -> None:
    pipe = copy.copy(sd())
    plain, vae = run(pipe, "sd"), copy.copy(pipe.vae)

    def decode(z: Tensor, **kwargs: Any) -> Any:
        first = torch.empty_like(z[0])
        first[:] = z if len(z) > 1 else z[0]  # as Allegro's autoencoder fills its input
        return type(vae).decode(vae, first[None], **kwargs)

    vars(vae)["decode"] = decode
    vars(pipe)["vae"] = vae
    with hook_steps(pipe, lambda event: None, rows=PARTICLES) as view:
        torch.testing.assert_close(run(view, "sd"), plain, atol=1e-5, rtol=0)


def test_other_errors_of_an_autoencoder_reach_the_caller() -> None:
    pipe = copy.copy(sd())
    vae = vars(pipe)["vae"] = copy.copy(pipe.vae)

    def decode(z: Tensor, **kwargs: Any) -> Any:
        raise RuntimeError("a broken decoder")

    vars(vae)["decode"] = decode
    with (
        pytest.raises(RuntimeError, match="a broken decoder"),
        hook_steps(pipe, lambda event: None, rows=PARTICLES) as view,
    ):
        run(view, "sd")


def test_a_callback_that_only_looks_is_taken() -> None:
    steps: list[int] = []

    def look(pipe: Any, k: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(k)
        return tensors

    assert torch.equal(watch(sd(), "sd", lambda event: None, callback_on_step_end=look), run(sd(), "sd"))
    assert steps == list(range(STEPS))


def test_a_wrong_number_of_rows_is_refused() -> None:
    with (
        pytest.raises(UnsupportedPipelineError, match="the scheduler was given 3 rows for 5 particles"),
        hook_steps(sd(), lambda event: None, rows=5) as view,
    ):
        run(view, "sd")


class TwoSchedulers(diffusers.StableDiffusionPipeline):
    """Steps a copy of its scheduler beside it, as pipelines of sound and image, or of several views, do."""

    @torch.no_grad()
    def __call__(self, steps: int = 3, second_first: bool = False) -> Tensor:
        self.scheduler.set_timesteps(steps)
        second = copy.deepcopy(self.scheduler)
        x, y = torch.randn(2, PARTICLES, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        for t in self.scheduler.timesteps:
            if second_first:
                y = second.step(y * 0.1, t, y, return_dict=False)[0]
            output = x * y.mean((1, 2, 3), keepdim=True)
            x = self.scheduler.step(output, t, x).prev_sample
            if not second_first:
                y = second.step(y * 0.1, t, y, return_dict=False)[0]
        assert type(self.scheduler) is type(second) is diffusers.DDIMScheduler
        return torch.cat([x, y], 1)


def test_copies_of_the_scheduler_follow_the_same_ancestors() -> None:
    pipe = copy.copy(sd())
    pipe.__class__ = TwoSchedulers
    with hook_steps(pipe, lambda event: None) as view:
        assert torch.equal(view(), pipe())
    with hook_steps(pipe, lambda event: (torch.tensor([2, 0, 1]), None) if event.k == 1 else None) as view:
        torch.testing.assert_close(view(), pipe()[[2, 0, 1]], atol=1e-6, rtol=0)


def test_a_copy_of_the_scheduler_that_steps_first_cannot_be_resampled() -> None:
    pipe = copy.copy(sd())
    pipe.__class__ = TwoSchedulers
    with (
        pytest.raises(UnsupportedPipelineError, match="TwoSchedulers steps a copy of its scheduler before"),
        hook_steps(pipe, lambda event: (torch.arange(PARTICLES), None)) as view,
    ):
        view(second_first=True)


def test_a_feature_cache_is_refused_when_resampling() -> None:
    pipe = copy.copy(cached_pipe("flux"))
    vars(pipe)["transformer"] = copy.deepcopy(pipe.transformer)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    assert pipe.transformer.is_cache_enabled
    watch(pipe, "flux", lambda event: None)
    with pytest.raises(UnsupportedPipelineError, match="disable the feature cache"):
        watch(pipe, "flux", lambda event: (torch.arange(PARTICLES), None))


class PerToken(diffusers.StableDiffusion3Pipeline):
    """Gives every token a timestep of its own."""

    def __call__(self) -> Tensor:
        self.scheduler.set_timesteps(3)
        x = torch.ones(PARTICLES, 4, 2)
        t = self.scheduler.timesteps[0]
        times = torch.full((PARTICLES, 4), float(t))
        return self.scheduler.step(x, t, x, per_token_timesteps=times, return_dict=False)[0]


def test_per_token_timesteps_are_refused() -> None:
    pipe = copy.copy(cached_pipe("sd3"))
    pipe.__class__ = PerToken
    with (
        pytest.raises(UnsupportedPipelineError, match="per-token timesteps have no single noise level"),
        hook_steps(pipe, lambda event: None) as view,
    ):
        view()


class NoSteps(diffusers.StableDiffusionPipeline):
    """Has a scheduler and does not use it."""

    def __call__(self) -> Tensor:
        return torch.ones(1)


def test_a_pipeline_that_never_steps_its_scheduler_is_refused() -> None:
    pipe = copy.copy(sd())
    pipe.__class__ = NoSteps
    with (
        pytest.raises(UnsupportedPipelineError, match="NoSteps never stepped its own scheduler"),
        hook_steps(pipe, lambda event: None) as view,
    ):
        view()
