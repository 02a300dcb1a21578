"""InputError: one line that a terminal shows and does not execute, whatever it quotes."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.apps.prompts import load_prompts
from steer.errors import MAX_LENGTH, InputError
from steer.reward import RewardError


@given(st.text(max_size=40) | st.text(st.characters(categories=["Cc", "Cs", "Zl", "Zp"]), max_size=10))
def test_a_message_is_one_printable_line(quoted: str) -> None:
    line = str(InputError(f"file {quoted!s}: choose another"))
    assert line.splitlines() == [line] and line.encode("utf-8")
    assert not any(ord(one) < 32 or 127 <= ord(one) < 160 for one in line)
    assert line.startswith("file ") and line.endswith(": choose another")
    assert str(InputError(line)) == line, "an InputError of an InputError is the same line"
    if quoted.isprintable():
        assert line == f"file {quoted}: choose another"


def test_unprintable_characters_are_escaped_as_in_python() -> None:
    text = "a\nb\x1b[2J\x85\u2028\ud800 é 👩‍👧 \\n"
    assert str(InputError(text)) == "a\\nb\\x1b[2J\\x85\\u2028\\ud800 é 👩‍👧 \\n"


@pytest.mark.parametrize("length", [MAX_LENGTH - 1, MAX_LENGTH, MAX_LENGTH + 1, 10**6])
def test_of_a_long_message_the_middle_is_left_out(length: int) -> None:
    text = "the name " + "x" * (length - 24) + ", the remedy  !"
    line = str(InputError(text))
    assert len(text) == length and len(line) == min(length, MAX_LENGTH)
    assert (line == text) == (length <= MAX_LENGTH)
    assert line.startswith("the name x") and line.endswith("x, the remedy  !")


def test_errors_cross_processes_and_are_of_their_kind() -> None:
    again = pickle.loads(pickle.dumps(RewardError("a\nb")))
    assert type(again) is RewardError and str(again) == "a\\nb" and isinstance(again, ValueError)


def test_a_column_of_a_untrusted_table_does_not_speak_to_the_terminal(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Found by fuzzing: names of columns are quoted in messages."""
    table = tmp_path_factory.mktemp("table") / "p.tsv"
    table.write_bytes(b"a\x1b]0;title\x07\x7f\tb\n")
    with pytest.raises(InputError) as error:
        load_prompts(str(table))
    assert str(error.value).endswith("there are a\\x1b]0;title\\x07\\x7f, b")
