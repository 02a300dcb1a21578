"""Questions to a person whether a run is to continue, where its rewards disagree about the latest evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, pstdev

from steer.pipelines.disagreement import value_of_asking
from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.distributed import AccelerateContext
from steer.pipelines.training.events import Stopped, StopRequest
from steer.pipelines.training.method import Record
from steer.pipelines.training.state import RunState

PREFIX, MEMBER, DEVIATION = "eval/", "eval/member/", "eval/deviation/"  # prefixes of names in an evaluation's record
REFUSED = "the answer was no: the best weights by the held-out reward are kept"
UNANSWERED = "an answer is needed"


@dataclass(frozen=True)
class Question:
    """The question whether to continue after update `step`.

    kept_step  update of the best earlier evaluation, by the first held-out reward
    gains      gain of each reward since then, in its standard deviations over the images of the first evaluation; the
               rewards are the trained one, or each member of an ensemble, and the held-out ones
    mean, deviation  m and s of the gains, over the rewards
    value      value of asking, in the same unit (`steer.pipelines.disagreement.value_of_asking`)
    """

    step: int
    kept_step: int
    gains: dict[str, float]
    mean: float
    deviation: float
    value: float


OnQuestion = Callable[[Question, Callable[[], None]], bool | None]
"""A function that answers a question: True to continue, False to end with the best weights, None if nobody can answer.
Its second argument is a function that raises once the run is to end: call it several times a second while waiting."""


def question_of(state: RunState, config: TrainingConfig) -> Question | None:
    """Return the question that is open at the present update of a run, or None.

    There is no question before the second evaluation, or if asking is worth at most its cost.
    """
    evaluations = state.evaluations
    if not config.ask or len(evaluations) < 2 or evaluations[-1]["step"] != state.step:
        return None
    first, *_, last = evaluations
    trained, *held_out = [name for name, value in last.items() if isinstance(value, list)]
    kept = max(evaluations[:-1], key=lambda record: _mean(record, held_out[0]))  # the earliest of equals
    members = [name for name in last if name.startswith(MEMBER)]
    gains = {}
    for name in [*(members or [trained]), *held_out]:
        short = name.removeprefix(PREFIX)
        gains[short] = (_mean(last, name) - _mean(kept, name)) / (first[f"{DEVIATION}{short}"] or 1.0)
    mean, deviation = fmean(gains.values()), pstdev(gains.values())
    value = value_of_asking(mean, deviation)
    return Question(last["step"], kept["step"], gains, mean, deviation, value) if value > config.ask_cost else None


def _mean(record: Record, name: str) -> float:
    value = record[name]
    return value[0] if isinstance(value, list) else value


def ask(
    question: Question, on_question: OnQuestion | None, request: StopRequest, context: AccelerateContext
) -> str | None:
    """Ask in the main process; return the reason to end the run, None to continue, in all processes.

    Raises Stopped if the end of the run is requested meanwhile.
    """
    answer: list[bool | None] = [None]  # empty: the run is to end
    if context.is_main_process and on_question is not None:
        try:
            answer = [on_question(question, request.check_own)]
        except Stopped:
            answer = []
    answer = context.gather([answer])[0]
    if not answer:
        raise Stopped
    return {True: None, False: REFUSED, None: UNANSWERED}[answer[0]]
