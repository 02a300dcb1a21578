"""Settings of the steering methods, one dataclass per method, and of the training of a learned value.

Each field, with its type, range, default and help, is defined only here. The signature of the pipeline's call, options
of `steer sample` and `steer evaluate`, the recipe inside a PNG and the fields of the demo are derived from the fields.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from steer.arguments import IMAGES_PER_PROMPT, Settings, argument, option
from steer.errors import InputError

AUTO = "auto"  # a choice that depends on the other settings or on the run
RACE_LOOKAHEAD = 6  # coarse steps of a race's look-ahead: at the first solver step it is a draft of the image
ADAPTER = "lora:"  # before the PATH of a few-step adapter for the look-ahead
Prompts = str | Sequence[str] | None


@dataclass(frozen=True, kw_only=True)
class CallSettings(Settings):
    """Arguments of every method's call.

    num_particles  K, images for each prompt; also as num_images_per_prompt
    chunk_size     images decoded and scored at a time
    reward_prompt  text for the reward in place of the prompt; needed with prompt_embeds
    output_type    pil, np, pt or latent
    """

    num_particles: int = argument(4, "[1, inf]")
    chunk_size: int = argument(8, "[1, inf]")
    reward_prompt: str | Sequence[str] | None = argument(None)
    output_type: str = argument("pil", choices=("pil", "np", "pt", "latent"))


@dataclass(frozen=True, kw_only=True)
class StepSettings(CallSettings):
    """Arguments of methods that act on the solver steps of one run.

    eta            noise η of every solver step, from 0 to 1; by default the solver's own
    on_step        observer of every solver step, called with a StepReport; an exception from it ends the run
    preview_steps  further solver steps, from 0, at which on_step gets previews, by a look-ahead of at least 3 steps.
                   These previews are not scored, and change no image
    """

    eta: float | None = argument(None, "[0, 1]")
    on_step: Callable[[Any], None] | None = argument(None)
    preview_steps: Iterable[int] | None = argument(())


@dataclass(frozen=True, kw_only=True)
class IntermediateSettings(StepSettings):
    """Arguments of methods with intermediate rewards.

    lookahead    coarse solver steps from x_t to the end, whose result is scored in place of x̂0; 1 is x̂0, each further
                 step costs an evaluation. Or lora:PATH, one step with an LCM or Turbo adapter
    value        learned value in place of intermediate rewards: a folder of `steer value train`, or a function of a
                 SolverStep and the prompts of its rows. Nothing is decoded or scored before the end; it excludes a
                 look-ahead
    kernel       transition of steps with noise: gaussian; or glass, a draw of x0 given x_t by an inner ODE
                 (arXiv 2509.25170) of glass_steps steps, each of which costs an evaluation after the first
    glass_steps  inner steps of kernel="glass"
    preview      decoder of x̂0 for the reward: full, the pipeline's VAE; linear, a map fitted to the first previews; or
                 a small autoencoder (tiny, a folder, ORGANISATION/NAME on the command line, an object in Python).
                 Finished images are always decoded by the VAE
    """

    lookahead: int | str = option(1, "[1, inf]")
    value: Any = option(None)
    kernel: str = option("gaussian", choices=("gaussian", "glass"))
    glass_steps: int = option(2, "[2, inf]")
    preview: Any = option("full")

    def __post_init__(self) -> None:
        super().__post_init__()
        default, adapter = self.field("lookahead").default, str(self.lookahead).removeprefix(ADAPTER)
        if isinstance(self.lookahead, str) and self.lookahead != default and adapter in ("", self.lookahead):
            raise self.error(f"lookahead must be a number of steps, or {ADAPTER}PATH, got {self.lookahead!r}")
        if self.value is not None and self.lookahead not in (1, default):
            raise self.error("value and lookahead exclude each other: leave one out")
        if self.kernel != "glass" and self.glass_steps != self.field("glass_steps").default:
            raise self.error("glass_steps is an option of kernel='glass' alone: leave it out")


@dataclass(frozen=True, kw_only=True)
class FKSettings(IntermediateSettings):
    """Settings of Feynman–Kac steering (arXiv 2501.06848).

    lam                     strength λ of the reward: images are drawn from p(x0) exp(λ r(x0)); 0 gives the pipeline's
                            own batch. auto: the λ that gives an ESS of half the particles, on average over prompts, at
                            the first evaluation whose rewards differ; the output reports this λ
    potential               potential G_j: difference, max, sum or now. Or a function of a path's rewards
    resampler               systematic, stratified, residual, ssp or multinomial. Or a function
    tempering               schedule of λ along the run: constant, geometric or ess. Or a function
    resample_steps          solver steps, from 0, with intermediate rewards; by default at 40, 55, 70 and 85 % of the
                            run, with reward_guidance all steps from 1 on
    ess_threshold           resample when the ESS is below this share of K (adaptive); 1: at every one of resample_steps
    reward_guidance         γ in the shift γ τ² λ_j ∇r(x̂0) of the kernel's mean at resample_steps, which the weights
                            correct; 1 is DAS. The reward must be differentiable. With value=, ∇V at the kernel's mean
                            in place of ∇r(x̂0): no decoder in the graph, one more evaluation, and any reward
    particle_schedule       particles of each prompt from a solver step on, such as 8:4,14:2 or {8: 4, 14: 2}. Numbers
                            decrease; rewards are evaluated at these steps too, and dropped particles have no images
    particle_schedule_rule  selection of the particles that continue: resample, by weight; or top_k, by reward, a search
    target_reward           intermediate reward at which the best particle alone continues, without further resampling.
                            One prompt per call; a search, whose log-weights and log-normaliser are 0
    asynchronous_rewards    decode and score in the background during the next denoiser call, and resample one step
                            later
    draw                    first image of each prompt: best, with the highest reward; or weighted, a draw by the final
                            weights. The others are sorted by reward
    on_disagreement         called with a `Disagreement` before a resampling about which the members of a learned
                            ensemble, or the terms of a weighted sum, disagree; if it returns False, the particles of
                            the prompt stay with their weights, and the distribution is the same
    ask_cost                value of asking above which on_disagreement is called, in standard deviations of the rewards
    eta                     noise η of every solver step, from 0 to 1; by default the solver's own. With None and 0, all
                            particles take the kernel with η = 1 where they may be resampled. With reward_guidance every
                            step takes the kernel, by default with η = 1
    """

    lam: float | str = option("auto", "(-inf, inf)", choices=("auto",), label="strength", slider=(0, 100, 1))
    potential: str | Callable[..., Any] = option("difference", choices="steer.smc.potentials:POTENTIALS")
    resampler: str | Callable[..., Any] = option("systematic", choices="steer.smc.resampling:RESAMPLERS")
    tempering: str | Callable[..., Any] = option("constant", choices="steer.smc.potentials:TEMPERINGS")
    resample_steps: Iterable[int] | None = option(None)
    ess_threshold: float = option(0.5, "(0, 1]")
    reward_guidance: float = option(0.0, "[0, inf)")
    particle_schedule: Mapping[int, int] | None = option(None)
    particle_schedule_rule: str = option("resample", choices="steer.pipelines.fk_steering:PARTICLE_SCHEDULE_RULES")
    target_reward: float | None = option(None, "(-inf, inf)")
    asynchronous_rewards: bool = option(False)
    draw: str = option("best", choices="steer.pipelines.particle_batch:DRAWS")
    on_disagreement: Callable[[Any], bool] | None = argument(None)
    ask_cost: float = argument(0.05, "[0, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {"lookahead": self.lookahead != 1, "value": self.value is not None}
        given |= {f"kernel={self.kernel!r}": self.kernel != "gaussian"}
        pairs = [("asynchronous_rewards", other) for other in given] + [("target_reward", "value")]
        pairs += [("reward_guidance", other) for other in given if other != "value"]
        for name, other in pairs:
            if given[other] and getattr(self, name):
                raise self.error(f"{name} and {other} exclude each other: leave one out")
        if self.lam == "auto" and self.tempering == "ess":
            raise self.error("lam='auto' and tempering='ess' both choose λ by the ESS: give lam a number")
        if self.draw != "best" and self.is_search:
            raise self.error(
                f"draw={self.draw!r}: target_reward and particle_schedule_rule='top_k' leave no weights: "
                "use draw='best'"
            )
        if self.on_disagreement is not None and (self.is_search or self.value is not None):
            raise self.error("on_disagreement asks about resampling by rewards: leave out value and searches")
        if self.asynchronous_rewards and self.reward_guidance:
            raise self.error("asynchronous_rewards: reward_guidance needs the gradient in the step: leave one out")
        before = self.num_particles
        for step, count in sorted((self.particle_schedule or {}).items()):
            if not 1 <= count < before:
                raise self.error(
                    f"particle_schedule: {count} particles from step {step} on, of {before}: they must be fewer and "
                    "fewer, and at least 1"
                )
            before = count

    @property
    def is_search(self) -> bool:
        """Whether particles may be chosen by reward alone, which leaves no weights."""
        return self.target_reward is not None or (
            bool(self.particle_schedule) and self.particle_schedule_rule == "top_k"
        )


@dataclass(frozen=True, kw_only=True)
class SelectionSettings(IntermediateSettings):
    """Settings of per-step selection: SVDD (arXiv 2408.08252) with one beam, beam search with several.

    beams         B of the K candidates that continue from each step, with K/B children each. 1 is SVDD, K a plain batch
    lam           candidates are drawn without replacement with probability ∝ exp(λ r(x̂0)); inf takes the best
    select_steps  solver steps, from 0, at which candidates are scored and chosen; by default all but the last
    eta           noise η of every solver step, from 0 to 1, by which candidates differ. None: the solver's own; with
                  None and 0, children of one candidate diverge by a step with η = 1
    """

    beams: int = option(1, "[1, inf]")
    lam: float = option(math.inf, "(-inf, inf]")
    select_steps: Iterable[int] | None = option(None)
    eta: float | None = argument(1.0, "[0, 1]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_particles % self.beams:
            raise self.error(f"beams must divide num_particles, got {self.beams} of {self.num_particles}")


@dataclass(frozen=True, kw_only=True)
class RacingSettings(IntermediateSettings):
    """Settings of racing: many starts, of which the best by intermediate reward continue from every rung.

    num_particles  K₀, starts of each prompt, without a budget. The images are the particles left by the last rung
    lookahead      coarse solver steps of a look-ahead, as for fk. auto: 6, which at the first step give a draft of the
                   image; with a budget as many as the budget and the run allow (`plan_race`); none with a value
    budget         denoiser evaluations for each prompt, from which K₀, the rungs and the look-ahead follow
                   (`plan_race`). It excludes num_particles
    rungs          particles of each prompt that continue from a solver step on, such as 5:4,10:2 or {5: 4, 10: 2}. By
                   default a sixth of K₀ from the first step on; with a look-ahead of fewer than 4 steps a quarter at
                   25 % of the run, and an eighth at 50 %; with branches all at 25, 40, 60 %
    branches       children of each survivor of a rung: of n particles that continue, the best n/branches survive, with
                   this many children each. 1: survivors alone
    eta            noise η of every solver step, from 0 to 1; by default the solver's own. With None and 0, children of
                   one survivor diverge by a step with η = 1
    """

    budget: int | None = option(None, "[1, inf]")
    rungs: Mapping[int, int] | None = option(None)
    branches: int = option(1, "[1, inf]")
    num_particles: int = argument(12, "[1, inf]")
    lookahead: int | str = option(AUTO, "[1, inf]")

    @property
    def chosen_lookahead(self) -> int | str:
        """The look-ahead of a race without a budget."""
        if self.lookahead != AUTO:
            return self.lookahead
        return RACE_LOOKAHEAD if self.value is None else 1

    @property
    def evaluations(self) -> int:
        """Evaluations for an intermediate reward, including the solver step's own."""
        chosen = self.chosen_lookahead
        return 2 if isinstance(chosen, str) else chosen  # an adapter needs one more than x̂0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.num_particles != self.field("num_particles").default:
            raise self.error("budget and num_particles exclude each other: starts follow from a budget, leave one out")
        if self.budget is not None and self.rungs is not None:
            raise self.error("budget and rungs exclude each other: rungs follow from a budget, leave one out")
        before = self.num_particles
        for step, count in sorted((self.rungs or {}).items()):
            if not 1 <= count <= before - (self.branches == 1):
                raise self.error(
                    f"rungs: {count} particles from step {step} on, of {before}: they must be fewer and fewer (with "
                    "branches, no more), and at least 1"
                )
            if count % self.branches:
                raise self.error(f"branches must divide the particles of each rung, got {self.branches} of {count}")
            before = count


@dataclass(frozen=True, kw_only=True)
class DraftsSettings(StepSettings):
    """Settings of drafts: images of few solver steps, of which the best are made again in full from their noise.

    num_particles  K, images for each prompt
    drafts         M, few-step images of each prompt that the reward ranks
    draft_steps    S, solver steps of a draft
    finish         run the starts of the best K drafts in full; false returns the best K drafts themselves
    """

    drafts: int = option(16, "[1, inf]")
    draft_steps: int = option(5, "[1, inf]")
    finish: bool = option(True, flags=("--finish/--no-finish",))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drafts < self.num_particles:
            raise self.error(f"drafts must be at least num_particles, {self.num_particles}, got {self.drafts}")


@dataclass(frozen=True, kw_only=True)
class RenoiseSettings(StepSettings):
    """Settings of draft-and-renoise: the best drafts are noised to the level of a solver step and finished from there.

    num_particles  K, images for each prompt: K/parents copies of each draft, with noise of their own
    drafts         M, few-step images of each prompt that the reward ranks
    draft_steps    S, solver steps of a draft
    parents        number of drafts of each prompt that are renoised
    restart_step   solver step, from 0, at whose noise level the copies start; by default at 40 % of the run
    """

    drafts: int = option(16, "[1, inf]")
    draft_steps: int = option(5, "[1, inf]")
    parents: int = option(1, "[1, inf]")
    restart_step: int | None = option(None, "[0, inf]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_particles % self.parents:
            raise self.error(f"parents must divide num_particles, got {self.parents} of {self.num_particles}")
        if self.drafts < self.parents:
            raise self.error(f"drafts must be at least parents, {self.parents}, got {self.drafts}")


@dataclass(frozen=True, kw_only=True)
class BestOfNSettings(StepSettings):
    """Settings of best-of-N: the pipeline's own batch, sorted by reward.

    preview_steps  solver steps, from 0, at which x̂0 is decoded and scored for on_step and the history. The images do
                   not change; None: the default resample_steps of FKSettings
    lookahead      coarse solver steps from x_t to the end, whose result is shown and scored in place of x̂0
    """

    preview_steps: Iterable[int] | None = argument(())
    lookahead: int = argument(1, "[1, inf]")


@dataclass(frozen=True, kw_only=True)
class IterationSettings(CallSettings):
    """Settings of methods that optimise the starting noise, iteration by iteration.

    num_particles  K, seeds for each prompt; every image is a search of its own
    iterations     evaluations of the reward for each image
    target_reward  reward at which a search is finished; the run ends once all searches are
    state_file     file saved after every iteration, from which the same call resumes
    on_iteration   observer of every iteration; the run ends if it returns true
    """

    num_particles: int = argument(1, "[1, inf]")
    iterations: int = option(50, "[1, inf]", slider=(1, 100, 1))
    target_reward: float | None = option(None, "(-inf, inf)")
    state_file: Any = argument(None)
    on_iteration: Callable[[Any], bool | None] | None = argument(None)


@dataclass(frozen=True, kw_only=True)
class ReNOSettings(IterationSettings):
    """Settings of ReNO (arXiv 2406.04312).

    optimiser       sgd (Nesterov) or adam. Or an object of steer.noise
    lr              learning rate; by default the optimiser's own: sgd 5 (published for 16,384 numbers), adam 0.05
    regularisation  weight of log p(‖ε‖), which keeps the norm of the noise near the norm of a normal draw
    max_grad_norm   norm to which the gradient of each image is clipped
    gradient        backprop; or zero-order, for any reward. Or an object of steer.pipelines.reno
    patience        iterations without a better reward after which a search ends, or restarts from new noise
    restarts        restarts of each search when its patience runs out
    max_slope       end a search with its best earlier image where the norm of the reward's gradient is above this many
                    times the median at the first images; a guard against over-optimisation
    gradient_checkpointing  recompute activations in the backward pass: true, false, or auto: above 16,384 elements of
                    noise times solver steps, or a billion weights
    """

    optimiser: Any = option("sgd", choices="steer.noise:OPTIMISERS")
    lr: float | None = option(None, "(0, inf)")
    regularisation: float = option(0.01, "[0, inf)")
    max_grad_norm: float = option(0.1, "(0, inf)")
    gradient: Any = option("backprop", choices="steer.pipelines.reno:GRADIENTS")
    patience: int | None = option(None, "[1, inf]")
    restarts: int = option(0, "[0, inf]")
    max_slope: float | None = option(None, "[1, inf)")
    gradient_checkpointing: bool | str = argument("auto")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restarts and self.patience is None:
            raise self.error(f"restarts must be at least 0, and need a patience, got {self.restarts}")
        if self.gradient_checkpointing not in ("auto", True, False):
            raise self.error(f"gradient_checkpointing must be true, false or auto, got {self.gradient_checkpointing!r}")


@dataclass(frozen=True, kw_only=True)
class NoiseSearchSettings(IterationSettings):
    """Settings of the search among neighbours of the best noise, the control of ReNO.

    neighbours  images of each search in an iteration
    distance    distance d from a noise ε to its neighbours √(1 − d²) ε + d u; 1 is best-of-N
    """

    iterations: int = option(12, "[1, inf]")
    neighbours: int = option(4, "[1, inf]")
    distance: float = option(0.5, "(0, 1]")


@dataclass(frozen=True, kw_only=True)
class MapElitesSettings(IterationSettings):
    """Settings of MAP-Elites (arXiv 1504.04909).

    num_particles  K, children in each iteration, and images, which are the best elites
    describe       one or two descriptors: rewards separated by ", "; or pca:CLIP, principal axes of the CLIP features
                   of the first images
    cells          intervals of each descriptor, such as 8 or 8x8
    distance       distance d from an elite's noise ε to its child's √(1 − d²) ε + d u
    first_batches  batches of new noise in the first iteration, by which the intervals are chosen
    """

    num_particles: int = argument(4, "[1, inf]")
    iterations: int = option(24, "[1, inf]")
    describe: str = option("brightness, jpeg")
    cells: str = option("8x8")
    distance: float = option(0.5, "(0, 1]")
    first_batches: int = option(4, "[1, inf]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2})?", self.cells):
            raise self.error(f"cells must be a number such as 8, or two such as 8x8, up to 999, got {self.cells!r:.40}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of intervals of each descriptor."""
        return tuple(int(size) for size in self.cells.split("x"))


@dataclass(frozen=True, kw_only=True)
class ValueConfig(Settings):
    """Settings of the training of a learned value.

    rollouts       number of sampled images, whose steps and rewards are the training data
    num_particles  images of each prompt in one call
    updates        optimiser steps
    batch_size     latents of one optimiser step
    learning_rate  step size of AdamW
    width          channels of the first convolution
    held_out       share of the rollouts (the last ones) held out: half choose the best weights, half measure R² by step
    seed           random seed of the rollouts and the training
    """

    rollouts: int = option(4000, "[16, inf]")
    num_particles: int = option(4, "[1, inf]", flags=("--particles",))
    updates: int = option(4000, "[1, inf]")
    batch_size: int = option(256, "[1, inf]")
    learning_rate: float = option(1e-3, "(0, inf)")
    width: int = option(64, "[1, 1024]")
    held_out: float = option(0.1, "(0, 0.5]")
    seed: int = option(0, "[0, inf]")


def read_arguments(kind: type[Settings], arguments: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Split the arguments of a call into settings and arguments of the pipeline. Raises InputError."""
    names = {one.name for one in fields(kind)}
    if counts := [name for name in IMAGES_PER_PROMPT if name in arguments]:
        if "num_particles" in arguments or len(counts) > 1:
            raise InputError(f"{counts[0]} and num_particles are the same: give one of them")
        arguments = {"num_particles": arguments[counts[0]]} | {n: v for n, v in arguments.items() if n != counts[0]}
    given = {name: value for name, value in arguments.items() if name in names}
    return kind(**given), {name: value for name, value in arguments.items() if name not in names}
