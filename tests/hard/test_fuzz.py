"""Inputs that the fuzzers kept, parsed again; with the mark `hard`, their random mutations.

`make fuzz` runs the coverage-guided fuzzers.
"""

import random
import socket
from pathlib import Path

import pytest
from parser_checks import Finding
from parsers import PARSERS, Parser, run
from reliability import Tally

from steer.errors import InputError

TRIES = {"config": 2000, "config-words": 2000, "report": 2000}  # others: 4,000
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
def test_the_corpus_is_read_or_refused(parser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = [run(parser, data, tmp_path) for data in kept(parser)]
    assert {*results} == {"read", "refused"}, "the corpus has both"


def test_the_corpus_is_small() -> None:
    sizes = [path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(sizes) <= 150_000 and {path.name for path in CORPUS.iterdir()} == PARSERS.keys()


def changed(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Mutate bytes a few times."""
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        place, end = sorted((chance.randint(0, len(data)), chance.randint(0, len(data))))
        match chance.randrange(7):
            case 0 if data:  # flip a bit
                byte = chance.randrange(len(data))
                data = data[:byte] + bytes([data[byte] ^ 1 << chance.randrange(8)]) + data[byte + 1 :]
            case 1:  # insert a token
                data = data[:place] + chance.choice(PIECES) + data[place:]
            case 2:  # delete a part
                data = data[:place] + data[min(end, place + 20) :]
            case 3:  # repeat a part
                data = data[:end] + data[place:end] + data[end:]
            case 4:  # the end of another input
                data = data[:place] + other[chance.randint(0, len(other)) :]
            case 5:  # insert a part of another input
                start = chance.randint(0, len(other))
                data = data[:place] + other[start : start + chance.randint(1, 30)] + data[place:]
            case _:  # another character
                data = data[:place] + bytes([chance.randrange(32, 127)]) + data[place + 1 :]
    return data[:20_000]


@pytest.mark.hard
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("parser", PARSERS)
def test_random_mutations_are_read_or_refused(parser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chance, tally, corpus = random.Random(parser), Tally(), kept(parser)
    sound = [data for data in corpus if run(parser, data, tmp_path) == "read"]
    for _ in range(TRIES.get(parser, 4000)):
        data = changed(chance.choice(chance.choice((sound, sound, corpus))), chance.choice(corpus), chance)
        try:
            tally.count(run(parser, data, tmp_path))
        except Exception as error:
            raise AssertionError(f"{parser}: {data!r}") from error
    tally.note(f"parser of {parser}, random mutations")


def uses_the_network(data: bytes, folder: Path) -> str:
    try:
        socket.create_connection(("127.0.0.1", 9), timeout=1)
    except OSError as error:
        raise InputError("nobody there") from error
    return "somebody"


def loops_forever(data: bytes, folder: Path) -> str:
    while True:
        pass


def raises_two_lines(data: bytes, folder: Path) -> str:
    raise TwoLines("a\nb")


class TwoLines(InputError):
    """An InputError that keeps line breaks in its message."""

    def __init__(self, message: str) -> None:
        ValueError.__init__(self, message)


SAME = {"again": lambda value, folder: value, "modules": ()}
WRONG = {
    "another exception": (Parser(lambda data, folder: {}[data], **SAME), KeyError, "b''"),
    "another value again": (
        Parser(lambda data, folder: 1, lambda value, folder: 2, ()),
        Finding,
        "read again as 2",
    ),
    "two lines": (Parser(raises_two_lines, **SAME), Finding, "no line of text"),
    "endless loop": (Parser(loops_forever, **SAME), Finding, "seconds of CPU"),
    "network": (Parser(uses_the_network, **SAME), Finding, "reached for .*socket"),
}


@pytest.mark.hard
@pytest.mark.parametrize("name", WRONG)
def test_a_violation_by_a_parser_is_detected(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser, kind, message = WRONG[name]
    monkeypatch.setitem(PARSERS, name, parser)
    with pytest.raises(kind, match=message):
        run(name, b"", tmp_path)
