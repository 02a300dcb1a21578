"""The history of finished runs in one SQLite file: each visitor can only read their own runs.

A run and its images are written in one transaction: after a crash the run is complete or absent.
"""

import hashlib
import json
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image

from steer.apps.demo.pictures import as_jpeg
from steer.apps.recipes import checked_settings
from steer.apps.sampling import SavedImage
from steer.apps.settings import SamplingConfig
from steer.errors import InputError
from steer.files import user_cache, write_errors

FILE = "history.sqlite"
VERSION = 1
TIMEOUT = 10.0  # seconds to wait for another process that writes
THUMBNAIL = 256  # pixels of the longer side
STOPPED, TEXTS = "stopped", "texts"  # entries besides the settings: the step of a stop, and the texts of a run
TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")  # 32 random bytes in base64
SCHEMA = f"""
PRAGMA auto_vacuum = FULL;
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS runs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT NOT NULL, time REAL NOT NULL, prompt TEXT NOT NULL,
    settings TEXT NOT NULL, rewards TEXT NOT NULL, base_reward REAL, seconds REAL NOT NULL, thumbnail BLOB NOT NULL,
    size INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS runs_of_owner ON runs (owner, number);
CREATE TABLE IF NOT EXISTS images (
    run INTEGER NOT NULL REFERENCES runs ON DELETE CASCADE, rank INTEGER NOT NULL, png BLOB NOT NULL,
    PRIMARY KEY (run, rank)
);
PRAGMA user_version = {VERSION};
COMMIT;
"""
COLUMNS = "number, time, prompt, settings, rewards, base_reward, seconds, thumbnail"
# Delete the oldest runs until number and bytes of the others are within limits.
EVICT = """
DELETE FROM runs WHERE {owned} AND number NOT IN (
    SELECT number FROM (
        SELECT number, row_number() OVER newest AS place, sum(size) OVER newest AS total
        FROM runs WHERE {owned} WINDOW newest AS (ORDER BY number DESC)
    ) WHERE place <= :runs AND total <= :bytes
)
"""


@dataclass(frozen=True)
class Limits:
    """Bounds of a history; beyond them the oldest runs are deleted.

    runs, bytes  limits for each visitor
    total_runs, total_bytes  limits for all visitors together
    seconds      maximum age of a run; None: no limit
    """

    runs: int = 100
    bytes: int = 256 * 2**20
    total_runs: int = 2000
    total_bytes: int = 2**30
    seconds: float | None = None


SHARED_LIMITS = Limits(bytes=64 * 2**20, seconds=24 * 3600)


@dataclass(frozen=True)
class Run:
    """A finished or stopped prompt of the history, without its images.

    time         time of its end, in seconds since 1970
    settings     settings by name, as `SamplingConfig.plain` returns them, with STOPPED or TEXTS
    rewards      rewards of the images, in their order
    base_reward  the highest reward of the base images; None without base images
    seconds      duration of steering
    thumbnail    JPEG of the image with the highest reward
    """

    number: int
    time: float
    prompt: str
    settings: Mapping[str, Any]
    rewards: tuple[float, ...]
    base_reward: float | None
    seconds: float
    thumbnail: bytes

    @property
    def best(self) -> int:
        """The index of the image with the highest reward."""
        return self.rewards.index(max(self.rewards))

    @property
    def config(self) -> SamplingConfig:
        """Return the settings. Raises InputError for settings of a newer steer."""
        return checked_settings({name: one for name, one in self.settings.items() if name not in (STOPPED, TEXTS)})


class History:
    """The runs of all visitors in a file, which is created if it is missing.

    shared  whether each visitor has their own runs, by a secret that the browser keeps; else all runs are one user's

    A file that is not a history of this version is renamed to FILE.old. Every method raises InputError if the file
    cannot be read or written.
    """

    def __init__(self, path: Path, *, shared: bool = True, limits: Limits | None = None) -> None:
        self.path, self.shared = path.absolute(), shared
        self.limits = limits or (SHARED_LIMITS if shared else Limits())
        self._owners: dict[str, str] = {}
        with write_errors(f"history: {path}", "make room, or make the folder writable"):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._create():
                os.replace(path, path.with_name(f"{path.name}.old"))
                self._create()

    def _create(self) -> bool:
        """Create missing tables; return whether the file is a history of this version."""
        self.path.touch(mode=0o600, exist_ok=True)
        with closing(sqlite3.connect(self.path, timeout=TIMEOUT)) as connection:
            try:
                if (version := connection.execute("PRAGMA user_version").fetchone()[0]) == 0:
                    connection.executescript(SCHEMA)
            except sqlite3.OperationalError as error:
                raise InputError(f"history: cannot write {self.path} ({error})") from error
            except sqlite3.DatabaseError:  # not SQLite
                return False
        return version in (0, VERSION)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """Open the file for one transaction; a removed file is not created again."""
        try:
            address = f"{self.path.as_uri()}?mode=rw"
            with closing(sqlite3.connect(address, TIMEOUT, uri=True)) as connection, connection:
                connection.execute("PRAGMA foreign_keys = ON")
                connection.execute("PRAGMA secure_delete = ON")
                yield connection
        except sqlite3.Error as error:
            raise InputError(f"history: {error}; free some space, or delete {FILE} and start the app again") from error

    def enter(self, session: str, token: str | None, user: str | None = None) -> None:
        """Connect a page's session with its visitor by the browser's secret; without a secret, until the page ends."""
        known = token if token and TOKEN.fullmatch(token) else secrets.token_urlsafe(32)
        self._owners[session] = hashlib.sha256(f"{user or ''}\n{known}".encode()).hexdigest()

    def leave(self, session: str) -> None:
        """Forget the session of a closed page; the visitor's runs stay."""
        self._owners.pop(session, None)

    def owner(self, session: str) -> str:
        """Return the owner of a session's runs. Raises InputError for a session that has not entered."""
        if not self.shared:
            return "local"
        if session not in self._owners:
            raise InputError("history: this page is not connected, reload it")
        return self._owners[session]

    def record(
        self, session: str, images: Sequence[SavedImage], base: Sequence[SavedImage] = (), seconds: float = 0.0
    ) -> int:
        """Write a finished prompt, and delete the oldest runs beyond the limits; return the run's number.

        images  images with their files; beyond the limit of bytes, only the first ones are written
        base    base images, of which only the highest reward is written
        """
        recipe, rewards = images[0].recipe, [one.recipe.reward for one in images]
        try:
            pngs = [one.path.read_bytes() for one in images]
        except OSError as error:  # the visitor's next run has removed them
            raise InputError("history: the images of this run are gone, it is not in the history") from error
        best = max((one.recipe.reward for one in base), default=None)
        return self.keep(session, recipe.prompt, recipe.settings.plain(), pngs, rewards, best, seconds)

    def keep(
        self,
        session: str,
        prompt: str,
        settings: Mapping[str, Any],
        pngs: Sequence[bytes],
        rewards: Sequence[float],
        base_reward: float | None = None,
        seconds: float = 0.0,
    ) -> int:
        """Write images without recipes: previews of a stopped run, or texts as pictures. Otherwise like `record`."""
        owner = self.owner(session)
        with Image.open(BytesIO(pngs[rewards.index(max(rewards))])) as image:
            thumbnail = as_jpeg(image, THUMBNAIL)
        sizes = accumulate(map(len, pngs), initial=len(thumbnail) + len(prompt))
        fitting = [size for size in sizes if size <= self.limits.bytes]
        if len(fitting) < 2:
            raise InputError(f"history: an image of {len(pngs[0])} bytes, at most {self.limits.bytes} fit")
        kept = len(fitting) - 1
        row = (time.time(), prompt, json.dumps(settings), json.dumps(rewards[:kept]), base_reward, seconds, thumbnail)
        with self._opened() as connection:
            command = "INSERT INTO runs VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            number = connection.execute(command, (owner, *row, fitting[-1])).lastrowid
            rows = [(number, rank, png) for rank, png in enumerate(pngs[:kept])]
            connection.executemany("INSERT INTO images VALUES (?, ?, ?)", rows)
            self._evict(connection, owner)
        assert number is not None
        return number

    def _evict(self, connection: sqlite3.Connection, owner: str) -> None:
        limits = self.limits
        if limits.seconds is not None:
            connection.execute("DELETE FROM runs WHERE time < ?", (time.time() - limits.seconds,))
        for owned, runs, size in (
            ("owner = :owner", limits.runs, limits.bytes),
            ("TRUE", limits.total_runs, limits.total_bytes),
        ):
            connection.execute(EVICT.format(owned=owned), {"owner": owner, "runs": runs, "bytes": size})

    def runs(self, session: str) -> list[Run]:
        """Read the visitor's runs, the newest first."""
        owner = self.owner(session)
        with self._opened() as connection:
            self._evict(connection, owner)
            command = f"SELECT {COLUMNS} FROM runs WHERE owner = ? ORDER BY number DESC"
            return [_run(row) for row in connection.execute(command, (owner,))]

    def run(self, session: str, number: int | None) -> Run:
        """Read one of the visitor's runs. Raises InputError for another number."""
        command = f"SELECT {COLUMNS} FROM runs WHERE owner = ? AND number = ?"
        with self._opened() as connection:
            row = connection.execute(command, (self.owner(session), number)).fetchone()
        if row is None:
            raise InputError("history: this run is not there any more, choose another one")
        return _run(row)

    def image_run(self, session: str, number: int | None) -> Run:
        """Read one of the visitor's runs. Raises InputError for another number, and for a run of texts."""
        run = self.run(session, number)
        if TEXTS in run.settings:
            raise InputError("history: this run made texts, and this is for images: restore it into the Text tab")
        return run

    def images(self, session: str, number: int | None) -> list[bytes]:
        """Read the PNGs of one of the visitor's runs. Raises InputError for another number."""
        run = self.run(session, number)
        with self._opened() as connection:
            return [
                row[0]
                for row in connection.execute("SELECT png FROM images WHERE run = ? ORDER BY rank", (run.number,))
            ]

    def delete(self, session: str, number: int | None = None) -> None:
        """Delete one of the visitor's runs, or all; their bytes in the file are overwritten."""
        command = "DELETE FROM runs WHERE owner = ?1 AND (?2 IS NULL OR number = ?2)"
        with self._opened() as connection:
            connection.execute(command, (self.owner(session), number))


def default_path() -> Path:
    """Return the file of this user's history."""
    return user_cache("demo") / FILE


def _run(row: Sequence[Any]) -> Run:
    number, when, prompt, settings, rewards, base, seconds, thumbnail = row
    return Run(number, when, prompt, json.loads(settings), tuple(json.loads(rewards)), base, seconds, thumbnail)
