"""Seconds from *Steer* to the first picture, of running `steer demo`s in turns: python tests/first_picture.py URL …

Takes any version of the demo: docs/demo.md has the figures before and after the previews of the first steps.
"""

import os
import shutil
import statistics
import sys

from playwright.sync_api import Page, sync_playwright
from playwright.sync_api import expect as seen

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
SLOW = 60_000  # ms: the first run loads the model
RUNS = 11
# Times in ms of the click, and of the first image that can be seen after the view was cleared.
CLOCK = """() => {
    window.clicked = window.picture = null;
    let cleared = false;
    document.querySelector('#steer-start').addEventListener(
        'click', () => { window.clicked = performance.now(); }, {once: true});
    const timer = setInterval(() => {
        const shown = [...document.querySelectorAll('#steer-view img')].some(one => one.checkVisibility());
        cleared ||= window.clicked && !shown;
        if (!cleared || !shown) return;
        window.picture = performance.now();
        clearInterval(timer);
    }, 10);
}"""


def first_picture(page: Page) -> float:
    """Press Steer and wait for a picture: the seconds. Not of the first run, which may load the model."""
    page.evaluate(CLOCK)
    page.locator("#steer-start").click()
    page.wait_for_function("window.picture", timeout=SLOW)
    seconds: float = page.evaluate("(window.picture - window.clicked) / 1000")
    return seconds


def wait_for_end(page: Page) -> None:
    seen(page.locator("#steer-status")).to_contain_text("Done", timeout=SLOW)


def main(urls: list[str]) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        pages = {url: browser.new_page(viewport={"width": 1280, "height": 900}) for url in urls}
        for url, page in pages.items():
            page.goto(url)
            page.locator("#steer-start").click(timeout=SLOW)
            wait_for_end(page)
        measured: dict[str, list[float]] = {url: [] for url in urls}
        for _ in range(RUNS):
            for url, page in pages.items():
                measured[url].append(first_picture(page))
                wait_for_end(page)
        browser.close()
    for url, seconds in measured.items():
        print(f"{url}: median {statistics.median(seconds):.2f} s, {min(seconds):.2f} to {max(seconds):.2f}")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
