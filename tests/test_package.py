"""Packaging: sdist, wheel and editable install hold every file once, also from a checkout without symlinks."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
LINKS = ("apps", "assets", "pipelines", "rewards")  # steer/apps → ../apps and so on, for tools that read a checkout
SHIPPED = ("README.md", "LICENSE", "pyproject.toml", "steer", *LINKS)
# The last two are not shipped: test_project_structure.py
LEFT_OUT = shutil.ignore_patterns("__pycache__", "scenes-large", "scenes-flow")


def test_a_release_runs_the_tests_first() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    tests = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    assert jobs["tests"]["uses"] == "./.github/workflows/tests.yml" and "workflow_call" in tests[True]  # YAML's `on`
    assert jobs["build"]["needs"] == "tests" and jobs["publish"]["needs"] == "build"


def checkout(into: Path, symlinks: str = "kept") -> Path:
    """A copy of what is built, so that the checkout stays as it is; a system without symlinks writes their targets
    into text files, or nothing."""
    into.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, into / name, symlinks=True, ignore=LEFT_OUT)
        else:
            shutil.copy(ROOT / name, into / name)
    for name in LINKS if symlinks != "kept" else ():
        link = into / "steer" / name
        target = os.readlink(link)
        link.unlink()
        if symlinks == "text":
            link.write_text(target)
    return into


def python(*words: object, cwd: Path, **environment: str) -> str:
    """Output of another Python process; the checkout is not on its path."""
    given = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    ran = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=given, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    return ran.stdout


def build(source: Path, *what: str) -> Path:
    """The folder with what `python -m build` makes of a checkout, without the network."""
    python("-m", "build", "--no-isolation", *what, "--outdir", source.parent / "dist", source, cwd=source)
    return source.parent / "dist"


def files_of_wheel(dist: Path) -> dict[str, bytes]:
    """Paths and contents below `steer` in the one wheel of a folder; no path is there twice."""
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if name.startswith("steer/")]
        assert not [name for name, count in Counter(names).items() if count > 1]
        return {name: wheel.read(name) for name in names}


def expected() -> dict[str, Path]:
    """Path in a wheel → file of the checkout, of every module and of all package-data."""
    folders = SETUPTOOLS["package-dir"]
    files: dict[str, Path] = {}
    for package in SETUPTOOLS["packages"]:
        longest = max((name for name in folders if f"{package}.".startswith(f"{name}.")), key=len)
        folder = ROOT / folders[longest] / package.removeprefix(longest).strip(".").replace(".", "/")
        for pattern in ["*.py", *SETUPTOOLS["package-data"].get(package, [])]:
            for path in folder.glob(pattern):
                if path.is_file():
                    files[f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}"] = path
    return files


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, and the wheel that is built from it."""
    return build(checkout(tmp_path_factory.mktemp("package") / "source"))


@pytest.fixture(scope="module")
def unpacked(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages that holds the wheel alone."""
    target = tmp_path_factory.mktemp("site")
    (wheel,) = dist.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)  # what installing a pure wheel does
    return target


def test_the_wheel_holds_every_file_once(dist: Path) -> None:
    packed, wanted = files_of_wheel(dist), expected()
    assert packed.keys() == wanted.keys()
    assert all(packed[name] == path.read_bytes() for name, path in wanted.items())
    assert {"steer/py.typed", "steer/assets/scenes/model_index.json", "steer/apps/demo/style.css"} <= packed.keys()


def test_the_sdist_holds_every_file_once_and_no_symlink(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        members = sdist.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    names = Counter(PurePosixPath(*PurePosixPath(member.name).parts[1:]) for member in members if member.isfile())
    assert set(names.values()) == {1}
    wanted = {PurePosixPath(path.relative_to(ROOT).as_posix()) for path in expected().values()}
    assert {name for name in names if name.parts[0] in ("steer", *LINKS)} == wanted
    assert {PurePosixPath(name) for name in ("README.md", "LICENSE", "pyproject.toml")} <= names.keys()


IMPORTED = """
import importlib, sys
from pathlib import Path

import steer, steer.apps.cli.main, steer.assets, steer.pipelines, steer.rewards, steer.training

for name in sys.argv[1:] and steer.__all__:
    getattr(steer, name)
loaded = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "steer"}
assert len({module.__file__ for module in loaded.values()}) == len(loaded), "a file is two modules"
assert (steer.assets.MODELS["scenes"] / "model_index.json").is_file()
print("\\n".join(str(Path(module.__file__).resolve()) for module in loaded.values()))
"""


@pytest.mark.parametrize("names", [(), pytest.param(("every public name",), marks=pytest.mark.hard)])
def test_the_wheel_works_in_a_clean_folder(names: tuple[str, ...], unpacked: Path, tmp_path: Path) -> None:
    """Every module and the embedded model come from there."""
    places = python("-c", IMPORTED, *names, cwd=tmp_path, PYTHONPATH=str(unpacked)).splitlines()
    assert len(places) > (30 if names else 8) and all(Path(place).is_relative_to(unpacked) for place in places)


@pytest.mark.parametrize("symlinks", [pytest.param("kept", marks=pytest.mark.hard), "missing"])
def test_an_editable_install_resolves(symlinks: str, tmp_path: Path) -> None:
    source, site = checkout(tmp_path / "source", symlinks), tmp_path / "site"
    quiet = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    python("-m", "pip", "install", *quiet, "--target", site, "--editable", source, cwd=tmp_path)
    # Before other finders: the environment of the tests may have an editable install of its own, of the same name.
    hooked = "import site, sys\nbefore = sys.meta_path[:]\n"
    hooked += "[sys.modules.pop(name) for name in [*sys.modules] if name.startswith('__editable__')]\n"
    hooked += f"sys.path.insert(0, {str(site)!r})\nsite.addsitedir({str(site)!r})\n"
    hooked += "sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in before] + before\n"
    places = python("-c", hooked + IMPORTED, cwd=tmp_path).splitlines()
    assert len(places) > 8 and all(Path(place).is_relative_to(source) for place in places)


@pytest.mark.hard
@pytest.mark.parametrize("symlinks", ["text", "missing"])
def test_a_checkout_without_symlinks_makes_the_same_wheel(symlinks: str, dist: Path, tmp_path: Path) -> None:
    """As git leaves one on Windows."""
    made = build(checkout(tmp_path / "source", symlinks), "--wheel")
    assert files_of_wheel(made) == files_of_wheel(dist)


def test_the_import_takes_less_than_half_a_second(unpacked: Path, tmp_path: Path) -> None:
    """The least CPU time of three runs: other processes may be running."""
    code = "import time; import steer; import sys; print(time.process_time(), 'torch' in sys.modules)"
    runs = [python("-c", code, cwd=tmp_path, PYTHONPATH=str(unpacked)).split() for _ in range(3)]
    assert {torch for _, torch in runs} == {"False"}
    assert min(float(seconds) for seconds, _ in runs) < 0.5
