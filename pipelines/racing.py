"""Racing: successive halving of many starts by the intermediate rewards of one run, and races for a budget."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch import Generator

from steer.diffusion.batching import ActiveRows
from steer.diffusion.seeds import spread_generators
from steer.diffusion.step_hooks import RunEnded, SolverStep
from steer.diffusion.value import Value
from steer.diffusion.views import with_modules, without_side_effects, zero_proxies
from steer.errors import InputError
from steer.pipelines.base import SteeringOutput, SteeringPipeline, steering_call
from steer.pipelines.fk_steering import (
    ResampleResult,
    ResamplingSchedule,
    Run,
    learned_value,
    route_kernel_eta,
    run_particles,
)
from steer.pipelines.particle_batch import ParticleBatch
from steer.pipelines.selection import Selection, SelectionRun
from steer.pipelines.settings import AUTO, RACE_LOOKAHEAD, Prompts, RacingSettings
from steer.reward import Reward
from steer.smc.particles import Particles

DRAFT_LOOKAHEAD = 4  # with this many coarse steps, a look-ahead from the first step is a draft of the image
DRAFTS_PER_SURVIVOR = 6
LOOKAHEAD_SHARE = 0.3  # of the run: the most coarse steps that a budget is spent on
DEFAULT_RUNGS = ((0.25, 4), (0.5, 8))  # shares of the run, and the divisors of K₀ there
BRANCHING_RUNGS = (0.25, 0.4, 0.6)  # shares of the run at which all slots continue as children: beam search


class RacingPipeline(SteeringPipeline):
    """Racing: at every rung, the starts with the best intermediate rewards continue; the rest cost nothing further.

    pipe = StableDiffusionPipeline.from_pretrained(...)
    race = RacingPipeline(pipe, reward="scene-soft")
    out = race("a red circle left of a blue star", num_particles=16, rungs={5: 4, 10: 2})
    out = race("a red circle left of a blue star", budget=160)  # denoiser evaluations
    """

    @steering_call(RacingSettings)
    def __call__(self, prompt: Prompts, settings: RacingSettings, call: dict[str, Any]) -> SteeringOutput:
        """Race in one call of the pipeline; all other arguments go to the pipeline's own `__call__`.

        Errors and output are as in `FKSteeringPipeline`. This is a search, without a known distribution:
        `log_weights` and `log_normaliser` are 0. The images are the particles that remain after the last rung.
        """
        s = settings
        if s.kernel == "glass" and s.branches == 1 and not s.eta:
            raise s.error("branches=1 without eta: no step has noise for kernel='glass' to draw, use more branches")
        call, kernel_eta = route_kernel_eta(self.pipe, call, s)
        race, call = self._race(prompt, s, call)
        live = ActiveRows()
        pipe = self.pipe if race.rungs == {} else live.view(self.pipe)

        def make_run(particle_batch: ParticleBatch) -> Run:
            return RacingRun(particle_batch, kernel_eta, race.rungs, s, learned_value(s, self, call))

        batch: dict[str, Any] = {"pipe": pipe, "size": race.starts, "preview": s.preview, "live": live}
        return run_particles(self, prompt, s, call, make_run, lookahead=race.lookahead, **batch)

    def _race(self, prompt: Prompts, s: RacingSettings, call: dict[str, Any]) -> tuple["Race", dict[str, Any]]:
        """Return the race, and the call; a list of generators is spread over the starts of the race."""
        if s.budget is None:
            return Race(s.num_particles, s.rungs, s.chosen_lookahead), call
        if call.get("latents") is not None:
            raise InputError("budget and latents exclude each other: the starts follow from the budget, leave one out")
        first, groups = first_solver_step(self.pipe, self.reward, prompt, call, s.reward_prompt)
        chooses, generator = s.lookahead == AUTO and s.value is None, call.get("generator")
        race = plan_race(s.budget, first.total, s.branches, None if chooses else s.evaluations)
        race = race if chooses else replace(race, lookahead=s.chosen_lookahead)
        if generator is None or isinstance(generator, Generator):
            return race, call
        return race, call | {"generator": spread_generators(generator, groups, race.starts)}


@dataclass(frozen=True)
class Race:
    """A race.

    starts     K₀
    rungs      particles that continue from each rung, by solver step; None: the default rungs
    lookahead  coarse steps of a look-ahead, or its adapter
    """

    starts: int
    rungs: Mapping[int, int] | None = None
    lookahead: int | str = 1


def default_rungs(starts: int, steps: int, branches: int = 1, lookahead: int = 1) -> dict[int, int]:
    """Return the default rungs of K₀ starts in a run of T steps, by the evaluations of a look-ahead.

    A look-ahead of four or more steps gives a draft of the image at the first step: ⌈K₀/6⌉ continue from there. With
    fewer steps, ⌈K₀/4⌉ continue from step T/4 and ⌈K₀/8⌉ from T/2. With branches, all of K₀, rounded down to a multiple
    of `branches`, from 25, 40 and 60 % of the run. A rung is left out if it would leave as many starts, or if the run
    is too short for it.
    """
    if branches > 1:
        whole = starts // branches * branches
        places = [min(round(share * steps), steps - 2) for share in BRANCHING_RUNGS]
        return {step: whole for step in places if step >= 0 and whole}
    if lookahead >= DRAFT_LOOKAHEAD:
        return {0: math.ceil(starts / DRAFTS_PER_SURVIVOR)} if starts > 1 and steps > 1 else {}
    rungs: dict[int, int] = {}
    alive = starts
    for share, divisor in DEFAULT_RUNGS:
        count, step = math.ceil(starts / divisor), min(round(share * steps), steps - 1)
        if count < alive:
            rungs[step] = alive = count
    return rungs


def race_cost(starts: int, rungs: Mapping[int, int], steps: int, lookahead: int = 1) -> int:
    """Return the denoiser evaluations of a race over T transitions of one evaluation each.

    With k_0 = K₀ particles up to the first rung s_1, k_1 up to s_2, …, and m − 1 further evaluations of a look-ahead:

        k_0 (s_1 + 1) + k_1 (s_2 − s_1) + … + k_J (T − 1 − s_J) + (m − 1) (k_0 + … + k_{J−1})
    """
    cost, alive, before = 0, starts, -1
    for step, count in sorted(rungs.items()):
        further = min(lookahead, steps - step) - 1  # a look-ahead has no more steps than the run has left
        cost += alive * (step - before + further)
        alive, before = count, step
    return cost + alive * (steps - 1 - before)


def plan_race(budget: int, steps: int, branches: int = 1, lookahead: int | None = 1) -> Race:
    """Return the race with the most starts whose cost is within the budget, with the default rungs of a run of T steps.

    lookahead  evaluations m of an intermediate reward. None: the largest m that leaves six starts, of at most 6 and at
               most 30 % of the run, rounded; if none leaves six, the m with the most starts, the larger one of two

    Raises InputError for a budget below the cost of a race of two starts.
    """
    most = max(min(RACE_LOOKAHEAD, round(LOOKAHEAD_SHARE * steps)), 1)
    choices = range(most, 0, -1) if lookahead is None else (lookahead,)
    races = [race for m in choices if (race := _largest_race(budget, steps, branches, m)).starts >= 2]
    if not races:
        least = min(race_cost(2, default_rungs(2, steps, branches, m), steps, m) for m in choices)
        raise InputError(
            f"budget: {budget} evaluations are too few for a race over {steps} steps: give at least {least}, or "
            "fewer steps"
        )
    return next((race for race in races if race.starts >= DRAFTS_PER_SURVIVOR), max(races, key=lambda one: one.starts))


def _largest_race(budget: int, steps: int, branches: int, lookahead: int) -> Race:
    """Return the race with the most starts within the budget, of at least one start."""

    def rungs(starts: int) -> dict[int, int]:
        return default_rungs(starts, steps, branches, lookahead)

    starts = 1
    while race_cost(starts + 1, rungs(starts + 1), steps, lookahead) <= budget:
        starts += 1
    return Race(starts, rungs(starts), lookahead)


def first_solver_step(
    pipe: Any, reward: Reward, prompt: Prompts, call: Mapping[str, Any], texts: Prompts
) -> tuple[SolverStep, int]:
    """Return the first solver step of a call, of one image of each prompt, and the number of prompts.

    Denoisers are not evaluated, and no generator of the call advances.
    """
    quiet = without_side_effects(pipe)
    own = {name: value for name, value in call.items() if name != "generator"}
    batch = ParticleBatch(pipe, reward, prompt, 1, own, texts)

    def stop(solver_step: SolverStep) -> NoReturn:
        raise RunEnded(solver_step)

    try:
        batch.sample(stop, with_modules(quiet, zero_proxies(quiet)), generator=Generator().manual_seed(0))
    except RunEnded as ended:
        return ended.value, batch.groups
    raise AssertionError("hook_steps raises for a pipeline that never steps its scheduler")


class RacingRun(SelectionRun):
    """A run whose slots get fewer at each rung and continue from the survivors (successive halving).

    for each solver step t → s:
        x_s ~ p(x_s | x_t)
        at a rung, where n of k particles continue:
            r = r(Φ_m(x_t))                         _intermediate_rewards, by look-ahead of m coarse steps
            a = the n/branches largest r            _select
            x_s ← x_s^a, further children of one survivor ~ p_η(x_s | x_t^a)
    """

    steps_argument = "rungs"
    settings: RacingSettings

    def __init__(
        self,
        particle_batch: ParticleBatch,
        eta: float | None,
        rungs: Mapping[int, int] | None,
        s: RacingSettings,
        value: Value | None,
    ) -> None:
        """Create a run with the `rungs` of the race, None for the defaults; other arguments are as in `Run`."""
        super().__init__(Selection(1), particle_batch, eta, ResamplingSchedule(()), s, value)
        self.rungs = rungs

    def begin(self, total: int, scheduler: Any) -> None:
        """Set the rungs. Raises InputError for rungs that a run of `total` steps does not have."""
        if self.rungs is None:
            branches, evaluations = self.settings.branches, self.settings.evaluations
            self.rungs = default_rungs(self.particle_batch.size, total, branches, evaluations)
        last = total - (1 if self.settings.branches == 1 else 2)  # children diverge by the noise of a later step
        if wrong := sorted(step for step in self.rungs if not 0 <= step <= last):
            raise InputError(f"rungs: {wrong[0]} is not from 0 to {last}, in a run of {total} steps")
        self.steps = frozenset(self.rungs)

    def _select(self, reweighted: Particles, step: int) -> ResampleResult:
        """Select the survivors of a rung, with their children."""
        assert self.rungs is not None, "set at the first step"
        count = self.rungs[step]
        return Selection(count // self.settings.branches).select(reweighted, self.particle_batch.rng, count)
