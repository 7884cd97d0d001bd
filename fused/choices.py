"""What was measured on a machine, kept between processes: the fastest implementation of an op, by shape.

One SQLite database in the folder ``FASTNETS_CACHE_DIR`` (``~/.cache/fastnets`` if not set). A row says for
one device and one set of versions (fastnets, torch, triton), one op, dtype and bucketed shape which backend
was the fastest, how sure that is, and what each candidate took. Rows of other devices and versions stay where
they are and are not looked at.

The write-ahead log makes it safe for several processes at once, and leaves it whole when one is killed. A
file that is no database is put aside with a warning and begun anew; a folder that cannot be written to is
said once, and the choices then last as long as the process.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

SCHEMA = "fastnets-choices"
SCHEMA_VERSION = 1
NETWORK = "network"  # the "op" of rows that compare a whole network with stock
_WAIT_SECONDS = 10.0  # for another process that is writing
_KEY = ("device", "versions", "op", "dtype", "shape")
_COLUMNS = (*_KEY, "backend", "confidence", "seconds", "measured")
_TABLE = (
    "CREATE TABLE IF NOT EXISTS choices (device TEXT, versions TEXT, op TEXT, dtype TEXT, shape TEXT, "
    f"backend TEXT, confidence REAL, seconds TEXT, measured TEXT, PRIMARY KEY ({', '.join(_KEY)}))"
)

T = TypeVar("T")
_warned: set[str] = set()


class Choice(NamedTuple):
    """One row without the place it was measured at.

    op, dtype, shape: as ``dispatch.Decision`` has them. backend: the chosen one. confidence: in what share of
    bootstrap resamples it was the fastest. seconds: median time of each candidate.
    """

    op: str
    dtype: str
    shape: str
    backend: str
    confidence: float
    seconds: dict[str, float]


def cache_folder() -> Path:
    """Where the database lies: ``FASTNETS_CACHE_DIR``, else ``fastnets`` in the user's cache folder."""
    named = os.environ.get("FASTNETS_CACHE_DIR")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastnets"


@functools.cache
def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    return match.group(1) if match else platform.processor() or platform.machine()


def device_name(device: torch.device | str) -> str:
    """What times on this device depend on: its name, and the switches that change what runs there."""
    device = torch.device(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        tf32 = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
        return f"{properties.name}, sm_{properties.major}{properties.minor}, TF32 {tf32[0]:d}{tf32[1]:d}"
    if device.type == "cpu":
        return f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return str(device)


@functools.cache
def versions() -> str:
    """The versions that a choice was measured with."""
    import fastnets

    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return f"fastnets {fastnets.__version__}, torch {torch.__version__}, triton {triton}"


class Store:
    """The database in ``folder``. Nothing here raises for the state that the folder or the file is in."""

    def __init__(self, folder: Path | None = None):
        self.folder = cache_folder() if folder is None else folder
        self.path = self.folder / f"choices-{SCHEMA_VERSION}.sqlite3"

    def exists(self) -> bool:
        """Whether anything was ever written here."""
        try:
            return self.path.exists()
        except OSError:
            return False

    def read(self, device: str) -> list[Choice]:
        """The choices for a device, by :func:`device_name`, of the versions at hand."""
        where = "WHERE device = ? AND versions = ?"
        rows = self._guarded(lambda: self._select(where, (device, versions())), "read", [])
        return [Choice(*row[2:7], json.loads(row[7])) for row in rows]

    def write(self, device: str, choices: Iterable[Choice]) -> bool:
        """Add choices, or put them in the place of those of the same key. False where they are not kept."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        rows = [(device, versions(), *choice[:5], json.dumps(choice.seconds), now) for choice in choices]
        return self._guarded(lambda: self._insert(rows), "written", False)

    def export(self) -> dict[str, object]:
        """Every row, of all devices and versions, as JSON types."""
        rows = self._guarded(
            lambda: self._select("ORDER BY device, versions, op, dtype, shape", ()), "read", []
        )
        listed = [dict(zip(_COLUMNS, row)) for row in rows]
        for row in listed:
            row["seconds"] = json.loads(row["seconds"])
        return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "choices": listed}

    def take(self, content: object) -> int:
        """Add what :meth:`export` gave, here or on another machine; returns the number of rows.

        Raises ``ValueError`` where it is something else; nothing is then added.
        """
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"not a {SCHEMA} file; `fastnets tune --export FILE` writes one")
        if content.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"schema version {content.get('schema_version')!r}, this fastnets reads {SCHEMA_VERSION}; "
                "tune again with this version"
            )
        rows = []
        for row in content.get("choices", ()):
            if not isinstance(row, dict) or set(row) != set(_COLUMNS) or not isinstance(row["seconds"], dict):
                raise ValueError(f"a choice must have the fields {', '.join(_COLUMNS)}; got {row!r:.200}")
            rows.append(
                tuple(json.dumps(v) if c == "seconds" else v for c, v in ((c, row[c]) for c in _COLUMNS))
            )
        self._guarded(lambda: self._insert(rows), "written", False)
        return len(rows)

    # --- SQLite ---------------------------------------------------------------------------------------------

    def _select(self, clause: str, values: tuple) -> list[tuple]:
        if not self.exists():
            return []
        with self._opened_to_read() as connection:
            if not connection.execute("PRAGMA user_version").fetchone()[0]:
                return []  # somebody is about to make the table
            return connection.execute(
                f"SELECT {', '.join(_COLUMNS)} FROM choices {clause}", values
            ).fetchall()

    def _insert(self, rows: list[tuple]) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(self.path, timeout=_WAIT_SECONDS)) as connection, connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(_TABLE)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            marks = ", ".join("?" * len(_COLUMNS))
            connection.executemany(f"INSERT OR REPLACE INTO choices VALUES ({marks})", rows)
        return True

    @contextlib.contextmanager
    def _opened_to_read(self) -> Iterator[sqlite3.Connection]:
        """A connection for reading; the log cannot be opened in a read-only folder, and is then passed by."""
        address = self.path.absolute().as_uri()
        connection = sqlite3.connect(f"{address}?mode=ro", uri=True, timeout=_WAIT_SECONDS)
        try:
            connection.execute("PRAGMA user_version").fetchone()
        except sqlite3.OperationalError:
            connection.close()
            connection = sqlite3.connect(f"{address}?mode=ro&immutable=1", uri=True)
        with contextlib.closing(connection):
            yield connection

    def _guarded(self, work: Callable[[], T], done: str, otherwise: T) -> T:
        """``work()``; once more where the file had to be begun anew, and ``otherwise`` where it fails."""
        try:
            try:
                return work()
            except sqlite3.DatabaseError as error:
                if not _says_corrupt(error):
                    raise
                self._begin_anew(error)
                return work()
        except (OSError, sqlite3.Error) as error:
            self._warn_once(done, error)
            return otherwise

    def _warn_once(self, done: str, error: Exception) -> None:
        if str(self.folder) not in _warned:
            _warned.add(str(self.folder))
            warnings.warn(
                f"fastnets: measured choices cannot be {done} in {self.folder} ({error}); they last as long "
                "as this process. Set FASTNETS_CACHE_DIR to a folder that can be written to.",
                stacklevel=4,
            )

    def _begin_anew(self, error: Exception) -> None:
        """Put a file that is no database aside, unless another process has done so in the meantime."""
        with self._alone():
            try:
                with contextlib.closing(sqlite3.connect(self.path, timeout=_WAIT_SECONDS)) as connection:
                    intact = connection.execute("PRAGMA quick_check").fetchone() == ("ok",)
                    if intact and connection.execute("PRAGMA user_version").fetchone()[0]:
                        connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM choices LIMIT 1")
                if intact:
                    return
            except sqlite3.DatabaseError:
                pass
            aside = self.path.with_suffix(".corrupt")
            warnings.warn(f"fastnets: {self.path} is damaged ({error}); kept as {aside.name} and begun anew",
                          stacklevel=5)  # fmt: skip
            for ending in ("-wal", "-shm"):
                Path(f"{self.path}{ending}").unlink(missing_ok=True)
            os.replace(self.path, aside)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time, where the system has file locks."""
        try:
            import fcntl
        except ImportError:
            yield
            return
        with (self.folder / "choices.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _says_corrupt(error: sqlite3.DatabaseError) -> bool:
    """Whether the file is damaged or holds something else; being locked, full or read-only is neither."""
    if isinstance(error, sqlite3.OperationalError):
        return str(error).startswith(("no such table", "no such column", "table choices has"))
    return type(error) is sqlite3.DatabaseError
