"""Coverage-guided fuzzing of the parsers: needs atheris, which `make fuzz` brings to a folder of its own.

python tests/hard/fuzz.py PARSER --seconds 300 --corpus FOLDER [flags of libFuzzer]
python tests/hard/fuzz.py PARSER --try FILE…    runs files without atheris and says what came of each
"""

import argparse
import contextlib
import importlib
import inspect
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def instrumented(names: tuple[str, ...], atheris: Any) -> int:
    """Has atheris follow the branches of every function of some modules; returns how many functions."""
    seen: set[int] = set()
    for name in names:
        module = importlib.import_module(name)
        for owner in (
            module,
            *(one for one in vars(module).values() if inspect.isclass(one) and one.__module__ == name),
        ):
            for found in list(vars(owner).values()):
                function = inspect.unwrap(getattr(found, "__func__", getattr(found, "fget", found)))
                if inspect.isfunction(function) and function.__module__ == name and id(function) not in seen:
                    seen.add(id(function))
                    atheris.instrument_func(function)
    return len(seen)


def main() -> None:
    """Reads the command line, and does not return from a fuzzer."""
    from parsers import PARSERS, run

    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("parser", choices=PARSERS)
    reader.add_argument("--seconds", type=int, default=300)
    reader.add_argument("--corpus", type=Path, help="a folder that new inputs are added to")
    reader.add_argument("--try", dest="files", type=Path, nargs="*", default=[])
    given, flags = reader.parse_known_args()
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        corpus = given.corpus and given.corpus.resolve()
        files = [path.resolve() for path in given.files]
        os.chdir(folder)  # a name in the input finds no file of anybody's
        for path in files:
            sys.stdout.write(f"{path.name}: {run(given.parser, path.read_bytes(), folder)}\n")
        if files:
            return
        import atheris

        sys.stdout.write(f"{instrumented(PARSERS[given.parser].modules, atheris)} functions are followed\n")

        def one(data: bytes) -> None:
            with contextlib.redirect_stderr(io.StringIO()):
                run(given.parser, data, folder)

        # libFuzzer adds to the first folder: never to the corpus of the tests.
        folders = [str(corpus or tempfile.mkdtemp(dir=home)), str(HERE / "corpus" / given.parser)]
        limits = [f"-max_total_time={given.seconds}", "-timeout=10", "-rss_limit_mb=3000", "-max_len=4096"]
        atheris.Setup([sys.argv[0], *limits, *flags, *folders], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
