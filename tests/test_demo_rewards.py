"""The Rewards tab: untrusted files, scored by rewards that visitors name."""

import struct
import sys
import zlib
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

pytest.importorskip("gradio")

import gradio as gr

from steer.apps.demo import rewards_tab as reward_scores
from steer.apps.demo.rewards_tab import (
    DEFAULT_REWARDS,
    EMBEDDED,
    MAX_BYTES,
    RewardsTab,
    Row,
    Score,
    Scores,
    Scoring,
    check_request,
    names_view,
    read_upload,
    scatter_view,
    score_files,
    scores_view,
)
from steer.apps.demo.studio import Studio, Ticket, Waiting
from steer.errors import InputError
from steer.files import read_image
from steer.reward import score
from steer.rewards.parser import load_reward

PROMPT = "a red circle"
EVIL = "<img src=x onerror=window.evil=1>"


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Three images of different sizes and kinds."""
    generator, paths = np.random.default_rng(0), []
    for name, size in (("a.png", (64, 64, 3)), ("b.jpg", (40, 90, 3)), ("c.webp", (128, 64, 3))):
        pixels = (generator.random(size) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        paths.append(tmp_path / name)
    return paths


def scored(studio: Studio, paths: list[Path], *rewards: str, prompt: str = PROMPT) -> Scores:
    """Scores of files by rewards, from the worker."""
    ticket = studio.worker.submit(lambda ticket: score_files(paths, prompt, rewards, studio.reward, ticket))
    *steps, last = [event for event in ticket.events() if not isinstance(event, Waiting)]
    assert steps == [Scoring(number + 1, len(paths)) for number in range(len(paths))]
    return last


def png(width: int, height: int) -> bytes:
    """A small file that says it is a large image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(bytes(min(height, 1000) * (width // 8 + 1)))
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def half() -> bytes:
    """The first half of a good image's bytes."""
    file = BytesIO()
    Image.effect_noise((200, 200), 90).save(file, "PNG")
    return file.getvalue()[: len(file.getvalue()) // 2]


# ---- the job


def test_every_image_has_the_score_that_the_reward_gives_it_alone(studio: Studio, images: list[Path]) -> None:
    rows_found = scored(studio, images, *EMBEDDED)
    assert rows_found.rewards == EMBEDDED and not rows_found.notes
    assert [row.name for row in rows_found.rows] == ["a.png", "b.jpg", "c.webp"]
    assert [row.size for row in rows_found.rows] == [(64, 64), (90, 40), (64, 128)]
    for spec in EMBEDDED:
        reward = load_reward(spec)
        for row, path in zip(rows_found.rows, images, strict=True):
            with torch.no_grad():
                alone = score(reward, read_image(path)[None], [PROMPT]).item()
            assert row.scores[spec].total == pytest.approx(alone, rel=1e-6), (spec, path)


def test_a_sum_tells_its_parts(studio: Studio, images: list[Path]) -> None:
    rows_found = scored(studio, images, "brightness + jpeg:0.5", "brightness")
    for row in rows_found.rows:
        components = row.scores["brightness + jpeg:0.5"].components
        assert list(components) == ["brightness", "jpeg"] and not row.scores["brightness"].components
        total = components["brightness"] + 0.5 * components["jpeg"]
        assert row.scores["brightness + jpeg:0.5"].total == pytest.approx(total, rel=1e-5)


def test_best_first_by_any_reward_with_what_it_did_not_score_last() -> None:
    picture = Image.new("RGB", (4, 4))

    def row(name: str, **scores: float) -> Row:
        return Row(name, (4, 4), picture, {reward: Score(total, {}) for reward, total in scores.items()})

    rows_found = Scores("", ("x", "y"), (row("p", x=1.0, y=3.0), row("q", x=2.0), row("r", x=-1.0, y=5.0)), ())
    assert [one.name for one in rows_found.best_first("x")] == ["q", "p", "r"]
    assert [one.name for one in rows_found.best_first("y")] == ["r", "p", "q"]


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bomb.png", png(30000, 30000), "30000 × 30000 pixels|not an image"),
        ("large.png", png(5000, 4000), "5000 × 4000 pixels: at most 16 megapixels"),
        ("strip.png", png(4000, 40), "4000 × 40 pixels: at most 8 times as long as wide"),
        ("cut.png", half(), "cannot read the image"),
        ("short.png", png(1000, 900)[:60], "cannot read the image|not an image"),
        ("text.png", b"hello", "not an image that can be read"),
        ("empty.png", b"", "not an image that can be read"),
        ("vector.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image that can be read"),
        ("print.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image that can be read"),
        ("heavy.png", bytes(MAX_BYTES + 1), "10.0 MB: at most 10 MB an image"),
        ("gone.png", None, "not an image that can be read"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith((".png", ".svg")) else "",
)
def test_a_bad_file_has_a_line_and_the_others_are_scored(
    studio: Studio, images: list[Path], tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    rows_found = scored(studio, [images[0], tmp_path / name, images[1]], "brightness")
    assert [row.name for row in rows_found.rows] == ["a.png", "b.jpg"]
    (note,) = rows_found.notes
    assert note.startswith(f"{name}: ") and str(tmp_path) not in note and "\n" not in note
    with pytest.raises(InputError, match=message):
        read_upload(tmp_path / name)


def test_sizes_are_known_before_pixels_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(path: Path) -> None:
        raise AssertionError("its pixels were decoded")

    monkeypatch.setattr(reward_scores, "read_image", decoded)
    monkeypatch.setattr(Image.Image, "load", decoded)
    for number, size in enumerate(((5000, 4000), (9000, 9000), (9, 900))):
        path = tmp_path / f"{number}.png"
        path.write_bytes(png(*size))
        with pytest.raises(InputError, match="pixels"):
            read_upload(path)


def test_an_upload_without_an_image_is_refused_in_one_line(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(InputError, match=r"text\.png: not an image"):
        scored(studio, [tmp_path / "text.png"], "brightness")


def test_a_reward_that_would_run_code_is_refused_and_the_others_score(
    studio: Studio, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil.py").write_text(
        "from pathlib import Path\nPath('ran').touch()\ndef reward(images, prompts): ...\n"
    )
    (tmp_path / "evil.yaml").write_text("reward: evil:reward\n")
    specs = ("evil:reward", "brightness + evil:reward", "min(brightness, evil:reward)", "evil.yaml", "os:system")
    rows_found = scored(studio, images, *specs, "brightness")
    assert rows_found.rewards == ("brightness",) and len(rows_found.notes) == len(specs)
    for spec, note in zip(specs, rows_found.notes, strict=True):
        assert note.startswith(f"{spec}: ") and "here rewards have names" in note
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules
    with pytest.raises(InputError, match="here rewards have names"):
        list(studio.worker.submit(lambda t: score_files(images, "", specs, studio.reward, t)).events())


def test_a_reward_that_cannot_score_has_one_line(studio: Studio, images: list[Path]) -> None:
    rows_found = scored(studio, images, "scene", "brightness", prompt="a portrait of somebody")
    assert [*rows_found.rows[0].scores] == ["brightness"]
    (note,) = rows_found.notes
    assert note.startswith("scene: the scene reward cannot read 'a portrait of somebody'")


def test_a_stop_acts_between_two_rewards(studio: Studio, images: list[Path]) -> None:
    calls: list[str] = []
    tickets: list[Ticket] = []

    class Slow:
        name, differentiable = "slow", False

        def __call__(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
            calls.append("slow")
            tickets[0].stop()
            return torch.zeros(len(images))

    def work(ticket: Ticket) -> None:
        tickets.append(ticket)
        score_files(images, PROMPT, ("one", "two"), lambda spec: Slow(), ticket)

    error_text = list(studio.worker.submit(work).events())
    assert calls == ["slow"] and not any(isinstance(event, Scores) for event in error_text)


@pytest.mark.parametrize(
    ("paths", "prompt", "rewards", "message"),
    [
        ([], "", ["scene"], "no images: drop some first"),
        ([Path("a")] * 33, "", ["scene"], "33 images: at most 32"),
        ([Path("a")], "", [], "no rewards: tick one"),
        ([Path("a")], "", ["scene"] * 9, "9 rewards: at most 8"),
        ([Path("a")], "a" * 501, ["scene"], "a prompt of 501 characters"),
    ],
)
def test_nothing_or_too_much_is_refused(paths: list[Path], prompt: str, rewards: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_request(paths, prompt, rewards)


# ---- what is shown


def made(values: list[tuple[float, float]]) -> Scores:
    picture = Image.new("RGB", (30, 20), "teal")
    rows = [
        Row(f"{number}.png", (30, 20), picture, {"x": Score(x, {"one": x}), "y": Score(y, {})})
        for number, (x, y) in enumerate(values)
    ]
    return Scores(PROMPT, ("x", "y"), tuple(rows), ("z: it is not there",))


def test_the_table_has_the_best_first_and_says_what_was_left_out() -> None:
    shown = scores_view(made([(1.0, 5.0), (3.0, 2.0), (2.0, 4.0)]), "x")
    places = [shown.index(f">{star}{name}.png<") for star, name in (("★ ", 1), ("", 2), ("", 0))]
    assert places == sorted(places) and "z: it is not there" in shown
    assert shown.count("aria-sort") == 1 and 'aria-sort="descending">x<' in shown
    assert "What the scores are made of" in shown and "x: one" in shown


def test_the_scatter_tells_spearmans_rho_and_every_picture_can_be_reached() -> None:
    values = [(0.1, 5.0), (0.4, 1.0), (0.2, 4.0), (0.9, 2.0), (0.3, 8.0)]
    rho = stats.spearmanr(*zip(*values, strict=True)).statistic
    shown = scatter_view(made(values), "x", "y")
    assert f"ρ = {rho:.2f}".replace("-", "−") in shown and "over 5 images" in shown
    assert shown.count('class="steer-spot" role="img" tabindex="0"') == 5
    assert 'aria-label="3.png: x 0.9, y 2"' in shown and "<table" in shown
    assert "there is no order to compare" in scatter_view(made([(1.0, 2.0), (1.0, 3.0)]), "x", "y")
    assert scatter_view(made([(1.0, 2.0)]), "x", "y") == ""


def test_names_of_files_and_rewards_are_escaped() -> None:
    picture = Image.new("RGB", (4, 4))
    rows = [Row(EVIL, (4, 4), picture, {EVIL: Score(x, {EVIL: x, '"': x})}) for x in (1.0, 2.0)]
    evil = Scores(EVIL, (EVIL,), tuple(rows), (EVIL,))
    for shown in (scores_view(evil, EVIL), scatter_view(evil, EVIL, EVIL)):
        assert "<img src=x" not in shown and "&lt;img src=x" in shown


def test_the_help_lists_every_reward_that_has_a_name() -> None:
    shown = names_view()
    assert all(f">{name}</th>" in shown for name in ("scene", "clip", "jpeg", "preference"))
    assert set(DEFAULT_REWARDS) < set(EMBEDDED)


# ---- the tab


def test_a_visitor_sees_scores_and_refusals(studio: Studio, images: list[Path]) -> None:
    with gr.Blocks() as blocks:
        tab = RewardsTab(studio)
    assert blocks.fns and all(one.api_visibility == "private" for one in blocks.fns.values())
    visitor: Any = SimpleNamespace(session_hash="ada")
    rows_found: dict[Any, Any] = {}
    for change in tab.run([*map(str, images)], PROMPT, ["brightness"], "\n jpeg \nbrightness\nos:system\n", visitor):
        rows_found |= change
    assert "Done: 3 images by 2 rewards. Some were left out" in rows_found[tab.status]
    assert rows_found[tab.scores].rewards == ("brightness", "jpeg") and rows_found[tab.start]["interactive"]
    assert rows_found[tab.by]["value"] == "brightness" and "Spearman" in rows_found[tab.scatter]
    with pytest.warns(UserWarning, match="no images"):
        (_, refused, _) = tab.run(None, "", ["brightness"], "", visitor)
    assert "no images: drop some first" in refused[tab.status]
    assert str(Scoring(1, 3)) == "Scoring image 1 of 3 …"
