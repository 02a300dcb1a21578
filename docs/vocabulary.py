"""Check names and prose of all rooms against the words of the field (docs/glossary.md). `make lint` runs it.

Exit code 1: there is a banned word or name; each place is printed.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Pattern (whole words, any case) → the word of the field. The left column of the glossary and phrases of no field.
BANNED = {
    r"seams?": "step hooks",
    r"told|tells? of": "reports, contains, log; or name the object",
    r"anew": "again, resampled",
    r"wears?|worn|wearing|unworn": "load, apply or disable an adapter",
    r"goes on|going on|gone on|go on": "resume, continue",
    r"spoilt|spoiled": "corrupt",
    r"mend(?:s|ed|ing)?": "fix",
    r"what came of|came of it|what comes of": "result",
    r"stands? in for|stand-ins?|stood in": "proxy, replacement",
    r"lagged|lagging": "asynchronous",
    r"narrow(?:ed|s|ing)?": "particle schedule",
    r"exams?": "evaluator",
    r"round's|rounds(?! images)|(?:a|the|each|per|every|this|that|one) round": "rollout, rollout buffer",
    r"weigh(?:ed|s|ing)?": "reweight",
    r"readings|(?:a|the|each|every|one|first|third) reading|read off": "evaluation, intermediate reward",
    r"lots?": "group",
    r"drawn with": "made with, samples of",
    r"populations?": "particle batch",
    r"(?:resampling|evaluation|rewards?|particle) plans?": "resampling schedule, particle schedule",
    r"teams?": "distributed context, processes",
    r"staged|staging": "atomic write",
    r"file sums?|sums? of (?:the |its |all )?files?": "checksum, manifest",
    r"untouched": "on-policy, unchanged",
    r"kept runs?": "result cache",
    r"stopping watch(?:es|ed)?|watch(?:es|ed)? the hold-?out": "early stopping monitors",
    r"promises?|promised": "predicted clean latents",
    r"faster=\w+|--faster": "compute_options",
    r"unjudged": "without a reward",
    r"foretells?|foretold": "predicts",
    r"screened_starts|D3POPipeline|PRDPPipeline|DDPOPipeline|GRPOPipeline|FinetuneSettings": "the 0.2.0 name",
    r"steps_per_round|prompts_per_step|samples_per_prompt": "the 0.2.0 name",
    r"keep_checkpoints|checkpoint_every|eval_every": "the 0.2.0 name",
    r"overlap=\w+|--overlap": "asynchronous_rewards",
    r"on (?:its|their|the) way": "inside the chain, at intermediate steps",
    r"half-way": "interrupted",
    r"parts company|(?<!a)part from|parts from": "diverge",
    r"minus what|less what": "the difference from",
    r"said once|is said|says else": "reported, printed, given",
}
# Phrases in which a banned word is the right one, and the file and key of groups in the preference format.
ALLOWED = re.compile(r"lots\\?\.jsonl|[\"']lot[\"']|round trip|reading order", re.IGNORECASE)
# File → lines of it in which banned words are data: tests of this check, of the preference format, of a fuzzing corpus.
DATA = {
    "tests/test_project_structure.py": re.compile(r'text = "|checker\["'),
    "tests/test_preference_data.py": re.compile(r'change_line\(.* lot="'),
    "tests/hard/folder_parsers.py": re.compile(r'\{"told": "\{\}'),
}
PATTERN = re.compile(rf"(?<![\w-])(?:{'|'.join(BANNED)})(?!\w)", re.IGNORECASE)

# No docstring begins with one of these: a noun phrase or an imperative verb does.
FIRST_WORDS = ("What", "Of", "That", "Which", "Those", "Raises")
# Identifiers that are neither a noun nor a verb of the field.
NAMES = ("HERE", "SAID", "OWN", "APART", "found", "told", "seen", "said")

ROOMS = {
    "steer": ["steer/**/*.py"],
    "pipelines": ["pipelines/**/*.py"],
    "rewards": ["rewards/**/*.py"],
    "apps": ["apps/**/*.py", "apps/**/*.js", "apps/**/*.css", "apps/**/*.md"],
    "assets": ["assets/configs/*.yaml", "assets/accelerate/*.yaml"],
    "docs": ["docs/*.md", "docs/*.ipynb", "README.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile", "pyproject.toml"],
    "tests": ["tests/**/*.py"],
}


def files_of(room: str) -> list[Path]:
    """Return the files of a room; links to other rooms are not followed."""
    paths = {path for pattern in ROOMS[room] for path in ROOT.glob(pattern)}
    return sorted(path for path in paths if not any(parent.is_symlink() for parent in path.parents))


def banned_words(text: str) -> Iterator[tuple[int, str]]:
    """Yield line number and word of each banned word of a text, also inside snake_case names."""
    for number, line in enumerate(text.splitlines(), start=1):
        allowed = ALLOWED.sub("", line)
        words = {match.group() for match in PATTERN.finditer(allowed)}
        if "_" in allowed:
            words |= {match.group() for match in PATTERN.finditer(ALLOWED.sub("", line.replace("_", " ")))}
        yield from ((number, word) for word in sorted(words))


def first_words(text: str) -> Iterator[tuple[int, str]]:
    """Yield line number and first words of each docstring that begins with neither a noun nor an imperative."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (docstring := ast.get_docstring(node)):
            first = docstring.split(maxsplit=1)[0].rstrip(",")
            if first in FIRST_WORDS:
                yield node.body[0].lineno, f'"""{first} …'


def banned_names(text: str) -> Iterator[tuple[int, str]]:
    """Yield line number and name of each variable, argument, function or class with a banned name."""
    for node in ast.walk(ast.parse(text)):
        stored = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        name = node.id if stored else getattr(node, "arg" if isinstance(node, ast.arg) else "name", None)
        if name in NAMES:
            yield node.lineno, name


def violations(room: str) -> Iterator[str]:
    """Yield one line for each banned word or docstring of a room."""
    for path in files_of(room):
        text, data = path.read_text(), DATA.get(path.relative_to(ROOT).as_posix())
        places = [place for place in banned_words(text) if not (data and data.search(text.splitlines()[place[0] - 1]))]
        if path.suffix == ".py":
            places += [*first_words(text), *banned_names(text)]
        for number, word in sorted(places):
            yield f"{path.relative_to(ROOT)}:{number}: {word}"


if __name__ == "__main__":
    sys.exit("\n".join(place for room in ROOMS for place in violations(room)) or None)
