"""Rewards as text and as YAML: what a text is worth, what is refused and how, and that reading stays harmless."""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer import rewards
from steer.reward import Reward, RewardError, score, score_components
from steer.rewards import learned
from steer.rewards.compose import (
    CombinedReward,
    Constraint,
    LogSigmoidReward,
    ProductReward,
    RewardStatistics,
    StandardisedReward,
    WeightedReward,
    mean,
    mean_minus_std,
    quantile,
    total,
    worst,
)
from steer.rewards.parser import CARD, MAX_DEPTH, MAX_REWARDS, load_reward

IMAGES = torch.tensor([[0.75, 0.25, 0.5], [0.25, 0.5, 1.0]])[:, :, None, None]


class Column:
    """One channel of an image's first pixel."""

    differentiable = True

    def __init__(self, channel: int) -> None:
        self.name, self._channel = "abc"[channel], channel

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images[:, self._channel, 0, 0]


class Labelled:
    """Takes an argument, which may be a number, and an option; gives the length of the argument."""

    differentiable = False
    takes_number = True

    def __init__(self, label: str, scale: str = "1") -> None:
        self.name, self._label, self._scale = f"label:{label}", label, float(scale)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.full((len(images),), self._scale * len(self._label))


class Named(Labelled):
    """The same, but a number at its end is a weight."""

    takes_number = False

    def __init__(self, label: str) -> None:
        super().__init__(label)
        self.name = f"named:{label}"


class Column0(Column):
    """A class that takes no argument."""

    def __init__(self) -> None:
        super().__init__(0)


def blue(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A plain function."""
    return images[:, 2, 0, 0]


blue.name, blue.differentiable = "blue", True  # type: ignore[attr-defined]


def a() -> Column:
    return Column(0)


def b() -> Column:
    return Column(1)


def c() -> Column:
    return Column(2)


@pytest.fixture(autouse=True, scope="module")
def table() -> Any:
    """The rewards a, b, c, label:… and named:… beside the built-in ones; this file as the module `steer_example`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "steer_example", sys.modules[__name__])
        for name in ("a", "b", "c"):
            patch.setitem(rewards.REWARDS, name, (f"steer_example:{name}", "a channel"))
        patch.setitem(rewards.REWARDS, "label", ("steer_example:Labelled", "its length"))
        patch.setitem(rewards.REWARDS, "named", ("steer_example:Named", "its length"))
        yield


def values(reward: Any) -> list[float]:
    return score(load_reward(reward), IMAGES, ["p", "q"]).tolist()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Image 0 has a = ¾, b = ¼, c = ½, image 1 has ¼, ½, 1; its luma is .299 a + .587 b + .114 c.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [0.75, 0.25]),
        (" a ", [0.75, 0.25]),
        ("a:2", [1.5, 0.5]),
        ("a:-0.5", [-0.375, -0.125]),
        ("a:+2", [1.5, 0.5]),
        ("a:.5", [0.375, 0.125]),
        ("a:2.", [1.5, 0.5]),
        ("a:1e-2", [0.0075, 0.0025]),
        ("a:1.5E+1", [11.25, 3.75]),
        ("a:-2.5e1", [-18.75, -6.25]),
        ("a:0 + b", [0.25, 0.5]),
        ("a + b", [1.0, 0.75]),
        ("a:2 + b:-4 + c", [1.0, -0.5]),
        ("a  +\n b", [1.0, 0.75]),
        ("a + a + a:2", [3.0, 1.0]),
        ("brightness:0.435", [0.993, 0.95275]),
        ("brightness:0.435:2", [1.986, 1.9055]),
        ("brightness:1", [0.428, 0.48225]),  # a target: 1 − |luma − 1|
        ("brightness:0", [0.572, 0.51775]),  # a target: 1 − luma, not nothing
        ("brightness", [0.428, 0.48225]),
        ("colour:#BF4080", None),
        ("label:281", [3, 3]),
        ("label:281:2", [6, 6]),
        ("label:281,scale=10", [30, 30]),
        ("label:281,scale=10:2", [60, 60]),
        ("label:scale=10,label=four", [40, 40]),
        ("named:281:2", [6, 6]),
        ("label:jack-o'-lantern", [15, 15]),
        ("named:jack-o'-lantern:0.5 + a:0", [7.5, 7.5]),
        ("label:tiger cat", [9, 9]),
        ("a:0 + label:tiger cat:2 + named:a+b", [21, 21]),
        ("min(label:tiger cat, named:black-and-tan coonhound)", [9, 9]),
        ("named:1,000 cats", [10, 10]),
        ("named:(round) ones", [12, 12]),
        ("sum(a, b)", [1.0, 0.75]),
        ("mean(a, b)", [0.5, 0.375]),
        ("mean(a:2, b)", [0.875, 0.5]),
        ("mean(a + b:2, c)", [0.875, 1.125]),
        ("min(a, b)", [0.25, 0.25]),
        ("min(a, b):4 + c", [1.5, 2.0]),
        ("min(a)", [0.75, 0.25]),
        ("mean-std(a, b)", [0.25, 0.25]),
        ("mean-std(a, b, lam=2)", [0.0, 0.125]),
        ("mean-std(lam=-1, a, b)", [0.75, 0.5]),
        ("quantile(a, b, c)", [0.375, 0.375]),
        ("quantile(a, b, c, q=0.5)", [0.5, 0.5]),
        ("robust(a, b, gamma=0.5)", [0.375, 0.3125]),
        ("product(a > 0.75, temperature=1)", [0.5, sigmoid(-0.5)]),
        ("product(a>0.25, b < 0.5, temperature=0.25)", [sigmoid(2) * sigmoid(1), 0.25]),
        ("product(a + b > 1, c < 5e-1)", [0.25, sigmoid(-5) * sigmoid(-10)]),
        ("product(product(a > 0.75) > 0.5, temperature=1)", [0.5, sigmoid(sigmoid(-10) - 0.5)]),
        ("product(a:-1 < -0.75):2", [1.0, 2 * sigmoid(-10)]),
        ("logsigmoid(a, reference=0.25)", [math.log(sigmoid(0.5)), math.log(0.5)]),
        ("logsigmoid(a + b, reference=-1, temperature=2)", [math.log(sigmoid(1)), math.log(sigmoid(0.875))]),
        ("min(a, mean(b, c:2, min(a, b)))", [0.5, 0.25]),
        ("min(\n  a,\n  b\n)", [0.25, 0.25]),
        ("steer_example:Column0", [0.75, 0.25]),
        ("steer_example:Column0:2", [1.5, 0.5]),
        ("steer_example:Column0:2 + min(steer_example:blue:-1, c)", [1.0, -0.5]),
    ],
)
def test_texts_by_hand(text: str, expected: list[float] | None) -> None:
    if expected is None:
        assert len(values(text)) == 2
    else:
        assert values(text) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown reward ''"),
        ("   ", "unknown reward ''"),
        ("jpegg", "unknown reward 'jpegg': did you mean jpeg"),
        ("a + ", "unknown reward 'a +'"),
        ("a +  + b", "unknown reward ''"),
        ("a + nosuch:2", "unknown reward 'nosuch': `steer rewards` lists the names"),
        ("a+b", "unknown reward 'a+b': `steer rewards` lists the names"),
        ("a+b", "separate terms by ' + ', arguments by ', ', with the spaces"),
        ("min(a,b)", "unknown reward 'a,b'"),
        ("min(a,b)", "arguments by ', ', with the spaces"),
        ("a:x", "reward 'a' takes no argument, got 'x'"),
        ("a:2:3", "reward 'a' takes no argument, got '2'"),
        ("a:nan", "reward 'a' takes no argument, got 'nan'"),
        ("a:1e999", "the weight of reward 'a' must be a finite number, got inf"),
        ("min(a, b):-1e999", "the weight of reward 'min(a, b)' must be a finite number, got -inf"),
        ("named", "reward 'named' needs an argument, NAME:ARGUMENT"),
        ("named:x,scale=2", "reward 'named' cannot take 'x,scale=2'"),
        ("label:x,scale=much", "reward 'label' cannot be made: ValueError: could not convert"),
        ("(a + b)", "unknown reward '(a + b)'"),
        ("min(a, b", "reward 'min(a, b': a parenthesis is not closed, or never opened"),
        ("min(a, b))", "a parenthesis is not closed, or never opened"),
        ("a) + (b", "a parenthesis is not closed, or never opened"),
        ("min(a), max(b)", "a parenthesis is not closed, or never opened"),
        ("max(a, b)", "unknown function 'max' of rewards: did you mean"),
        ("means(a, b)", "unknown function 'means' of rewards: did you mean mean"),
        ("min()", "min(…) needs at least one reward, and none that is empty"),
        ("min(a, )", "min(…) needs at least one reward, and none that is empty"),
        ("mean-std(lam=1)", "mean-std(…) needs at least one reward"),
        ("min(a, q=0.5)", "min(…): unknown option 'q'; it takes none"),
        ("quantile(a, lam=1)", "quantile(…): unknown option 'lam'; it takes q"),
        ("quantile(a, q=1.5)", "quantile(…): q must be a number from 0 to 1"),
        ("quantile(a, q=half)", "quantile(…): q must be a finite number, got 'half'"),
        ("quantile(a, q=)", "quantile(…): q must be a finite number, got ''"),
        ("mean-std(a, lam=1e999)", "mean-std(…): lam must be a finite number, got '1e999'"),
        ("clip:scenes,unit=cosine,unit=logit", "unit= is given 2 times: give it once"),
        ("mean-std(a, lam=1, lam=2)", "mean-std(…): an option is given twice"),
        ("product(a)", "product(…): 'a' is no constraint; write REWARD > NUMBER or REWARD < NUMBER"),
        ("product(a >= 1)", "product(…): 'a >= 1' is no constraint"),
        ("product(a > b)", "product(…): 'a > b' is no constraint"),
        ("product(a > 1e999)", "constraint a > inf"),
        ("product(a > 1, temperature=0)", "product(…, temperature=0): it must be above 0"),
        ("product(a > 1, temperature=-1)", "product(…, temperature=-1): it must be above 0"),
        ("z(a)", "z(…) needs a calibration: z(REWARD, from=FILE), see `steer rewards calibrate`"),
        ("z(a, from=gone.json)", "gone.json: cannot read the calibration (No such file"),
        ("z(a, b, from=gone.json)", "z(…) takes one reward, got 2"),
        ("logsigmoid(a)", "logsigmoid(…) needs reference=NUMBER or from=CALIBRATION, one of the two"),
        ("logsigmoid(a, reference=1, from=x)", "logsigmoid(…) needs reference=NUMBER or from=CALIBRATION, one"),
        ("logsigmoid(a, reference=low)", "logsigmoid(…): reference must be a finite number, got 'low'"),
        ("logsigmoid(a, reference=1, temperature=0)", "logsigmoid(a): the temperature must be a number above 0, got 0"),
        ("gone.yaml", "gone.yaml: cannot read the reward file (No such file"),
        ("a + gone.yml:2", "gone.yml: cannot read the reward file (No such file"),
        ("steer_example:nosuch", "cannot load reward 'steer_example:nosuch': AttributeError"),
        ("steer_example:blue:b", "cannot load reward 'steer_example:blue:b': AttributeError"),
        ("steer_example:nosuch:2 + a", "cannot load reward 'steer_example:nosuch': AttributeError"),
        ("no.such:thing + a", "cannot load reward 'no.such:thing': ModuleNotFoundError"),
        ("x" * 5000, "unknown reward 'xxx"),
        ("a\0b", "unknown reward 'a\\x00b'"),
        ("min(" * (MAX_DEPTH + 1) + "a" + ")" * (MAX_DEPTH + 1), f"nests at most {MAX_DEPTH} functions or files"),
        ("min(" * 9000 + "a" + ")" * 9000, f"a reward nests at most {MAX_DEPTH} functions or files"),
        ("z(" * 9000, "a parenthesis is not closed, or never opened"),
        (" + ".join(["a"] * (MAX_REWARDS + 1)), f"a reward has at most {MAX_REWARDS} rewards in it"),
    ],
    ids=lambda value: value[:40],
)
def test_texts_that_cannot_be_read_are_refused_in_one_line(text: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(RewardError) as raised:
        load_reward(text)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert time.monotonic() - started < 1


def test_a_long_text_is_read() -> None:
    assert values(" + ".join(["a:0.01"] * 200)) == pytest.approx([1.5, 0.5])
    assert values("min(" * MAX_DEPTH + "a" + ")" * MAX_DEPTH) == [0.75, 0.25]
    assert values("a" + " " * 100_000 + "+ b") == [1.0, 0.75]


def test_a_number_is_known_to_be_an_argument_without_loading_the_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, ...]] = []

    class Heavy(Labelled):
        def __init__(self, *label: str) -> None:
            made.append(label)
            super().__init__(*label)

    monkeypatch.setattr(sys.modules[__name__], "Heavy", Heavy, raising=False)
    monkeypatch.setitem(rewards.REWARDS, "heavy", ("steer_example:Heavy", "has weights to load"))
    assert [load_reward(f"heavy:281{weight}").name for weight in ("", ":2")] == ["label:281", "label:281:2"]
    assert made == [("281",), ("281",)]


def test_names_tell_what_was_written() -> None:
    for text in (
        "a",
        "a:2",
        "a + b:-0.5",
        "min(a, b:2):3 + c",
        "quantile(a, b, q=0.25)",
        "robust(a, b:2, gamma=0.6):3 + c",
        "product(a > 0.5, b < 2)",
        "mean(a + b, c)",
        "brightness:0.3:2 + label:tiger cat",
        "logsigmoid(a:2, reference=1)",
        "logsigmoid(a + b, reference=-0.5, temperature=2)",
    ):
        assert load_reward(text).name == text
    _, components = score_components(load_reward("min(a, b:2):3 + c"), IMAGES, ["", ""])
    assert list(components) == ["min(a, b:2)", "min(a, b:2)/a", "min(a, b:2)/b", "c"]


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        ({"rewards": ["a", "b"]}, "sum(a, b)"),  # once the address of a function in memory
        ({"combine": "mean", "rewards": [{"reward": "a + b", "weight": 2}, "c"]}, "mean(sum(a + b):2, c)"),
        ({"combine": "quantile", "q": 0.1234567, "rewards": ["a"]}, "quantile(a, q=0.1234567)"),
        ({"rewards": [{"reward": "brightness", "weight": 2}]}, "sum(sum(brightness):2)"),  # brightness:2 has a target
        ({"rewards": [{"reward": "brightness:1", "weight": 2}]}, "sum(brightness:1:2)"),
        ({"rewards": [{"reward": "named:281:1", "weight": 1}]}, "sum(named:281:1)"),
        ({"combine": "min", "rewards": [{"reward": "a:-2", "weight": 3}, "b:-2"]}, "min(sum(a:-2):3, b:-2)"),
        ("a:0.1234567 + product(b > 12345678)", "a:0.1234567 + product(b > 12345678.0)"),
        ("product(a > 1, temperature=0.25)", "product(a > 1, temperature=0.25)"),
        (CombinedReward([WeightedReward(Column(0)), WeightedReward(Column(1))], worst), "min(a, b)"),
        (
            CombinedReward([WeightedReward(Column(0)), WeightedReward(Column(1))], partial(mean_minus_std, lam=2)),
            "mean-std(a, b, lam=2)",
        ),
        (CombinedReward([WeightedReward(Column(0), 2)], blue), "blue(a:2)"),
    ],
)
def test_names_of_compositions_are_texts_that_read_as_them(reward: Any, name: str) -> None:
    assert load_reward(reward).name == name
    if not name.startswith("blue"):
        assert load_reward(name).name == name and values(name) == pytest.approx(values(reward))


leaves = st.sampled_from(["a", "b:-2", "label:281", "label:x", "named:cat:0.3", "brightness", "brightness:0.3"])
finite = st.one_of(st.just(1.0), st.floats(-1e3, 1e3), st.sampled_from([1e-7, 1e22, 0.0, -0.0, 12345678, 1 / 3]))


def mapped(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    rewards = st.lists(st.fixed_dictionaries({"reward": inner, "weight": finite}), min_size=1, max_size=3)
    options = [
        ("sum", {}),
        ("mean", {}),
        ("min", {}),
        ("mean-std", {"lam": finite}),
        ("quantile", {"q": st.floats(0, 1)}),
        ("robust", {"gamma": st.floats(0, 1)}),
    ]
    kinds = [{"combine": st.just(name), "rewards": rewards} | own for name, own in options]
    bounded = st.builds(
        lambda one, sign, bound, t: f"product({load_reward(one).name} {sign} {bound!r}, temperature={t!r})",
        *(inner, st.sampled_from("<>"), finite, st.floats(1e-3, 1e3)),
    )
    return st.one_of(*map(st.fixed_dictionaries, kinds), bounded)


@given(reward=st.recursive(leaves, mapped, max_leaves=5))
@settings(deadline=None)
def test_a_name_is_a_text_that_reads_as_the_reward(reward: Any) -> None:
    """parse ∘ print = identity, on names and on scores."""
    result = load_reward(reward)
    again = load_reward(result.name)
    assert again.name == result.name
    assert error_text(again) == error_text(result)


def error_text(reward: Any) -> Any:
    """Scores, or why there are none: of large weights they are not finite."""
    try:
        return values(reward)
    except RewardError as error:
        return str(error)


# A random expression, as text and made of objects by hand.
Both = tuple[str, Reward]
weights = st.one_of(st.just(1.0), st.floats(-9, 9).map(lambda x: round(x, 3)), st.sampled_from([1e-3, -2.5e4, 0.0]))
atoms: st.SearchStrategy[Both] = st.sampled_from(
    [("a", Column(0)), ("b", Column(1)), ("steer_example:blue", Column(2)), ("label:tiger cat", Labelled("tiger cat"))]
)


def weighted(one: Both, weight: float, exponent: bool) -> tuple[str, WeightedReward]:
    text, reward = one
    written = f"{weight:e}" if exponent else repr(weight)
    return (text if weight == 1 else f"{text}:{written}"), WeightedReward(reward, weight)


def deeper(inner: st.SearchStrategy[Both]) -> st.SearchStrategy[Both]:
    terms = st.lists(st.builds(weighted, inner, weights, st.booleans()), min_size=1, max_size=3)
    bounds = st.floats(-2, 2).map(lambda x: round(x, 2))

    def aggregated(name: str, options: str, chosen: Callable[[Tensor], Tensor]) -> st.SearchStrategy[Both]:
        return terms.map(
            lambda some: (
                f"{name}({', '.join([text for text, _ in some])}{options})",
                CombinedReward([part for _, part in some], chosen),
            )
        )

    def product(some: list[tuple[Both, str, float]]) -> Both:
        text = ", ".join(f"{written} {sign} {bound}" for (written, _), sign, bound in some)
        made = [Constraint(reward, sign, bound, 0.5) for (_, reward), sign, bound in some]
        return f"product({text}, temperature=0.5)", ProductReward(made)

    def log_sigmoid(one: Both, bound: float) -> Both:
        return f"logsigmoid({one[0]}, reference={bound})", LogSigmoidReward(one[1], bound)

    return st.one_of(
        aggregated("mean", "", mean),
        aggregated("sum", "", total),
        aggregated("min", "", worst),
        aggregated("mean-std", ", lam=0.5", lambda scores: mean_minus_std(scores, 0.5)),
        aggregated("quantile", ", q=0.5", lambda scores: quantile(scores, 0.5)),
        st.lists(st.tuples(inner, st.sampled_from("<>"), bounds), min_size=1, max_size=2).map(product),
        st.builds(log_sigmoid, inner, bounds),
    )


expressions = st.recursive(atoms, deeper, max_leaves=6)


@pytest.mark.hard
@given(terms=st.lists(st.builds(weighted, expressions, weights, st.booleans()), min_size=1, max_size=3))
@settings(deadline=None)
def test_a_text_is_worth_what_the_objects_are(terms: list[tuple[str, WeightedReward]]) -> None:
    text = " + ".join(written for written, _ in terms)
    by_hand = CombinedReward([part for _, part in terms])
    result, expected = load_reward(text), score(by_hand, IMAGES, ["", ""])
    assert torch.allclose(score(result, IMAGES, ["", ""]), expected, rtol=1e-4, atol=1e-4)
    assert result.differentiable == by_hand.differentiable
    in_yaml = {"rewards": [{"reward": written} for written, _ in terms]}
    assert torch.allclose(score(load_reward(in_yaml), IMAGES, ["", ""]), expected, rtol=1e-4, atol=1e-4)


@given(text=st.text(alphabet="ab():+-, =<>.1e\n", max_size=30))
@settings(deadline=None)
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        result = load_reward(text)
    except RewardError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(result, Reward)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path, text: str, name: str = "r.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return name


def test_standardised_rewards_take_their_scale_from_a_file(here: Path) -> None:
    scales = {
        "a": {"mean": 0.5, "std": 0.25, "count": 2, "prompts": {"p": 0.75, "q": 0.0}},
        "a + b": {"mean": 1.0, "std": 2.0, "count": 2, "prompts": {"p": 0.0}},
    }
    (here / "my scales.json").write_text(json.dumps({"source": {}, "scales": scales}))
    assert values("z(a, from=my scales.json)") == [1.0, -1.0]
    assert values("z(a + b, from=my scales.json):2") == [0.0, -0.25]
    expected = [math.log(0.5), math.log(sigmoid(0.25))]
    assert values("logsigmoid(a, from=my scales.json)") == pytest.approx(expected)
    assert values("min(z(a, from=my scales.json), b:8)") == [1.0, -1.0]
    by_hand = StandardisedReward(Column(0), RewardStatistics(0.5, 0.25, 2, {}))
    assert load_reward("z(a, from=my scales.json)").name == by_hand.name == "z(a)"
    with pytest.raises(RewardError, match=r"'b' is not in this calibration \(a, a \+ b\): `steer rewards calibrate`"):
        load_reward("z(b, from=my scales.json)")
    with pytest.raises(RewardError, match="no reference for the prompt 'q'"):
        values("logsigmoid(a + b, from=my scales.json)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rewards: [a, b]", [1.0, 0.75]),
        ("rewards:\n- a:2\n- reward: b\n  weight: -1", [1.25, 0.0]),
        ("combine: min\nrewards:\n- reward: a\n  weight: 2\n- c", [0.5, 0.5]),
        ("combine: mean-std\nlam: 2\nrewards: [a, b]", [0.0, 0.125]),
        ("combine: quantile\nq: 1\nrewards: [a, b]", [0.75, 0.5]),
        ("combine: mean\nrewards:\n- reward: {combine: min, rewards: [a, b]}\n  weight: 3\n- a", [0.75, 0.5]),
        ("rewards: ['brightness:0.435:2', 'min(a, b)']", [2.236, 2.1555]),
        ("rewards: [{reward: a, weight: 2e+0}, {reward: b, weight: 1e-9}]", [1.5, 0.5]),
        ("rewards:\n- >-\n  min(a,\n  b)", [0.25, 0.25]),
        ('rewards:\n- "label:jack-o\'-lantern"\n- label:tiger cat', [24, 24]),
    ],
)
def test_files_by_hand(here: Path, text: str, expected: list[float]) -> None:
    name = written(here, text)
    assert values(name) == pytest.approx(expected, abs=1e-5)
    assert values(Path(name)) == values(str(here / name)) == values(name)


def test_files_stand_in_sums_and_functions_and_files(here: Path) -> None:
    written(here, "rewards: [a, b]", "a + b.yaml")
    written(here, "combine: min\nrewards: [a + b.yaml, c]", "low.yml")
    assert values("a + b.yaml") == [1.0, 0.75]
    assert values("low.yml") == [0.5, 0.75]
    assert values("low.yml:2 + a") == [1.75, 1.75]
    assert values("min(low.yml, a)") == [0.5, 0.25]


def test_mappings_may_hold_objects() -> None:
    assert values({"combine": "min", "rewards": (Column(0), {"reward": Column(1), "weight": 2})}) == [0.5, 0.25]
    with pytest.raises(RewardError, match="reward mapping, reward 2: a reward is a callable"):
        load_reward({"rewards": ["a", 3]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml: expected a mapping with `rewards:`"),
        ("- a", "r.yaml: expected a mapping with `rewards:`"),
        ("a + b", "r.yaml: expected a mapping with `rewards:`"),
        ("rewards: [a", "r.yaml: expected ',' or ']'"),
        ("rewards: [a]\nreward: b", "r.yaml: unknown key 'reward'; did you mean rewards"),
        ("1: 2", "r.yaml: a key must be text: put it in quotes"),
        ("rewards: [a]\nrewards: [b]", "r.yaml, line 2: 'rewards' is repeated: keep one"),
        ("combine: min", "r.yaml: `rewards:` must be a list of rewards"),
        ("rewards: a", "r.yaml: `rewards:` must be a list of rewards"),
        ("rewards: []", "r.yaml: `rewards:` must be a list of rewards"),
        ("combine: max\nrewards: [a]", "r.yaml: `combine:` must be one of mean, sum, min, mean-std, quantile, robust"),
        ("combine: [min]\nrewards: [a]", "r.yaml: `combine:` must be one of"),
        ("combine: min\nq: 0.5\nrewards: [a]", "r.yaml: min takes no options, not 'q'"),
        ("lam: 1\nrewards: [a]", "r.yaml: sum takes no options, not 'lam'"),
        ("combine: quantile\nq: 2\nrewards: [a]", "r.yaml: q must be a number from 0 to 1"),
        ("combine: mean-std\nlam: .nan\nrewards: [a]", "r.yaml: lam must be a finite number"),
        ("combine: mean-std\nlam: yes\nrewards: [a]", "r.yaml: lam must be a finite number"),
        ("rewards: [a, nosuch]", "r.yaml, reward 2: unknown reward 'nosuch'"),
        (
            "rewards: [[3]]",
            "r.yaml, reward 1: its mapping, reward 1: a reward is a callable (images, prompts) → scores",
        ),
        ("rewards:\n-", "r.yaml, reward 1: a reward is a callable"),
        ("rewards: [{weight: 2}]", "r.yaml, reward 1: expected a text, or `reward:` and a finite number"),
        ("rewards: [{reward: a, wait: 2}]", "r.yaml, reward 1: expected a text, or `reward:`"),
        ("rewards: [{reward: a, weight: two}]", "r.yaml, reward 1: expected a text, or `reward:` and a finite number"),
        ("rewards: [{reward: a, weight: .inf}]", "r.yaml, reward 1: expected a text, or `reward:` and a finite number"),
        ("rewards: [{reward: a, weight: true}]", "r.yaml, reward 1: expected a text, or `reward:` and a finite number"),
        (f"rewards: [{{reward: a, weight: {10**400}}}]", "reward 1: expected a text, or `reward:` and a finite number"),
        ("rewards: [{reward: {rewards: 3}}]", "r.yaml, reward 1: its mapping: `rewards:` must be a list"),
        ("rewards: [r.yaml]", f"a reward nests at most {MAX_DEPTH} functions or files"),
        ("a: &x [1]\nrewards: *x", "r.yaml, line 2: aliases (*name) are not supported: write out the values"),
        ("rewards: " + "[" * 9000, "r.yaml: not YAML (maximum recursion depth exceeded"),
        ("rewards: " + "{a: " * 9000 + "}" * 9000, "r.yaml: not YAML (maximum recursion depth exceeded"),
        ("\n".join(f"{' ' * k}- " for k in range(900)), "r.yaml"),
        ("rewards: [a]\n---\nrewards: [b]", "r.yaml, line 2: but found another document"),
        ("rewards: 2001-99-99", "r.yaml: `rewards:` must be a list of rewards"),
        ("? [a]\n: b", "r.yaml, line 1: a key must be text: put it in quotes"),
    ],
    ids=lambda value: value[:40],
)
def test_files_that_cannot_be_read_are_refused_in_one_line(here: Path, text: str, message: str) -> None:
    name = written(here, text)
    started = time.monotonic()
    with pytest.raises(RewardError) as raised:
        load_reward(name)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert time.monotonic() - started < 5
    (here / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RewardError, match=r"r\.yaml: not .*text"):
        load_reward(name)


@pytest.mark.parametrize(
    "text",
    [
        "rewards: [!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [canary]]]",
        "rewards: !!python/object/new:os.system ['touch canary']",
        "!!python/object/apply:os.system ['touch canary']",
        "rewards: [a]\ncombine: !!python/name:os.system",
        "rewards: [!!python/module:this ]",
        "rewards: [!local a]",
    ],
)
def test_no_tag_makes_or_runs_anything(here: Path, text: str) -> None:
    with pytest.raises(RewardError, match=r"r\.yaml(, line \d)?: could not determine a constructor for the tag"):
        load_reward(written(here, text))
    assert [path.name for path in here.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(
            ["rewards: [a]", "x0: &x0 [a]", *(f"x{k}: &x{k} [{', '.join([f'*x{k - 1}'] * 9)}]" for k in range(1, 12))]
        ),
        "\n".join(
            ["x0: &x0 {k: v}", *(f"x{k}: &x{k} {{<<: [{', '.join([f'*x{k - 1}'] * 9)}]}}" for k in range(1, 12))]
        ),
        "rewards: [&x0 {reward: a}, "
        + ", ".join(f"&x{k} {{reward: {{rewards: [{', '.join([f'*x{k - 1}'] * 9)}]}}}}" for k in range(1, 12))
        + "]",
        "&x\nrewards: [*x]",
    ],
    ids=["lists", "merges", "mappings", "itself"],
)
def test_a_billion_laughs_are_not_laughed(here: Path, text: str) -> None:
    started = time.monotonic()
    with pytest.raises(RewardError, match="aliases"):
        load_reward(written(here, text))
    assert time.monotonic() - started < 1


def test_files_that_name_files_end(here: Path) -> None:
    for k in range(MAX_DEPTH // 2):
        written(here, f"rewards: [{', '.join([f'{k + 1}.yaml'] * 9)}]", f"{k}.yaml")
    written(here, "rewards: [a, b]", f"{MAX_DEPTH // 2}.yaml")
    started = time.monotonic()
    with pytest.raises(RewardError, match=f"a reward has at most {MAX_REWARDS} rewards in it"):
        load_reward("0.yaml")
    assert time.monotonic() - started < 5
    assert values(f"{MAX_DEPTH // 2 - 1}.yaml") == [9.0, 6.75]


def test_folders_of_learned_rewards_may_be_called_anything(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CARD == learned.CARD
    monkeypatch.setattr(learned, "LearnedReward", Labelled)
    for name in ("plain", "my run", "a:2", "runs/one + two", "c, d", "a", "min(a, b)", "x.y"):
        (here / name).mkdir(parents=True)
        (here / name / CARD).touch()
    for name in ("plain", "my run", "./a:2", "runs/one + two", "c, d", "min(a, b)", "x.y", "./a"):
        assert values(name) == [len(name)] * 2, name
    assert values(Path("my run")) == [6.0, 6.0]
    assert values("my run:2 + a:0 + plain") == [17.0, 17.0]
    assert values("min(my run, plain:2, ./a:2)") == [5.0, 5.0]
    assert values("./a:2:3 + ./a:0.5") == [16.5, 16.5]
    assert values("a") == [0.75, 0.25] and values("a:2") == [1.5, 0.5]  # names go before folders
    assert values({"rewards": ["my run", {"reward": "plain", "weight": 2}]}) == [16.0, 16.0]
    monkeypatch.chdir(here / "plain")
    assert values(".") == [1.0, 1.0]
    with pytest.raises(RewardError, match="unknown reward ''"):
        load_reward("")
