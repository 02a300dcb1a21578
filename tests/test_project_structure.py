"""The structure of the project: layers, packages, claims of the README."""

import ast
import itertools
import os
import re
import runpy
import subprocess
import sys
import tomllib
import unicodedata
from pathlib import Path

import preloaded
import pytest
from pairwise import covering

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FLOORS = ("steer", "pipelines", "rewards", "apps", "assets")
SOURCES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
SLOW = (
    "values.md-1",
    "values.md-2",
    "text.md-3",
    "steering.md-4",
    "dna.md-1",
    "finetuning-reference.md-5",
    "performance.md-4",
    "written-rewards.md-1",
    "previews.md-1",
    "evaluate.md-1",
)
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def test_the_layers_hold() -> None:
    """import-linter reads the contracts in pyproject.toml."""
    ran = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"], capture_output=True, text=True, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_packages_are_the_folders_that_hold_code() -> None:
    folders = {path.parent.relative_to(ROOT) for path in SOURCES}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert {
        ".".join(folder.parts if folder.parts[0] == "steer" else ("steer", *folder.parts)) for folder in folders
    } == set(listed)


def test_the_models_and_the_prompts_are_in_the_wheel_and_small() -> None:
    """All but scenes-large and scenes-flow, which lie in the repository alone."""
    files = [path for path in (ROOT / "assets").glob("*scenes*/**/*") if path.is_file()]
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["steer.assets"]
    packed = {path for pattern in patterns for path in (ROOT / "assets").glob(pattern) if path.is_file()}
    unpacked = {"scenes-large", "scenes-flow"}
    large = {path for path in files if path.relative_to(ROOT / "assets").parts[0] in unpacked}
    assert set(files) - large <= packed and not large & packed
    assert {path.relative_to(ROOT / "assets").parts[0] for path in set(files) - large} == {
        "scenes",
        "scenes-turbo",
        "scenes-lcm",
        "scenes-tiny-vae",
        "scenes-text",
        "clip-scenes",
        "preference-scenes",
        "aesthetic-scenes",
    }
    # Two diffusion models of 12 MB, an adapter of 3.3 MB, a model of text, and the rewards.
    assert sum(path.stat().st_size for path in packed) <= 38e6
    assert 0 < sum(path.stat().st_size for path in large) <= 52e6
    assert {path.suffix or path.name for path in files} <= {".json", ".safetensors", ".txt", "SHA256SUMS"}


def test_import_and_help_need_no_torch() -> None:
    code = "import sys, steer, steer.apps.cli.main; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_checkout_that_is_not_installed_imports(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import steer, steer.rewards, steer.assets, steer.apps.cli.main, steer.pipelines\n"
        "from pathlib import Path\n"
        f"assert Path(steer.rewards.__file__).is_relative_to({str(ROOT)!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_files_hold_one_idea() -> None:
    """ruff holds the length of functions (PLR0915), and has no rule for that of files."""
    long = [path for path in SOURCES if len(path.read_text().splitlines()) > 700]
    assert not long


def test_the_body_of_a_function_is_a_page() -> None:
    """Fewer than 40 lines without signature and docstring; ruff counts statements."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
                assert not body or body[-1].end_lineno - body[0].lineno + 1 < 40, f"{path}: {node.name}"


def test_no_untrusted_file_can_run_code() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert not re.search(
            r"weights_only\s*=\s*False|trust_remote_code|import pickle|allow_pickle|yaml\.load\(", text
        ), path
        assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^)]*\)", text)), path


def snippets() -> list[tuple[str, str]]:
    codes = []
    for page in PAGES:
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL), start=1):
            codes.append((f"{page.name}-{number}", code))
    return codes


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(code, id=name, marks=[pytest.mark.hard] * (name in SLOW or "compiled(" in code))
        for name, code in snippets()
    ],
)
def test_snippets_of_the_documentation_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


def test_the_site_has_every_page_and_every_public_name() -> None:
    """The navigation is written by hand; the reference follows `steer.__all__`."""
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if f": {page.name}\n" not in navigation]
    assert "::: steer\n" in (ROOT / "docs" / "api.md").read_text()


def test_banned_words_are_counted_in_names_and_prose() -> None:
    checker = runpy.run_path(str(ROOT / "docs" / "vocabulary.py"))
    text = "def what_was_told(): ...\n# the run goes on\nresume, contain, retold\n"
    assert list(checker["banned_words"](text)) == [(1, "told"), (2, "goes on")]
    text = "samples_per_prompt = 4  # of a lot\n# samples per prompt\nrow['lot'], plan, allotted\n"
    assert list(checker["banned_words"](text)) == [(1, "lot"), (1, "samples_per_prompt")]
    assert list(checker["banned_names"]("def f(seen):\n    found = unfound = seen\n")) == [(1, "seen"), (2, "found")]
    assert list(checker["first_words"]('def f():\n    """What it is."""\n')) == [(2, '"""What …')]
    assert list(checker["first_words"]('def f():\n    """Raises InputError."""\n')) == [(2, '"""Raises …')]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as Python-Markdown makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    plain = [unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode() for heading in headings]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in plain}


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
            if target.startswith("http"):
                continue
            other = page.parent / target if target else page
            assert other.exists(), f"{page.name}: {target}"
            if anchor and other.suffix == ".md":
                assert anchor in anchors(other), f"{page.name}: {target}#{anchor}"


def test_the_front_page_names_every_training_method() -> None:
    from steer.apps.finetuning import METHODS

    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| **steer** |"))
    plain = {"filtered": "filtered", "reward-backprop": "reward backpropagation"}  # by a word in place of the title
    named = [plain.get(name, trainer.config_class.title) for name, trainer in METHODS.items()]
    assert sorted(row.split("|")[4].strip().split(", ")) == sorted(named)


PRODUCT = """
import pytest

@pytest.mark.parametrize("a", [{}, {"b": 1}, None, 0.5])
@pytest.mark.parametrize(("b", "c"), [(1, 2), (1, 3), (2, 2)])
@pytest.mark.parametrize("d", "xyz")
def test_product(a, b, c, d): ...
"""
COLLECTED = """
import pairwise, pytest, sys

class Hardened:
    def pytest_collection_modifyitems(self, items):
        pairwise.harden(items)
        print("kept", sum(not item.get_closest_marker("hard") for item in items), "of", len(items))

pytest.main([sys.argv[1], "--collect-only", "-q", "-p", "no:cacheprovider"], plugins=[Hardened()])
"""


def test_a_product_of_parameters_is_thinned_out(tmp_path: Path) -> None:
    (tmp_path / "test_product.py").write_text(PRODUCT)
    ran = preloaded.run(["-c", COLLECTED, tmp_path / "test_product.py"], tmp_path, os.environ)
    kept = len(covering(list(itertools.product(range(4), range(3), range(3)))))
    assert f"kept {kept} of 36" in ran.stdout, ran.stdout + ran.stderr


def test_all_pairs_are_kept_by_a_few_rows() -> None:
    rows = list(itertools.product(range(4), range(3), range(3), range(2)))
    kept = [rows[n] for n in covering(rows)]
    assert len(kept) <= 15  # 12 at least, of 72
    for i, j in itertools.combinations(range(4), 2):
        assert {(row[i], row[j]) for row in kept} == {(row[i], row[j]) for row in rows}
