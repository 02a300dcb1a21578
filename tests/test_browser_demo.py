"""The app in a real browser: make test-browser. Every request that leaves the machine would fail a test."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import ConsoleMessage, Page, Route, expect, sync_playwright

pytestmark = pytest.mark.browser
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
SLOW = 60_000  # ms: the first run loads the model
# Every 20 ms: the first preview that can be seen, until the run has ended.
COLLECT = """() => {
    window.before = new Set();
    setInterval(() => {
        const images = [...document.querySelectorAll('#steer-view img')].filter(image => image.checkVisibility());
        const done = /Done/.test(document.querySelector('#steer-status').innerText);
        if (images.length && !done) window.before.add(images[0].src);
    }, 20);
}"""
EVIL = "<script>window.evil=1</script><img src=x onerror=window.evil=1>"


@dataclass
class Served:
    """A running `steer demo`."""

    url: str
    process: subprocess.Popen[str]
    labels: Path


def served(folder: Path, *more: str) -> Served:
    """Starts the command as a user does, and waits for its address."""
    command = [sys.executable, "-m", "steer.apps.cli.main", "demo", "--labels", str(folder / "labels"), *more]
    cache = {"XDG_CACHE_HOME": str(folder / "cache")}  # of the history
    given = os.environ | cache | {"TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=given)
    assert process.stdout is not None
    for line in process.stdout:
        if address := re.search(r"http://\S+", line):
            return Served(address[0], process, folder / "labels")
    raise AssertionError("no address was printed")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("app")
    running = served(folder)
    yield running
    running.process.terminate()  # Ctrl-C is not heard by what a shell began in the background
    assert running.process.wait(90) == 0
    assert not list(folder.glob("steer-demo-*")), "what visitors left is gone"


@dataclass
class Watch:
    """The requests of a page to other machines, and its errors."""

    outside: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def route(self, route: Route) -> None:
        if re.match(r"(https?|wss?)://(127\.0\.0\.1|localhost)[:/]", route.request.url):
            route.continue_()
        else:
            self.outside.append(route.request.url)
            route.abort()

    def note(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser: object, app: Served) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})  # type: ignore[attr-defined]
    watch, made = Watch(), context.new_page()
    made.route("**/*", watch.route)
    made.on("console", watch.note)
    made.on("pageerror", lambda error: watch.errors.append(str(error)))
    made.set_default_timeout(SLOW)
    made.goto(app.url)
    expect(made.locator("#steer-start")).to_be_visible(timeout=SLOW)
    yield made
    context.close()
    assert not watch.outside and not watch.errors


def status(page: Page) -> str:
    return page.locator("#steer-status").inner_text()


def run_to_end(page: Page) -> None:
    page.locator("#steer-start").click()
    expect(page.locator("#steer-status")).to_contain_text(re.compile("Done|Stopped"), timeout=SLOW)


def test_particles_arrive_one_by_one_and_the_end_is_compared(page: Page) -> None:
    page.evaluate(COLLECT)
    run_to_end(page)
    assert page.evaluate("window.before.size") >= 3, "distinct previews before the end"
    expect(page.locator("#steer-slider img").first).to_be_visible()
    expect(page.locator("#steer-rewards")).to_contain_text("denoiser evaluations")


def test_ctrl_enter_runs_and_the_result_is_in_view_and_enlarged_and_walked_through_by_keys(page: Page) -> None:
    page.set_viewport_size({"width": 1280, "height": 720})
    page.locator("#steer-prompts textarea").press("Control+Enter")
    expect(page.locator("#steer-status")).to_contain_text("Done", timeout=SLOW)
    expect(page.locator("#steer-slider img").first).to_be_visible()
    page.wait_for_function("[...document.querySelectorAll('#steer-slider img')].every(one => one.complete)")
    for one in ("#steer-prompts", "#steer-start", "#steer-status", "#steer-slider"):
        box = page.locator(one).bounding_box()
        assert box is not None and box["y"] >= 0 and box["y"] + box["height"] <= 720, (one, box)
    page.locator("#steer-images .thumbnail-item").first.click()
    large = page.locator("#steer-images img[data-testid=detailed-image]")
    expect(large).to_be_visible()
    assert (large.bounding_box() or {"height": 0})["height"] >= 300
    first = large.get_attribute("src")
    page.keyboard.press("ArrowRight")
    expect(large).not_to_have_attribute("src", first or "")
    page.keyboard.press("ArrowLeft")
    expect(large).to_have_attribute("src", first or "")
    page.locator("#steer-images").get_by_label("Close").click()
    expect(page.locator("#steer-images .thumbnail-item")).to_have_count(2)


def test_stop_ends_a_run_at_once(page: Page) -> None:
    page.get_by_label("number input for Steps").fill("100")
    page.locator("#steer-start").click()
    expect(page.locator("#steer-status")).to_contain_text("Searching", timeout=SLOW)
    page.locator("#steer-stop").click()
    started = time.monotonic()
    expect(page.locator("#steer-status")).to_contain_text("Stopped", timeout=SLOW)
    assert time.monotonic() - started < 5
    expect(page.locator("#steer-start")).to_be_enabled()


def test_script_tags_in_prompts_do_nothing(page: Page) -> None:
    page.get_by_label("Prompt").first.fill(EVIL)
    page.get_by_label("Reward").first.fill("brightness")
    page.get_by_label("Reward").first.press("Enter")
    run_to_end(page)
    assert page.evaluate("window.evil") is None
    assert "Done" in status(page)


def test_an_image_brings_its_settings_back(page: Page, tmp_path: Path) -> None:
    page.get_by_label("number input for Steps").fill("7")
    page.get_by_label("Seed").first.fill("11")
    run_to_end(page)
    page.get_by_text("Images, each with its settings inside").click()
    with page.expect_download() as download:
        page.locator("#steer-files a").first.click()
    download.value.save_as(tmp_path / "best.png")
    page.reload()
    page.locator("#steer-drop input[type=file]").set_input_files(tmp_path / "best.png")
    expect(page.locator("#steer-status")).to_contain_text("restored", timeout=SLOW)
    expect(page.get_by_label("number input for Steps")).to_have_value("7")
    expect(page.get_by_label("Seed").first).to_have_value("11")


def test_a_second_run_of_reno_keeps_the_steps_and_a_seed_that_cannot_be_leaves_no_done(page: Page) -> None:
    page.get_by_label("number input for Steps").fill("2")
    page.locator("#steer-method input").click()
    page.get_by_role("option", name="Optimised noise (ReNO)").click()
    page.get_by_label("number input for Iterations").fill("3")
    expect(page.get_by_label("number input for Steps")).to_have_value("2")
    for seed in ("1", "2"):
        page.get_by_label("Seed").first.fill(seed)
        page.locator("#steer-start").click()
        expect(page.locator("#steer-status")).to_contain_text(f"seed {seed}.", timeout=SLOW)
    expect(page.locator("#steer-base img")).not_to_have_count(0)
    page.get_by_label("Seed").first.fill("-3")
    page.locator("#steer-start").click()
    expect(page.locator("#steer-status")).to_contain_text("seed must be 0 to", timeout=SLOW)


def test_a_closed_tab_frees_the_worker(page: Page, app: Served) -> None:
    leaver = page.context.new_page()
    leaver.goto(app.url)
    leaver.get_by_label("number input for Steps").fill("100", timeout=SLOW)
    leaver.locator("#steer-start").click()
    expect(leaver.locator("#steer-status")).to_contain_text("Searching", timeout=SLOW)
    leaver.close()
    run_to_end(page)


def test_the_endpoint_is_the_only_one_and_gives_images(app: Served, tmp_path: Path) -> None:
    from gradio_client import Client

    from steer.apps.recipes import read_metadata

    client = Client(app.url, verbose=False, download_files=tmp_path)
    api = client.view_api(return_format="dict", print_info=False)
    assert list(api["named_endpoints"]) == ["/steer"] and not api["unnamed_endpoints"]
    images, report = client.predict("a red star", steps=4, particles=8, seed=3, api_name="/steer")
    assert len(images) == 2, "the best two of eight starts"
    assert json.dumps(report) and report["settings"]["seed"] == 3
    recipe = read_metadata(Path(images[0]["image"]))
    assert recipe.prompt == "a red star" and recipe.reward == pytest.approx(report["rewards"][0])


def test_a_finetuning_stops_resumes_and_is_compared(page: Page) -> None:
    page.get_by_role("tab", name="Finetune").click()
    page.get_by_label("number input for Updates").fill("9")
    page.locator("#finetune-start").click()
    progress = page.locator("#finetune-status")
    expect(progress).to_contain_text("Update 1 of 9, reward", timeout=SLOW)
    page.locator("#finetune-stop").click()
    expect(progress).to_contain_text(re.compile("Stopped after [1-8] of 9 updates"), timeout=SLOW)
    expect(page.locator("#finetune-samples")).to_contain_text("before training")
    page.locator("#finetune-more").click()
    expect(progress).to_contain_text("Done: 9 updates", timeout=SLOW)
    expect(page.locator("#finetune-charts svg").first).to_be_visible()
    expect(page.locator(".steer-held:visible .steer-cell")).to_have_count(16)
    page.locator("#finetune-load").click()
    expect(page.locator("#steer-status")).to_contain_text("before and after", timeout=SLOW)
    run_to_end(page)
    expect(page.locator("#steer-slider")).to_contain_text("Left: base model, right: finetuned")
    expect(page.locator("#steer-rewards")).to_contain_text("Mean reward")


def test_images_are_scored_and_what_is_none_is_named(page: Page, tmp_path: Path) -> None:
    for name, colour in (("red", (220, 30, 30)), ("grey", (128, 128, 128)), ("white", (255, 255, 255))):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    (tmp_path / "script.png").write_text(f"{EVIL}")
    page.get_by_role("tab", name="Rewards").click()
    page.locator("#rewards-files input[type=file]").set_input_files(sorted(tmp_path.glob("*.png")))
    expect(page.locator("#rewards-files")).to_contain_text("white", timeout=SLOW)
    page.get_by_label("brightness").check()
    page.get_by_label("Others, by name").fill(f"colour:red\n{EVIL}")
    page.locator("#rewards-start").click()
    expect(page.locator("#rewards-status")).to_contain_text("Done: 3 images by 5 rewards", timeout=SLOW)
    notes = page.locator(".steer-left-out")
    for name in ("bomb.png: 9000 × 9000 pixels", "torn.png: ", "script.png: not an image", "here rewards have names"):
        expect(notes).to_contain_text(name)
    page.get_by_label("Best first by").click()
    page.get_by_role("option", name="brightness").click()
    expect(page.locator("#rewards-view tbody tr").first).to_contain_text("white.png")
    expect(page.locator("#rewards-scatter .steer-spot")).to_have_count(3)
    assert page.evaluate("window.evil") is None


def test_files_that_are_too_large_or_torn_are_refused(page: Page, app: Served, tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (tmp_path / "large.png").write_bytes(bytes(11 * 2**20))
    page.locator("#steer-drop input[type=file]").set_input_files(tmp_path / "torn.png")
    expect(page.locator("#steer-status")).to_contain_text("torn.png: not a PNG that can be read", timeout=SLOW)
    other = page.context.new_page()
    other.goto(app.url)
    other.locator("#steer-drop input[type=file]").set_input_files(tmp_path / "large.png")
    expect(other.locator("#steer-status")).to_contain_text("large.png: not a PNG that can be read", timeout=SLOW)
    run_to_end(other)


def test_ten_choices_by_key_survive_a_kill(browser: object, tmp_path: Path) -> None:
    running = served(tmp_path)
    page = browser.new_page()  # type: ignore[attr-defined]
    page.set_default_timeout(SLOW)
    page.goto(running.url)
    page.get_by_role("tab", name="Label").click()
    page.locator("#label-name input, #label-name textarea").fill("Ada <script>")
    page.keyboard.press("Enter")
    for number in range(10):
        expect(page.locator("#label-view img").first).to_be_visible(timeout=SLOW)
        group = page.locator(".steer-label").get_attribute("data-group")
        page.keyboard.press("ArrowLeft" if number % 2 else "ArrowRight")
        count = re.compile(rf"{number + 1} choices?,")
        expect(page.locator("#label-progress")).to_contain_text(count, timeout=SLOW)
        expect(page.locator(f'.steer-label:not([data-group="{group}"]) img').first).to_be_visible(timeout=SLOW)
    running.process.kill()
    running.process.wait()
    lines = [json.loads(line) for line in (running.labels / "choices.jsonl").read_text().splitlines()]
    assert len({line["lot"] for line in lines}) == 10 and {line["annotator"] for line in lines} == {"Ada <script>"}
    assert [line["chosen"] for line in lines] == [1, 0] * 5
    page.close()


def test_labels_are_zoomed_by_key_and_teach_a_reward(browser: object, tmp_path: Path) -> None:
    running = served(tmp_path)
    page = browser.new_page(viewport={"width": 1280, "height": 900})  # type: ignore[attr-defined]
    page.set_default_timeout(SLOW)
    page.goto(running.url)
    page.get_by_role("tab", name="Label").click()
    page.locator("#label-name input, #label-name textarea").fill("Ada")
    page.keyboard.press("Enter")
    picture = page.locator("#label-view img").first
    expect(picture).to_be_visible(timeout=SLOW)
    small = picture.bounding_box() or {"width": 0}
    page.keyboard.press("z")
    expect(page.locator("#label-view [data-zoom]")).to_have_attribute("aria-pressed", "true")
    assert (picture.bounding_box() or {"width": 0})["width"] > small["width"]
    page.keyboard.press("Escape")
    expect(page.locator("#label-view [data-zoom]")).to_have_attribute("aria-pressed", "false")
    for number in range(6):
        group = page.locator(".steer-label").get_attribute("data-group")
        page.keyboard.press("ArrowRight")
        expect(page.locator("#label-progress")).to_contain_text(re.compile(rf"{number + 1} choices?,"), timeout=SLOW)
        expect(page.locator(f'.steer-label:not([data-group="{group}"]) img').first).to_be_visible(timeout=SLOW)
    page.locator("#label-reward-start").click()
    expect(page.locator("#label-reward-status")).to_contain_text("preference:labels-1: ", timeout=4 * SLOW)
    page.locator("#label-reward-use").click()
    expect(page.get_by_label("Reward").first).to_have_value("preference:labels-1", timeout=SLOW)
    page.close()
    running.process.terminate()
    assert running.process.wait(90) == 0


def test_texts_appear_word_by_word(page: Page) -> None:
    page.get_by_role("tab", name="Text").click()
    page.get_by_label("Beginning of the text").fill("a red circle and")
    page.locator("#text-start").click()
    expect(page.locator("#text-status")).to_contain_text("Done: 4 texts", timeout=SLOW)
    view = page.locator("#text-view")
    expect(view.locator(".steer-frame:not([hidden]) .steer-text").first).to_contain_text("a red circle and")
    view.locator(".steer-scrubber").fill("2")
    expect(view.locator(".steer-frame:not([hidden]) .steer-masked").first).to_be_visible()
    expect(view.locator(".steer-table")).to_contain_text("base 1")
    page.get_by_label("Beginning of the text").fill("two")
    page.get_by_role("tab", name="History").click()
    expect(page.locator("#history-view")).to_contain_text("a red circle and", timeout=SLOW)
    page.locator("#history-restore").click()
    expect(page.get_by_label("Beginning of the text")).to_have_value("a red circle and", timeout=SLOW)


def history_run(page: Page, seed: int) -> None:
    page.get_by_label("Seed").first.fill(str(seed))
    page.get_by_label("number input for Steps").fill("4")
    run_to_end(page)
    expect(page.locator("#steer-status")).to_contain_text(f"seed {seed}.", timeout=SLOW)


def opened_history(page: Page, url: str) -> None:
    page.goto(url)
    page.get_by_role("tab", name="History").click()


def choose_second(page: Page, name: str) -> None:
    page.locator("#history-second input").click()
    page.get_by_role("option", name=name).click()


def test_the_history_survives_a_kill_and_restores_compares_and_shares(browser: object, tmp_path: Path) -> None:
    running = served(tmp_path)
    page = browser.new_page(viewport={"width": 1280, "height": 900})  # type: ignore[attr-defined]
    page.set_default_timeout(SLOW)
    page.goto(running.url)
    history_run(page, 11)
    history_run(page, 12)
    running.process.kill()
    running.process.wait()
    running = served(tmp_path)
    opened_history(page, running.url)
    expect(page.locator("#history-status")).to_contain_text("2 runs in your history", timeout=SLOW)
    expect(page.locator("#history-runs button:has(img)")).to_have_count(2)
    expect(page.locator("#history-view")).to_contain_text("seed 12")
    choose_second(page, "seed 11")
    expect(page.locator("#history-view img")).to_have_count(2)
    expect(page.locator("#history-view table").first).to_contain_text(re.compile(r"seed\s*12\s*11"))
    page.screenshot(path=tmp_path / "history.png")
    page.locator("#history-runs button:has(img)").nth(1).click()
    expect(page.locator("#history-first input")).to_have_value(re.compile("seed 11"))
    page.locator("#history-share").click()
    link = page.locator("#history-link textarea, #history-link input")
    expect(link).to_have_value(re.compile(r"^http://.*\?settings=%7B"))
    page.goto(link.input_value())
    expect(page.locator("#steer-status")).to_contain_text("Settings of the link", timeout=SLOW)
    expect(page.get_by_label("Seed").first).to_have_value("11")
    opened_history(page, running.url)
    page.locator("#history-rewards").click()
    expect(page.locator("#rewards-files")).to_contain_text("image1", timeout=SLOW)
    page.get_by_role("tab", name="History").click()
    page.locator("#history-label").click()
    expect(page.locator("#label-status")).to_contain_text("1 pair of the run", timeout=SLOW)
    page.get_by_role("tab", name="History").click()
    page.locator("#history-restore").click()
    expect(page.get_by_label("Seed").first).to_have_value("12")
    expect(page.locator("#steer-status")).to_contain_text("restored", timeout=SLOW)
    page.get_by_role("tab", name="History").click()
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("#history-clear").click()
    expect(page.locator("#history-status")).to_contain_text("appear here")
    page.close()
    running.process.terminate()
    assert running.process.wait(90) == 0


def test_visitors_of_an_app_with_a_login_do_not_see_each_others_history(browser: object, tmp_path: Path) -> None:
    running = served(tmp_path, "--auth", "ada:secret")
    first, second = (browser.new_context() for _ in range(2))  # type: ignore[attr-defined]
    page, other = first.new_page(), second.new_page()
    for one in (page, other):
        one.set_default_timeout(SLOW)
        one.goto(running.url)
        one.locator("input").nth(0).fill("ada")
        one.locator("input").nth(1).fill("secret")
        one.get_by_role("button", name="Login").click()
        expect(one.locator("#steer-start")).to_be_visible(timeout=SLOW)
    history_run(page, 11)
    opened_history(page, running.url)  # a reload
    expect(page.locator("#history-status")).to_contain_text("1 run in your history", timeout=SLOW)
    opened_history(other, running.url)
    expect(other.locator("#history-status")).to_contain_text("appear here", timeout=SLOW)
    expect(other.locator("#history-view img")).to_have_count(0)
    for context in (first, second):
        context.close()
    running.process.terminate()
    assert running.process.wait(90) == 0
    assert not list(tmp_path.glob("steer-demo-*")) and not (tmp_path / "cache" / "steer").exists()


# ---- every tab in both themes, on a desk and on a phone

SCREENS = os.environ.get("STEER_SCREENS")  # a folder for screenshots of every tab
LOOKS = [(scheme, width) for scheme in ("light", "dark") for width in (1280, 390)]
# Texts whose contrast is below that of WCAG 2.1 (1.4.3): 4.5 to 1, or 3 to 1 for large ones.
PALE = r"""() => {
    const context = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
    const known = new Map();
    const rgba = text => {
        if (!known.has(text)) {
            context.clearRect(0, 0, 1, 1);
            context.fillStyle = text;
            context.fillRect(0, 0, 1, 1);
            const [red, green, blue, alpha] = context.getImageData(0, 0, 1, 1).data;
            known.set(text, [red, green, blue, alpha / 255]);
        }
        return known.get(text);
    };
    const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
    const ancestors = element => element ? [...ancestors(element.parentElement), element] : [];
    const luminance = colour => {
        const [red, green, blue] = colour.map(value => value / 255)
            .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const pale = [];
    for (const element of document.querySelectorAll('body *')) {
        const written = [...element.childNodes].filter(node => node.nodeType === Node.TEXT_NODE).map(node => node.data);
        const text = (written.join('') || element.value || '').toString().trim();
        const box = element.getBoundingClientRect();
        if (!text || box.width < 2 || box.height < 2) continue;
        if (['SCRIPT', 'STYLE', 'OPTION'].includes(element.tagName)) continue;
        if (['range', 'checkbox', 'radio', 'file'].includes(element.type)) continue;
        if (!element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
        if (element.closest(':disabled, [aria-disabled=true]')) continue;
        const chain = ancestors(element), style = getComputedStyle(element);
        if (chain.some(one => getComputedStyle(one).backgroundImage !== 'none')) continue;
        const below = chain.map(one => rgba(getComputedStyle(one).backgroundColor))
            .reduce((under, top) => over(top, under), [255, 255, 255]);
        const colour = rgba(element instanceof SVGElement ? style.fill : style.color);
        const opacity = chain.reduce((product, one) => product * getComputedStyle(one).opacity, colour[3]);
        const [high, low] = [luminance(below), luminance(over([...colour.slice(0, 3), opacity], below))]
            .sort((one, other) => other - one);
        const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
        const ratio = (high + 0.05) / (low + 0.05);
        if (ratio < (large ? 3 : 4.5)) {
            pale.push(`${element.tagName} ${element.className?.baseVal ?? element.className}: ${text.slice(0, 40)} ` +
                `${ratio.toFixed(2)}`);
        }
    }
    return pale;
}"""
LABELS = "button:not(.thumbnail-item), label > span, [role=tab], summary, th, figcaption, .caption-label, .grid-wrap"
CUT = """labels => [...document.querySelectorAll(labels)]
    .filter(one => one.checkVisibility() && one.scrollWidth > one.clientWidth + 1 && one.clientWidth > 1)
    .filter(one => getComputedStyle(one).overflowX !== 'visible' && !one.closest('.steer-scroll'))
    .map(one => `${one.tagName} ${one.className} ${one.innerText}`)"""


def check_looks(page: Page, name: str, width: int) -> None:
    """Contrast, cut labels and sideways scrolling of the page as it is, in both themes and widths."""
    for scheme, across in LOOKS:
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        page.set_viewport_size({"width": across, "height": 900})
        page.wait_for_function("dark => document.body.classList.contains('dark') === dark", arg=scheme == "dark")
        page.wait_for_timeout(400)  # transitions of colours
        if SCREENS:
            page.screenshot(path=Path(SCREENS) / f"{name}-{scheme}-{across}.png", full_page=True)
        where = f"{name}, {scheme}, {across} px"
        assert not page.evaluate(PALE), where
        assert not page.evaluate(CUT, LABELS), where
        assert page.evaluate("document.documentElement.scrollWidth") <= across, where
    page.set_viewport_size({"width": width, "height": 900})


PHONE_WIDTH = 600  # px, of a window in which not all tabs fit


def open_tab(page: Page, name: str) -> None:
    """Choose a tab, which on a phone may be in the menu of those that do not fit."""
    tab, menu = page.get_by_role("tab", name=name, exact=True), page.locator(".overflow-menu > button")
    if (page.viewport_size or {"width": 0})["width"] < PHONE_WIDTH:
        menu.wait_for()  # tabs are all there until their width is measured
    if not tab.is_visible():
        menu.click()
        tab = page.locator(".overflow-dropdown").get_by_text(name, exact=True)
    tab.click()


@pytest.fixture(params=[("light", 1280), ("dark", 390)], ids=["desk", "phone"])
def shaped(request: pytest.FixtureRequest, page: Page) -> tuple[Page, int]:
    """A page on a desk, or in the dark on a phone, and its width."""
    scheme, width = request.param
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    return page, width


def test_the_main_path_of_steer_and_history_looks_well(shaped: tuple[Page, int]) -> None:
    page, width = shaped
    check_looks(page, "steer-before", width)
    page.locator("#steer-preset input").click()
    page.get_by_role("option", name="Samples").click()
    expect(page.locator("#steer-status")).to_contain_text("Preset", timeout=SLOW)
    expect(page.locator("#steer-method input")).to_have_value("Samples (Feynman–Kac)")
    page.get_by_label("number input for Steps").fill("6")
    run_to_end(page)
    expect(page.locator("#steer-images img").first).to_be_visible(timeout=SLOW)
    check_looks(page, "steer", width)
    page.locator("#steer-preset input").fill("mine")
    page.locator("#steer-preset input").press("Enter")
    page.locator("#steer-preset-save").click()
    expect(page.locator("#steer-status")).to_contain_text("Preset 'mine' saved", timeout=SLOW)
    open_tab(page, "History")
    expect(page.locator("#history-view img")).to_have_count(1, timeout=SLOW)
    page.get_by_text("Grid of two settings").click()
    page.get_by_label("Values of the columns").fill("1,2")
    page.locator("#grid-start").click()
    expect(page.locator("#grid-status")).to_contain_text("Done: 2 images", timeout=SLOW)
    expect(page.locator("#grid-image img")).to_be_visible(timeout=SLOW)
    check_looks(page, "history", width)
    page.reload()  # the preset is in the browser
    page.locator("#steer-preset input").click()
    page.get_by_role("option", name="mine").click()
    expect(page.get_by_label("number input for Steps")).to_have_value("6", timeout=SLOW)


def test_the_main_path_of_text_looks_well(shaped: tuple[Page, int]) -> None:
    page, width = shaped
    open_tab(page, "Text")
    page.locator("#text-start").click()
    expect(page.locator("#text-status")).to_contain_text("Done: 4 texts", timeout=SLOW)
    check_looks(page, "text", width)


def test_the_main_path_of_label_looks_well(shaped: tuple[Page, int]) -> None:
    page, width = shaped
    open_tab(page, "Label")
    page.locator("#label-name input, #label-name textarea").fill(f"Ada {width}")
    page.keyboard.press("Enter")
    first = page.locator("#label-view img").first
    expect(first).to_be_visible(timeout=SLOW)
    page.locator(".steer-label button").first.click()
    expect(page.locator("#label-progress")).to_contain_text(re.compile(r"1 choice,"), timeout=SLOW)
    expect(first).to_be_visible(timeout=SLOW)
    check_looks(page, "label", width)


def test_the_main_path_of_finetune_looks_well(shaped: tuple[Page, int]) -> None:
    page, width = shaped
    open_tab(page, "Finetune")
    page.get_by_label("number input for Updates").fill("1")
    page.locator("#finetune-start").click()
    expect(page.locator("#finetune-status")).to_contain_text("Done: 1 update", timeout=4 * SLOW)
    check_looks(page, "finetune", width)


def test_the_main_path_of_rewards_looks_well(shaped: tuple[Page, int], tmp_path: Path) -> None:
    page, width = shaped
    for name, colour in (("red", (220, 30, 30)), ("grey", (128, 128, 128))):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    open_tab(page, "Rewards")
    page.locator("#rewards-files input[type=file]").set_input_files(sorted(tmp_path.glob("*.png")))
    expect(page.locator("#rewards-files")).to_contain_text("red", timeout=SLOW)
    page.get_by_label("brightness").check()
    page.locator("#rewards-start").click()
    expect(page.locator("#rewards-status")).to_contain_text("Done: 2 images", timeout=SLOW)
    check_looks(page, "rewards", width)


def test_the_first_picture_and_the_clicks_to_another_seed(page: Page) -> None:
    """Prints seconds from Steer to a picture, of the second run: the first one may load the model."""
    run_to_end(page)
    first = page.locator("#steer-status").inner_text()
    page.get_by_label("A new seed for every run").click()
    expect(page.locator("#steer-start")).to_be_enabled()
    page.evaluate("""() => {
        const start = document.querySelector('#steer-start');
        start.addEventListener('click', () => { window.clicked = performance.now(); window.picture = null; });
        window.cleared = false;
        setInterval(() => {
            const shown = [...document.querySelectorAll('#steer-view img')].some(one => one.checkVisibility());
            window.cleared ||= window.clicked && !shown;
            if (window.cleared && shown) window.picture ??= performance.now();
        }, 10);
    }""")
    page.locator("#steer-start").click()  # the only click of each further run
    page.wait_for_function("window.picture", timeout=SLOW)
    assert "Done" not in page.locator("#steer-status").inner_text(), "a preview, before the end"
    seconds = page.evaluate("(window.picture - window.clicked) / 1000")
    expect(page.locator("#steer-status")).to_contain_text("Done", timeout=SLOW)
    assert page.locator("#steer-status").inner_text() != first, "another seed"
    print(f"first picture after {seconds:.2f} s")  # noqa: T201 - the measurement of docs/demo.md
