"""Rewards from text, YAML, names, modules and functions."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from steer.arguments import is_number
from steer.errors import InputError
from steer.registry import did_you_mean, nearest
from steer.reward import Judge, Metadata, Reward, RewardError, as_texts, mean_over_frames
from steer.reward import score_components as reward_scores
from steer.rewards import compose
from steer.rewards.folders import CARD, kind_of, preference
from steer.rewards.grammar import NUMBER, PLUS, Call, read_call, read_constraint, split
from steer.rewards.inputs import as_batch, prompt_of_each
from steer.rewards.names import LISTED, _as_reward, _make, make_reward, registered_name, reward_names
from steer.rewards.remote import RemoteReward, is_remote
from steer.tables import read_text
from steer.yaml_text import read_yaml

T = TypeVar("T")
FILES = (".yaml", ".yml")
MAX_DEPTH = 20  # functions and files inside each other
MAX_REWARDS = 250  # rewards in one expression


@dataclass(frozen=True)
class ParserState:
    """State of the parser: depth inside functions and files, and the rewards read so far.

    named_only  refuse modules, addresses and paths: the text comes from the card of a reward
    """

    depth: int = 0
    read: list[str] = field(default_factory=list)
    named_only: bool = False

    def inside(self) -> "ParserState":
        """Return the state one level deeper. Raises RewardError if that is too deep."""
        if self.depth == MAX_DEPTH:
            raise RewardError(f"a reward nests at most {MAX_DEPTH} functions or files")
        return ParserState(self.depth + 1, self.read, self.named_only)


def read(text: str, state: ParserState | None = None) -> Reward:
    """Parse the text of a reward. Raises RewardError, one line that names the part that cannot be read."""
    part = _weighted(text.strip(), state or ParserState())
    return part.reward if part.weight == 1 else compose.CombinedReward([part])


def _weighted(text: str, state: ParserState) -> compose.WeightedReward:
    """Parse a term, or a sum of terms as one component."""
    if _is_path(text):
        return compose.WeightedReward(_atom(text, state))
    terms = [_term(term, state) for term in split(text, PLUS)]
    return terms[0] if len(terms) == 1 else compose.WeightedReward(compose.CombinedReward(terms))


def _term(text: str, state: ParserState) -> compose.WeightedReward:
    """Parse one term of a sum: a named reward or a function, and its weight."""
    if _is_path(text):
        return compose.WeightedReward(_atom(text, state))
    if call := read_call(text):
        return compose.WeightedReward(_build(call, state.inside(), FUNCTIONS), call.weight)
    name, weight = compose.read_term(text)
    return compose.WeightedReward(_atom(name, state), weight)


def _atom(text: str, state: ParserState) -> Reward:
    """Load a single reward by name, address or folder, or the reward of a YAML file."""
    state.read.append(text)
    if len(state.read) > MAX_REWARDS:
        raise RewardError(f"a reward has at most {MAX_REWARDS} rewards in it")
    if state.named_only and _has_no_name(text):
        raise RewardError(f"{text!r:.80} is not a named reward: {did_you_mean(text, reward_names(), LISTED)}")
    if is_remote(text):
        return RemoteReward(text)
    if text.endswith(FILES) and _has_no_name(text):
        return _read_file(Path(text), state)
    if _is_path(text):
        from steer.rewards.learned import LearnedReward  # imports open_clip, which takes seconds

        return LearnedReward(text) if kind_of(text) == "heads" else preference(text)
    try:
        return make_reward(text)
    except RewardError as error:
        if not re.search(r"\+|,(?![a-z_]+=)", text):
            raise
        raise RewardError(f"{error}; separate terms by ' + ', arguments by ', ', with the spaces") from error


def _is_path(text: str) -> bool:
    """Return whether the whole text is the path of a learned reward's folder or of a YAML file."""
    return os.path.isfile(text if text.endswith(FILES) else os.path.join(text, CARD)) and _has_no_name(text)


def _has_no_name(text: str) -> bool:
    """Return whether a text does not begin with the name of a reward."""
    return bool(text) and registered_name(text.partition(":")[0]) is None


def _build(call: Call, state: ParserState, table: Mapping[str, tuple[Callable[[Call, ParserState], T], Any]]) -> T:
    """Build the object that a call names in a table. Raises RewardError for unknown functions and options."""
    if call.function not in table:
        raise RewardError(
            f"unknown function {call.function!r} of rewards: did you mean {nearest(call.function, table)}?"
        )
    build, allowed = table[call.function]
    if unknown := sorted(set(call.options) - set(allowed)):
        takes = ", ".join(allowed) or "none"
        raise RewardError(f"{call.function}(…): unknown option {unknown[0]!r}; it takes {takes}")
    if not call.arguments:
        raise RewardError(f"{call.function}(…) needs at least one reward")
    return build(call, state)


def _aggregate_function(call: Call, state: ParserState) -> Reward:
    components = [_weighted(argument, state) for argument in call.arguments]
    numbers = {name: call.number(name, 0.0) for name in call.options}
    return compose.CombinedReward(components, compose.aggregate(call.function, numbers, f"{call.function}(…)"))


def _product(call: Call, state: ParserState) -> Reward:
    temperature = call.number("temperature", compose.CONSTRAINT_TEMPERATURE)
    if not temperature > 0:
        raise RewardError(f"product(…, temperature={temperature:g}): it must be above 0")
    constraints = []
    for argument in call.arguments:
        text, sign, bound = read_constraint(argument)
        constraints.append(compose.Constraint(read(text, state), sign, bound, temperature))
    return compose.ProductReward(constraints)


def _standardised(call: Call, state: ParserState) -> Reward:
    if "from" not in call.options:
        raise RewardError("z(…) needs a calibration: z(REWARD, from=FILE), see `steer rewards calibrate`")
    reward = _single_reward(call, state)
    return compose.StandardisedReward(reward, compose.read_calibration(Path(call.options["from"])).scale(reward.name))


def _log_sigmoid(call: Call, state: ParserState) -> Reward:
    if ("from" in call.options) == ("reference" in call.options):
        raise RewardError("logsigmoid(…) needs reference=NUMBER or from=CALIBRATION, one of the two")
    reward, temperature = _single_reward(call, state), call.number("temperature", 1.0)
    if "reference" in call.options:
        return compose.LogSigmoidReward(reward, call.number("reference", 0.0), temperature)
    scale = compose.read_calibration(Path(call.options["from"])).scale(reward.name)
    return compose.LogSigmoidReward(reward, scale.prompts, temperature)


def _lower(call: Call, state: ParserState) -> Reward:
    if "from" not in call.options:
        raise RewardError("lower(…) needs a bound: lower(A, B, from=FILE), see `steer rewards calibrate --bound`")
    from steer.rewards.conformal import LowerBoundReward, read_bound

    rewards = [read(argument, state) for argument in call.arguments]
    return LowerBoundReward(rewards, read_bound(Path(call.options["from"])))


def _fused(call: Call, state: ParserState) -> Reward:
    from steer.rewards.fused import FusedReward, read_paraphrases, scene_wordings

    file = call.options.get("paraphrases")
    wordings, option = (read_paraphrases(Path(file)), f", paraphrases={file}") if file else (scene_wordings, "")
    return FusedReward(_single_reward(call, state), wordings, option)


def _single_reward(call: Call, state: ParserState) -> Reward:
    if len(call.arguments) != 1:
        raise RewardError(f"{call.function}(…) takes one reward, got {len(call.arguments)}")
    return read(call.arguments[0], state)


JUDGE = "judge:"


def names_judge(text: str) -> bool:
    """Return whether a text is a judge: it begins with `judge:` or is a function of JUDGES. Raises RewardError."""
    return text.startswith(JUDGE) or bool((call := read_call(text)) and call.function in JUDGES)


def read_judge(text: str, state: ParserState | None = None) -> Judge:
    """Parse the text of a judge. Raises RewardError.

    hierarchy(A > MARGIN, B > MARGIN, C)       `judges.HierarchyJudge`; from=CALIBRATION: margins of one deviation
    as-judge(REWARD, temperature=T)            `judges.RewardJudge`
    http://HOST/v1,model=NAME                  `judges.EndpointJudge`
    any other reward                           a learned reward's own comparison, or as-judge(REWARD)
    """
    from steer.rewards import judges

    text, inside = text.strip().removeprefix(JUDGE), (state or ParserState()).inside()
    if is_remote(text) and ",model=" in text:
        from steer.rewards.vlm import endpoint

        return judges.EndpointJudge(_make(endpoint, "judge", text))
    if (call := read_call(text)) and call.function in JUDGES:
        return _build(call, inside, JUDGES)
    reward = read(text, inside)
    return reward if isinstance(reward, Judge) else judges.RewardJudge(reward)


def load_judge(judge: Any) -> Judge:
    """Return the judge for a Judge, for a text (`read_judge`), or for anything that `load_reward` takes."""
    if isinstance(judge, str | Path):
        return read_judge(str(judge))
    if isinstance(judge, Judge):
        return judge
    from steer.rewards.judges import as_judge

    return as_judge(load_reward(judge))


def _hierarchy(call: Call, state: ParserState) -> Judge:
    from steer.rewards.judges import Factor, HierarchyJudge

    file, factors = call.options.get("from"), []
    for argument in call.arguments:
        written = re.fullmatch(rf"(.+?)\s*>\s*({NUMBER})", argument, re.DOTALL)
        reward = read(written[1] if written else argument, state)
        margin = float(written[2]) if written else 0.0
        if file and not written:
            margin = compose.read_calibration(Path(file)).scale(reward.name).std
        factors.append(Factor(reward, margin))
    return HierarchyJudge(factors)


def _as_judge(call: Call, state: ParserState) -> Judge:
    from steer.rewards.judges import RewardJudge

    return RewardJudge(_single_reward(call, state), call.number("temperature", 1.0))


def _tournament(call: Call, state: ParserState) -> Reward:
    from steer.rewards.judges import Tournament

    if len(call.arguments) != 1:
        raise RewardError(f"tournament(…) takes one judge, got {len(call.arguments)}")
    return Tournament(read_judge(call.arguments[0], state))


JUDGES: dict[str, tuple[Callable[[Call, ParserState], Judge], Sequence[str]]] = {
    "hierarchy": (_hierarchy, ("from",)),
    "as-judge": (_as_judge, ("temperature",)),
}
FUNCTIONS: dict[str, tuple[Callable[[Call, ParserState], Reward], Sequence[str]]] = {
    **{name: (_aggregate_function, compose.OPTIONS.get(name, ())) for name in compose.AGGREGATES},
    "product": (_product, ("temperature",)),
    "tournament": (_tournament, ()),
    "z": (_standardised, ("from",)),
    "lower": (_lower, ("from",)),
    "fused": (_fused, ("paraphrases",)),
    "logsigmoid": (_log_sigmoid, ("from", "reference", "temperature")),
}


def _read_file(path: Path, state: ParserState) -> Reward:
    try:
        data = read_yaml(read_text(path), str(path))
    except OSError as error:
        raise RewardError(f"{path}: cannot read the reward file ({error.strerror})") from error
    except InputError as error:
        raise RewardError(str(error)) from error
    if not isinstance(data, Mapping):
        raise RewardError(f"{path}: expected a mapping with `rewards:`")
    return read_mapping(data, str(path), state)


OPTION_KEYS = ("lam", "q", "gamma")
KEYS = ("combine", "rewards", *OPTION_KEYS)


def _is_weights(data: Mapping[Any, Any]) -> bool:
    """Return whether a mapping goes from rewards to weights."""
    rewards = all(isinstance(key, str | Path) or callable(key) for key in data)
    reserved = {*KEYS, "reward", "weight"}
    return bool(data) and rewards and not reserved & set(data) and all(map(is_number, data.values()))


def read_mapping(data: Mapping[str, Any], where: str = "reward mapping", state: ParserState | None = None) -> Reward:
    """Load the reward of a mapping in the form of a YAML file:

        combine: sum            # sum, mean, min, mean-std, quantile or robust
        rewards:
          - reward: hpsv2.1     # any text that `read` parses, or a mapping of this form
            weight: 5
          - logsigmoid(imagereward, reference=0)
        lam: 1                  # for mean-std;  q: for quantile;  gamma: for robust

    or of a mapping from rewards to weights, {hpsv2.1: 5, imagereward: 1}: their weighted sum.
    Raises RewardError, which names the position in the mapping and the remedy.
    """
    if _is_weights(data):
        data = {"rewards": [{"reward": reward, "weight": weight} for reward, weight in data.items()]}
    if unknown := sorted(set(map(str, data)) - set(KEYS)):
        near = nearest(unknown[0], KEYS)
        raise RewardError(f"{where}: unknown key {unknown[0]!r:.80}; did you mean {near}? Weights are finite numbers")
    name, entries = data.get("combine", "sum"), data.get("rewards")
    if not isinstance(name, str) or name not in compose.AGGREGATES:
        raise RewardError(f"{where}: `combine:` must be one of {', '.join(compose.AGGREGATES)}")
    if not isinstance(entries, list | tuple) or not entries:
        raise RewardError(f"{where}: `rewards:` must be a list of rewards")
    aggregator = compose.aggregate(name, {key: data[key] for key in OPTION_KEYS if key in data}, where)
    inside = (state or ParserState()).inside()
    return compose.CombinedReward(
        [_entry(entry, f"{where}, reward {k}", inside) for k, entry in enumerate(entries, 1)], aggregator
    )


def _entry(entry: Any, where: str, state: ParserState) -> compose.WeightedReward:
    entry = entry if isinstance(entry, Mapping) and not _is_weights(entry) else {"reward": entry}
    data, weight = entry.get("reward"), entry.get("weight", 1)
    if set(entry) - {"reward", "weight"} or "reward" not in entry or not is_number(weight):
        raise RewardError(f"{where}: expected a text, or `reward:` and a finite number under `weight:`")
    try:
        if isinstance(data, str | Path):
            return compose.WeightedReward(read(str(data), state), weight)
        if isinstance(data, list | tuple):
            data = {"rewards": data}
        if isinstance(data, Mapping):
            return compose.WeightedReward(read_mapping(data, "its mapping", state), weight)
        return compose.WeightedReward(load_reward(data), weight)
    except RewardError as error:
        raise RewardError(f"{where}: {error}") from error


def load_reward(reward: Any) -> Reward:
    """Return the Reward for a Reward, for a function (images, prompts) → (N,), or for a specification.

    A specification is
    - NAME or NAME:ARGUMENT, a weighted sum of them ("hpsv2.1:5 + imagereward:1") or a function of them ("min(a, b)"),
    - the path of a learned reward's folder or of a YAML file,
    - a mapping from rewards to weights ({"hpsv2.1": 5, "imagereward": 1}) or a list of rewards: their sum,
    - a mapping in the form of a YAML file (`read_mapping`).

    The result is called as reward(images, prompts) with images and prompts in every form of `steer.rewards.inputs`.
    A function may name its parameters images and prompts in any order, or take them by keyword alone.
    Raises RewardError with the nearest names for an unknown name.
    """
    if isinstance(reward, str | Path):
        return read(str(reward))
    if isinstance(reward, Mapping):
        return read_mapping(reward)
    if isinstance(reward, list | tuple):
        return read_mapping({"rewards": reward}, "reward list")
    return _as_reward(reward)


def score(images: Any, prompts: str | Sequence[str], reward: Any, metadata: Metadata | None = None) -> Tensor:
    """Score images: (N,) finite fp32 numbers on the CPU, gradients kept.

    images, prompts  in every form of `steer.rewards.inputs`, such as `out.images` and the prompt; or a list of texts
    reward           anything that `load_reward` takes; load it once if it is called often
    metadata         one mapping per image, for rewards that take it
    Raises RewardError, which names the reward, if the reward raises or breaks its contract.
    """
    return score_components(images, prompts, reward, metadata)[0]


def score_components(
    images: Any, prompts: str | Sequence[str], reward: Any, metadata: Metadata | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Score images as `score` does, and return the scores (N,) of the reward's components by name as well."""
    if isinstance(images, str | Path | Mapping) or callable(images):
        got = f"{images!r:.60}" if isinstance(images, str | Path) else type(images).__name__
        raise RewardError(f"write score(images, prompts, reward): the images come first, got {got}")
    loaded = load_reward(reward)
    if (samples := as_texts(images)) is not None:
        return reward_scores(loaded, samples, prompt_of_each(len(samples), prompts), metadata)  # type: ignore[arg-type]
    batch, texts = as_batch(images, prompts)
    return mean_over_frames(batch, lambda frames: reward_scores(loaded, frames, texts, metadata), loaded)


def combine(
    rewards: Mapping[Any, float] | Sequence[Any], aggregate: compose.Aggregate = compose.total
) -> compose.CombinedReward:
    """Aggregate rewards, by default to Σ w_m r_m: a mapping from rewards to weights, or a list (weights 1).

    Each reward is anything that `load_reward` takes.
    """
    weighted = rewards.items() if isinstance(rewards, Mapping) else [(reward, 1.0) for reward in rewards]
    components = [compose.WeightedReward(load_reward(reward), weight) for reward, weight in weighted]
    return compose.CombinedReward(components, aggregate)
