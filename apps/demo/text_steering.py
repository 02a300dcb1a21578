"""The job of the Text tab: steer the texts of one prompt, with an event for each step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from steer.apps.demo.steering import MEMORY_HINT, NOTHING_KEPT_HINT, Loading, Step
from steer.apps.demo.studio import Studio, Ticket
from steer.apps.errors import wrap_errors
from steer.apps.methods import METHODS, Job
from steer.apps.sampling import base_output
from steer.apps.settings import SamplingConfig
from steer.pipelines.base import Cost, SteeringOutput
from steer.pipelines.fk_steering import StepReport


@dataclass(frozen=True)
class Token:
    """A place of a text: its word; predicted, not yet drawn, if the place is masked."""

    word: str
    masked: bool


@dataclass(frozen=True)
class TextFrame:
    """The particles after step `step` of `total`, from 1: their tokens, and rewards if the step is evaluated.

    ess        ESS before resampling
    ancestors  by slot; None in a method without resampling
    """

    step: int
    total: int
    texts: tuple[tuple[Token, ...], ...]
    rewards: tuple[float, ...] | None = None
    ess: float | None = None
    ancestors: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ScoredText:
    """A finished text, its reward, and the reward's components."""

    text: str
    reward: float
    components: dict[str, float]


@dataclass(frozen=True)
class TextResult:
    """The finished texts of a prompt, best first, and the texts of the same seed without steering, if any."""

    prompt: str
    settings: SamplingConfig
    texts: tuple[ScoredText, ...]
    base: tuple[ScoredText, ...]
    cost: Cost


def text_steering(studio: Studio, prompt: str, settings: SamplingConfig) -> Callable[[Ticket], None]:
    """Make a job for the worker that sends Loading, Step, TextFrame and, at the end, TextResult events.

    Raises InputError for a reward that visitors may not use.
    """
    reward = studio.reward(settings.reward)

    def work(ticket: Ticket) -> None:
        ticket.say(Loading(settings.model))
        with wrap_errors("this run", NOTHING_KEPT_HINT, MEMORY_HINT), studio.model(settings.model) as pipe:
            ticket.say(steer_texts(Job(pipe, reward, prompt, settings, state_file=None), ticket.say))

    return work


def steer_texts(job: Job, say: Callable[[Any], None]) -> TextResult:
    """Steer the texts of a job; `say` receives the events of its steps, and may raise to end the job."""
    live = LiveTokens(job.pipe, job.settings.method, say)
    steps = tuple(range(max((job.settings.steps or 0) - 1, 0)))
    watched = replace(
        job,
        on_step=live.on_step,
        preview_steps=steps,
        early_previews=steps if job.settings.method == "fk" else (),  # svdd and beam search evaluate every step
        arguments={"callback_on_step_end": live.on_end},
    )
    output = METHODS[job.settings.method].run(watched)
    base = base_output(job, output)
    return TextResult(
        prompt=job.prompt,
        settings=job.settings,
        texts=scored_texts(output),
        base=() if base is None else scored_texts(base[1]),
        cost=output.cost,
    )


def scored_texts(output: SteeringOutput) -> tuple[ScoredText, ...]:
    """Return the texts of an output of one prompt with their scores."""
    rewards, components = output.rewards[0].tolist(), {name: one[0].tolist() for name, one in output.components.items()}
    return tuple(
        ScoredText(text, rewards[n], {name: scores[n] for name, scores in components.items()})
        for n, text in enumerate(output.images)
    )


class LiveTokens:
    """Observer that makes a TextFrame from each step: the solver's ids, and the words predicted at masked places."""

    def __init__(self, pipe: Any, method: str, say: Callable[[Any], None]) -> None:
        self._pipe, self._method, self._say = pipe, method, say
        self._report: StepReport | None = None
        self._predicted: Tensor | None = None  # x̂0 (K, L) of the latest evaluation, in the slots after resampling

    def on_step(self, report: StepReport) -> None:
        """Store the rewards of a step, which precede its ids."""
        self._report = report
        self._say(Step(0, 1, self._method, report.step + 1, report.total))
        if report.previews is not None:
            own = report.evaluation
            self._predicted = report.previews if own is None else report.previews[own.ancestors[0]]

    def on_end(self, pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        """Send the ids after a step; the pipeline's callback."""
        report, self._report = self._report, None
        texts = tuple(map(self._tokens, values["latents"].tolist(), self._guesses(values["latents"])))
        own = None if report is None else report.evaluation
        total = len(pipe.scheduler.timesteps)
        if own is None:
            self._say(TextFrame(step + 1, total, texts))
        else:
            ancestors = own.ancestors[0]
            rewards, ess = tuple(own.rewards[0, ancestors].tolist()), own.ess[0].item()
            self._say(TextFrame(step + 1, total, texts, rewards, ess, tuple(ancestors.tolist())))
        return values

    def _guesses(self, ids: Tensor) -> list[list[int]]:
        predicted = self._predicted
        known = predicted is not None and predicted.shape == ids.shape
        return predicted.tolist() if known and predicted is not None else ids.tolist()

    def _tokens(self, ids: Sequence[int], predicted: Sequence[int]) -> tuple[Token, ...]:
        """Return the places of a text, without begin tokens, and without padding at open places."""
        special = {self._pipe.tokenizer.bos_token_id, self._pipe.tokenizer.pad_token_id}
        return tuple(
            Token(self._word(guess if one == self._pipe.mask_id else one), one == self._pipe.mask_id)
            for one, guess in zip(ids, predicted, strict=True)
            if one not in special
        )

    def _word(self, token: int) -> str:
        """Return the word of a token; "" for padding and for a mask without a prediction."""
        return str(self._pipe.tokenizer.decode([token], skip_special_tokens=True)).strip()
