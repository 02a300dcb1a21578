"""Rewards as text and as YAML.

    NAME[:ARGUMENT][,option=value…][:WEIGHT]          hpsv2.1:5    clip:scenes    brightness:0.3:2
    A + B + …                                         the weighted sum
    mean(A, B)  min(A, B)                             over the weighted rewards
    mean-std(A, B, lam=1)  quantile(A, B, q=0.25)
    product(A > 0.3, B < 2, temperature=0.05)         each constraint softly met
    z(A, from=calibration.json)                       standardised
    logsigmoid(A, reference=0.2, temperature=1)       or from=calibration.json: each prompt's own reference
    FOLDER                                            a learned reward;  FILE.yaml  the same as a mapping

A number at the end is a weight, except behind a reward whose own argument is a number (brightness). Terms are parted
by " + ", arguments by ", ": names hold neither.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from steer.choices import nearest
from steer.reward import Reward, RewardError, load_reward, make_reward, takes_number
from steer.rewards.aggregate import AGGREGATES
from steer.rewards.combine import SHARPNESS, Combined, Constraint, Part, Product
from steer.rewards.learned import Learned, is_learned
from steer.rewards.transform import LogSigmoid, Standardised, read_calibration

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
DEEPEST = 20  # functions inside functions


@dataclass(frozen=True)
class Call:
    """A function of rewards as it was written: its rewards or constraints, and its options."""

    function: str
    arguments: tuple[str, ...]
    options: Mapping[str, str]


def read(text: str, depth: int = 0) -> Reward:
    """The reward that a text stands for. Raises RewardError, one line that names what cannot be read."""
    text = text.strip()
    if is_learned(Path(text)):
        return Learned(text)
    if text.endswith((".yaml", ".yml")):
        return _read_file(Path(text))
    if depth > DEEPEST:
        raise RewardError(f"reward {text[:40]!r}…: more than {DEEPEST} functions inside each other")
    terms = [_term(part, depth) for part in split(text, r"\s+\+\s+")]
    return terms[0].reward if len(terms) == 1 and terms[0].weight == 1 else Combined(terms)


def split(text: str, separator: str) -> list[str]:
    """Parts of a text at a separator (a pattern) that stands in no parentheses."""
    parts, depth, start = [], 0, 0
    for found in re.finditer(rf"\(|\)|{separator}", text):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if depth == 0 and found[0] not in "()":
            parts.append(text[start : found.start()])
            start = found.end()
    if depth != 0:
        raise RewardError(f"reward {text!r}: a parenthesis is not closed, or never opened")
    return [part.strip() for part in (*parts, text[start:])]


def _term(text: str, depth: int) -> Part:
    """One term of a sum: an atom or a function, and its weight."""
    if written := re.fullmatch(rf"([a-z-]+)\((.*)\)(?::({NUMBER}))?", text, re.DOTALL):
        return Part(_function(_call(written[1], written[2]), depth), float(written[3] or 1))
    name, *rest = text.split(":")
    weighted = len(rest) > (1 if takes_number(name) else 0) and re.fullmatch(NUMBER, rest[-1])
    if weighted:
        return Part(_atom(text.rpartition(":")[0]), float(rest[-1]))
    return Part(_atom(text))


def _atom(text: str) -> Reward:
    return Learned(text) if is_learned(Path(text)) else make_reward(text)


def _call(function: str, inside: str) -> Call:
    pieces = split(inside, r",\s+")
    options = {m[1]: m[2] for piece in pieces if (m := re.fullmatch(r"([a-z]+)=(\S+)", piece))}
    arguments = tuple(piece for piece in pieces if not re.fullmatch(r"([a-z]+)=(\S+)", piece))
    return Call(function, arguments, options)


def _function(call: Call, depth: int) -> Reward:
    if call.function not in FUNCTIONS:
        raise RewardError(
            f"unknown function {call.function!r} of rewards: did you mean {nearest(call.function, FUNCTIONS)}?"
        )
    build, allowed = FUNCTIONS[call.function]
    if unknown := sorted(set(call.options) - set(allowed)):
        takes = ", ".join(allowed) or "none"
        raise RewardError(f"{call.function}(…): unknown option {unknown[0]!r}; it takes {takes}")
    if not all(call.arguments):
        raise RewardError(f"{call.function}(…) needs at least one reward")
    return build(call, depth + 1)


def _aggregated(call: Call, depth: int) -> Reward:
    parts = [_term(argument, depth) for argument in call.arguments]
    numbers = {name: _number(call, name, 0.0) for name in call.options}
    if not 0 <= numbers.get("q", 0.0) <= 1:
        raise RewardError(f"quantile(…, q={numbers['q']:g}): q is from 0 to 1")
    named = [part.reward.name if part.weight == 1 else f"{part.reward.name}:{part.weight:g}" for part in parts]
    inside = ", ".join([*named, *(f"{name}={number:g}" for name, number in numbers.items())])
    return Combined(parts, partial(AGGREGATES[call.function], **numbers), f"{call.function}({inside})")


def _product(call: Call, depth: int) -> Reward:
    temperature = _number(call, "temperature", SHARPNESS)
    if not temperature > 0:
        raise RewardError(f"product(…, temperature={temperature:g}): it must be above 0")
    constraints = []
    for argument in call.arguments:
        if not (read_as := re.fullmatch(rf"(.+?)\s*([<>])\s*({NUMBER})", argument)):
            raise RewardError(f"product(…): {argument!r} is no constraint; write REWARD > NUMBER or REWARD < NUMBER")
        constraints.append(Constraint(read(read_as[1], depth), read_as[2], float(read_as[3]), temperature))
    return Product(constraints)


def _standardised(call: Call, depth: int) -> Reward:
    reward = _only(call, depth)
    if "from" not in call.options:
        raise RewardError(
            f"z({reward.name}) needs a calibration: z({reward.name}, from=FILE), see `steer rewards calibrate`"
        )
    return Standardised(reward, read_calibration(Path(call.options["from"])).scale(reward.name))


def _log_sigmoid(call: Call, depth: int) -> Reward:
    reward, temperature = _only(call, depth), _number(call, "temperature", 1.0)
    if ("from" in call.options) == ("reference" in call.options):
        raise RewardError(f"logsigmoid({reward.name}) needs reference=NUMBER or from=CALIBRATION, one of the two")
    if "reference" in call.options:
        return LogSigmoid(reward, _number(call, "reference", 0.0), temperature)
    return LogSigmoid(reward, read_calibration(Path(call.options["from"])).scale(reward.name).prompts, temperature)


def _only(call: Call, depth: int) -> Reward:
    if len(call.arguments) != 1:
        raise RewardError(f"{call.function}(…) takes one reward, got {len(call.arguments)}")
    return read(call.arguments[0], depth)


def _number(call: Call, name: str, default: float) -> float:
    given = call.options.get(name)
    if given is not None and not re.fullmatch(NUMBER, given):
        raise RewardError(f"{call.function}(…): {name} must be a number, got {given!r}")
    return default if given is None else float(given)


FUNCTIONS: dict[str, tuple[Callable[[Call, int], Reward], Sequence[str]]] = {
    "mean": (_aggregated, ()),
    "min": (_aggregated, ()),
    "mean-std": (_aggregated, ("lam",)),
    "quantile": (_aggregated, ("q",)),
    "product": (_product, ("temperature",)),
    "z": (_standardised, ("from",)),
    "logsigmoid": (_log_sigmoid, ("from", "reference", "temperature")),
}


def _read_file(path: Path) -> Reward:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RewardError(f"{path}: cannot read the reward file ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RewardError(f"{path}: not YAML ({' '.join(str(error).split())[:100]})") from error
    if not isinstance(found, Mapping):
        raise RewardError(f"{path}: expected a mapping with `rewards:`")
    return read_mapping(found, str(path))


def read_mapping(found: Mapping[str, Any], where: str = "reward mapping") -> Reward:
    """The reward of a mapping, as a YAML file holds it:

        combine: sum            # sum, mean, min, mean-std or quantile
        rewards:
          - reward: hpsv2.1     # anything that `read` reads
            weight: 5
          - reward: logsigmoid(imagereward, reference=0)
        lam: 1                  # of mean-std;  q: of quantile

    Raises RewardError that names the place and the remedy.
    """
    known = {"combine", "rewards", "lam", "q"}
    if unknown := sorted(set(map(str, found)) - known):
        raise RewardError(f"{where}: unknown key {unknown[0]!r}; did you mean {nearest(unknown[0], known)}?")
    name, entries = found.get("combine", "sum"), found.get("rewards")
    if name not in AGGREGATES:
        raise RewardError(f"{where}: combine: {name!r} is none of {', '.join(AGGREGATES)}")
    if not isinstance(entries, list) or not entries:
        raise RewardError(f"{where}: `rewards:` must be a list of rewards")
    numbers = {key: found[key] for key in ("lam", "q") if key in found}
    parts = [_entry(entry, f"{where}, reward {k}") for k, entry in enumerate(entries, start=1)]
    if wrong := set(numbers) - {"mean-std": {"lam"}, "quantile": {"q"}}.get(name, set()):
        raise RewardError(f"{where}: {name} takes no {sorted(wrong)[0]!r}")
    if not all(isinstance(number, int | float) for number in numbers.values()):
        raise RewardError(f"{where}: lam and q must be numbers")
    return Combined(parts, partial(AGGREGATES[name], **numbers))


def _entry(entry: Any, where: str) -> Part:
    if not isinstance(entry, Mapping):
        return Part(load_reward(entry))
    weight = entry.get("weight", 1)
    if set(entry) - {"reward", "weight"} or "reward" not in entry or not isinstance(weight, int | float):
        raise RewardError(f"{where}: expected a text, or `reward:` and a number under `weight:`")
    return Part(load_reward(entry["reward"]), float(weight))
