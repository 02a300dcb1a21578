"""Coverage-guided fuzzing of the parsers: needs atheris, which `make fuzz` installs in a folder of its own.

python tests/hard/fuzz.py PARSER --seconds 300 --corpus FOLDER [flags of libFuzzer]
python tests/hard/fuzz.py PARSER --try FILE…    runs files without atheris and prints the result of each
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

FOLDER = Path(__file__).resolve().parent


def instrumented(names: tuple[str, ...], atheris: Any) -> int:
    """Instrument every function of some modules for atheris; return their number."""
    known: set[int] = set()
    for name in names:
        module = importlib.import_module(name)
        for owner in (
            module,
            *(one for one in vars(module).values() if inspect.isclass(one) and one.__module__ == name),
        ):
            for attribute in list(vars(owner).values()):
                function = inspect.unwrap(getattr(attribute, "__func__", getattr(attribute, "fget", attribute)))
                if inspect.isfunction(function) and function.__module__ == name and id(function) not in known:
                    known.add(id(function))
                    atheris.instrument_func(function)
    return len(known)


def main() -> None:
    """Parse the command line and run; the fuzzer does not return."""
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
        os.chdir(folder)  # file names in the input must not exist
        for path in files:
            sys.stdout.write(f"{path.name}: {run(given.parser, path.read_bytes(), folder)}\n")
        if files:
            return
        import atheris

        sys.stdout.write(f"{instrumented(PARSERS[given.parser].modules, atheris)} functions are instrumented\n")

        def one(data: bytes) -> None:
            with contextlib.redirect_stderr(io.StringIO()):
                run(given.parser, data, folder)

        # libFuzzer adds to the first folder: never to the corpus of the tests.
        folders = [str(corpus or tempfile.mkdtemp(dir=home)), str(FOLDER / "corpus" / given.parser)]
        limits = [f"-max_total_time={given.seconds}", "-timeout=10", "-rss_limit_mb=3000", "-max_len=4096"]
        atheris.Setup([sys.argv[0], *limits, *flags, *folders], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
