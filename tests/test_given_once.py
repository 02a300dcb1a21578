"""Nothing is dropped in silence: every option with one value is refused where it is given twice, in every command."""

from collections.abc import Iterator
from itertools import product

import click
import pytest
from conftest import Steer

from steer.apps.cli.finetune import parse_overrides
from steer.apps.cli.main import steer as root
from steer.apps.cli.options import Command, Group, is_single_valued
from steer.errors import InputError


def commands(
    command: click.Command = root, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


OPTIONS = [
    (path, option)
    for path, command in commands()
    for option in command.params
    if isinstance(option, click.Option) and is_single_valued(option)
]


def test_every_command_is_of_the_class_that_keeps_the_rule() -> None:
    found = dict(commands())
    assert {("sample",), ("score",), ("evaluate",), ("finetune",), ("rewards", "train")} <= found.keys()
    assert all(isinstance(command, Command | Group) for command in found.values())
    assert len(OPTIONS) > 100


@pytest.mark.parametrize(
    ("path", "option"), OPTIONS, ids=lambda one: one.name if isinstance(one, click.Option) else "-".join(one)
)
def test_an_option_with_one_value_is_given_once(steer: Steer, path: tuple[str, ...], option: click.Option) -> None:
    """By any two of its names, with different values and equal ones, in front of arguments and behind them."""
    ends = [] if option.is_flag else ["1"]
    for first, second in product([*option.opts, *option.secondary_opts], repeat=2):
        words = (
            [first, *ends, "word", second, *ends] if path and path != ("rewards",) else [first, *ends, second, *ends]
        )
        code, out, err = steer(*path, *words)
        assert (code, out) == (2, "") and len(err.splitlines()) == 1, err
        assert err.startswith("steer: ") and first in err and "is given 2 times" in err, err
    if ends:
        assert "is given 3 times" in steer(*path, *[f"{first}=a", f"{first}=b", f"{first}=c"])[2]


def test_options_with_several_values_are_not_refused() -> None:
    words = ["--prompts", "p", "--reward", "jpeg", "--reward", "scene", "--model", "a", "--model", "b"]
    context = root.commands["evaluate"].make_context("evaluate", words)
    assert context.params["rewards"] == ("jpeg", "scene") and context.params["models"] == ("a", "b")


@pytest.mark.parametrize("words", ["--seed 1 --seed 2", "--seed=1 --seed=1", "--max-steps 1 --max_steps 2", "--a --a"])
def test_a_key_of_a_configuration_is_given_once(words: str) -> None:
    with pytest.raises(InputError, match="is given twice and takes one value"):
        parse_overrides(words.split())
