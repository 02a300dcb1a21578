"""The app among many, and among those who mean harm: over HTTP, without a browser."""

import http.client
import json
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")

import httpx
from gradio_client import Client
from gradio_client.exceptions import AppError

from steer.apps.demo.app import serve
from steer.apps.demo.studio import MAX_WAITING_JOBS, Studio

QUICK = {"steps": 1, "particles": 1, "reward": "brightness"}


@pytest.fixture(scope="module")
def url(studio: Studio) -> Iterator[str]:
    before = os.environ.get("GRADIO_TEMP_DIR")
    app = serve(studio, server_name="127.0.0.1", prevent_thread_lock=True)
    yield str(app.local_url)
    app.close()
    os.environ.pop("GRADIO_TEMP_DIR") if before is None else os.environ.update(GRADIO_TEMP_DIR=before)


def client(url: str, folder: Path) -> Client:
    return Client(url, verbose=False, download_files=folder)


@pytest.mark.hard
def test_of_fifty_at_once_each_has_an_image_or_a_polite_refusal(studio: Studio, url: str, tmp_path: Path) -> None:
    client(url, tmp_path).predict("a star", **QUICK, api_name="/steer")  # the model is there

    def ask(number: int) -> str:
        try:
            images, report = client(url, tmp_path / str(number)).predict(f"a star {number}", **QUICK, api_name="/steer")
        except AppError as error:
            return str(error)
        assert len(images) == 1
        return str(report["prompt"])

    with ThreadPoolExecutor(50) as pool:
        replies = list(pool.map(ask, range(50)))
    served = [number for number, text in enumerate(replies) if text == f"a star {number}"]
    refused = [text for text in replies if "others are waiting for their turn: please try again" in text]
    assert len(served) > MAX_WAITING_JOBS and len(served) + len(refused) == 50, replies
    assert studio.worker.pending == 0


@pytest.mark.browser  # which runs less often: it takes a minute
def test_a_thousand_events_of_people_who_never_listen_leave_room_for_one_who_does(
    studio: Studio, url: str, tmp_path: Path
) -> None:
    endpoints = httpx.get(f"{url}config").json()["dependencies"]
    number = next(one["id"] for one in endpoints if one["api_name"] == "steer")
    data = ["a star", "base", "brightness", 1, 1, 0, 0, 1, 0, "scenes"]
    answers = set()
    with httpx.Client(timeout=60) as flood:
        for session in range(1000):
            request = {"data": data, "fn_index": number, "session_hash": f"flood{session}"}
            answers.add(flood.post(f"{url}gradio_api/queue/join", json=request).status_code)
            assert studio.worker.pending <= MAX_WAITING_JOBS + 1
    assert answers <= {200, 503}, "taken, or refused for too many"
    deadline = time.monotonic() + 120
    while studio.worker.pending:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    images, _ = client(url, tmp_path).predict("a star", **QUICK, api_name="/steer")
    assert len(images) == 1


def got(url: str, path: str) -> tuple[int, bytes]:
    """Status and body for a path that is sent as it is: HTTP clients would normalise it."""
    host, port = re.search(r"//([^:/]+):(\d+)", url).groups()  # type: ignore[union-attr]
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=%2Fetc%2Fpasswd",
        "/gradio_api/file=..%2f..%2f..%2fetc%2fpasswd",
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/file=steer/__init__.py",
        "/static/../../../etc/passwd",
    ],
)
def test_no_file_of_the_machine_is_served(url: str, path: str) -> None:
    status, body = got(url, path)
    assert status in (400, 403, 404) and b"root:" not in body


def test_neither_links_nor_what_the_app_did_not_make_are_served(studio: Studio, url: str, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("a secret")
    places = [studio.home / "served" / "link.txt", studio.home / "visitors" / "link.txt", studio.home / "plain.txt"]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        if "link" in place.name:
            place.symlink_to(tmp_path / "secret.txt")
        else:
            place.write_text("a secret")
        status, body = got(url, f"/gradio_api/file={place}")
        assert status in (403, 404) and b"secret" not in body, place


def test_a_session_that_no_browser_would_name_is_refused(url: str) -> None:
    endpoints = httpx.get(f"{url}config").json()["dependencies"]
    number = next(one["id"] for one in endpoints if one["api_name"] == "steer")
    data = ["a star", "base", "brightness", 1, 1, 0, 0, 1, 0, "scenes"]
    request: dict[str, Any] = {"data": data, "fn_index": number, "session_hash": "../../escape"}
    httpx.post(f"{url}gradio_api/queue/join", json=request)
    with httpx.stream("GET", f"{url}gradio_api/queue/data", params={"session_hash": "../../escape"}, timeout=60) as got:
        for line in got.iter_lines():
            event = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if event.get("msg") == "process_completed":
                break
    assert not event["success"] and "this request has no session" in json.dumps(event["output"])
