"""What fuzzers found and kept, through the parsers once more; and, with the mark `hard`, changed at random.

The fuzzers themselves, which follow the branches: `make fuzz`.
"""

import random
import socket
from pathlib import Path

import pytest
from parser_checks import Finding
from parsers import PARSERS, Parser, run
from reliability import Tally

from steer.errors import InputError

TRIES = {"config": 2000, "config-words": 2000, "report": 2000}  # of others: 4,000
CORPUS = Path(__file__).resolve().parent / "corpus"
PIECES = [
    b"\0",
    b"\xff",
    b"\n",
    b'"',
    b"'",
    b"[",
    b"]",
    b"{",
    b"}",
    b":",
    b",",
    b"(",
    b")",
    b"\\",
    b"-1",
    b"1e999",
    b"NaN",
]
PIECES += [
    b"\xed\xa0\x80",
    b"\\ud800",
    b"\xe2\x80\xa8",
    b"\x1b[2J",
    b"\\u0000",
    b"null",
    b"true",
    b"9" * 400,
    b"[" * 300,
]


def kept(parser: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / parser).iterdir())]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("parser", PARSERS)
def test_what_fuzzers_kept_is_read_or_refused(parser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = [run(parser, data, tmp_path) for data in kept(parser)]
    assert {*told} == {"read", "refused"}, "both are in the corpus"


def test_the_corpus_is_small() -> None:
    sizes = [path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(sizes) <= 150_000 and {path.name for path in CORPUS.iterdir()} == PARSERS.keys()


def changed(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """A few changes, as fuzzers make them."""
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        place, end = sorted((chance.randint(0, len(data)), chance.randint(0, len(data))))
        match chance.randrange(7):
            case 0 if data:  # a bit
                byte = chance.randrange(len(data))
                data = data[:byte] + bytes([data[byte] ^ 1 << chance.randrange(8)]) + data[byte + 1 :]
            case 1:  # a piece of what parsers look for
                data = data[:place] + chance.choice(PIECES) + data[place:]
            case 2:  # it goes
                data = data[:place] + data[min(end, place + 20) :]
            case 3:  # twice
                data = data[:end] + data[place:end] + data[end:]
            case 4:  # the end of another
                data = data[:place] + other[chance.randint(0, len(other)) :]
            case 5:  # a part of another
                start = chance.randint(0, len(other))
                data = data[:place] + other[start : start + chance.randint(1, 30)] + data[place:]
            case _:  # a digit, a letter
                data = data[:place] + bytes([chance.randrange(32, 127)]) + data[place + 1 :]
    return data[:20_000]


@pytest.mark.hard
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("parser", PARSERS)
def test_what_is_changed_at_random_is_read_or_refused(
    parser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chance, tally, corpus = random.Random(parser), Tally(), kept(parser)
    sound = [data for data in corpus if run(parser, data, tmp_path) == "read"]
    for _ in range(TRIES.get(parser, 4000)):
        data = changed(chance.choice(chance.choice((sound, sound, corpus))), chance.choice(corpus), chance)
        try:
            tally.count(run(parser, data, tmp_path))
        except Exception as error:
            raise AssertionError(f"{parser}: {data!r}") from error
    tally.note(f"parser of {parser}, changed at random")


def reaches_out(data: bytes, folder: Path) -> str:
    try:
        socket.create_connection(("127.0.0.1", 9), timeout=1)
    except OSError as error:
        raise InputError("nobody there") from error
    return "somebody"


def lasts(data: bytes, folder: Path) -> str:
    while True:
        pass


def says_more_than_a_line(data: bytes, folder: Path) -> str:
    raise OneLine("a\nb")


class OneLine(InputError):
    """As InputError was when fuzzing began."""

    def __init__(self, told: str) -> None:
        ValueError.__init__(self, told)


SAME = {"again": lambda found, folder: found, "modules": ()}
WRONG = {
    "of another kind": (Parser(lambda data, folder: {}[data], **SAME), KeyError, "b''"),
    "not the same again": (Parser(lambda data, folder: 1, lambda found, folder: 2, ()), Finding, "read again as 2"),
    "more than a line": (Parser(says_more_than_a_line, **SAME), Finding, "no line of text"),
    "for ever": (Parser(lasts, **SAME), Finding, "seconds of CPU"),
    "to the network": (Parser(reaches_out, **SAME), Finding, "reached for .*socket"),
}


@pytest.mark.hard
@pytest.mark.parametrize("name", WRONG)
def test_a_parser_that_does_what_none_may_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser, kind, told = WRONG[name]
    monkeypatch.setitem(PARSERS, name, parser)
    with pytest.raises(kind, match=told):
        run(name, b"", tmp_path)
