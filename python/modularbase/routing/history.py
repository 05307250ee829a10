"""Which packs each user used, in one SQLite file that several processes may share.

Tables: `uses` has a row for each pack of each turn (a request that used packs), `pending` the
predictions acted upon whose verdict is open, `users` the totals. Bounded: old turns go, and users
who have not come back for longest.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from modularbase.errors import HistoryError

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_SCHEMA_VERSION = 1
_SCHEMA = (
    "CREATE TABLE users (user TEXT PRIMARY KEY, last_turn INTEGER NOT NULL,"
    " issued INTEGER NOT NULL DEFAULT 0, hits INTEGER NOT NULL DEFAULT 0,"
    " wasted INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID",
    "CREATE TABLE uses (user TEXT NOT NULL, turn INTEGER NOT NULL, pack TEXT NOT NULL,"
    " at REAL NOT NULL, PRIMARY KEY (user, turn, pack)) WITHOUT ROWID",
    "CREATE TABLE pending (user TEXT NOT NULL, pack TEXT NOT NULL, PRIMARY KEY (user, pack))"
    " WITHOUT ROWID",
    f"PRAGMA user_version = {_SCHEMA_VERSION}",
)
_BUSY_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Turn:
    """Packs that one request used together."""

    packs: tuple[str, ...]
    at: float


@dataclass(frozen=True, slots=True)
class PredictorStats:
    """Predictions acted upon: how many, and what became of them."""

    issued: int = 0
    hits: int = 0
    wasted: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits among those with a verdict; 0 before the first."""
        return self._rate(self.hits)

    @property
    def waste_rate(self) -> float:
        """Wastes among those with a verdict; 0 before the first."""
        return self._rate(self.wasted)

    def _rate(self, part: int) -> float:
        judged = self.hits + self.wasted
        return part / judged if judged else 0.0


class PackHistory:
    """The file. Safe to use from several threads and processes; every write is one transaction.

    A corrupt file is set aside as `NAME.corrupt` (one is kept) with a warning, and a new one begun.
    """

    def __init__(self, path: Path, *, max_uses_per_user: int, max_users: int) -> None:
        self._path = path
        self._max_uses_per_user = max_uses_per_user
        self._max_users = max_users
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._run(lambda _: None)

    def close(self) -> None:
        """Closes the file; a later call opens it again."""
        with self._lock:
            self._disconnect()

    def add(self, user: str, packs: Sequence[str], at: float) -> None:
        """Adds a turn, and judges the user's pending predictions by it."""

        def work(db: sqlite3.Connection) -> None:
            (last,) = db.execute("SELECT coalesce(max(last_turn), 0) FROM users").fetchone()
            rows = [(user, last + 1, pack, at) for pack in packs]
            db.executemany("INSERT OR IGNORE INTO uses VALUES (?, ?, ?, ?)", rows)
            _touch(db, user, last + 1)
            _judge(db, user, set(packs))
            self._prune(db, user)

        self._transact(work)

    def add_pending(self, user: str, packs: Sequence[str]) -> None:
        """Notes predictions acted upon; one already pending counts once."""

        def work(db: sqlite3.Connection) -> None:
            (last,) = db.execute("SELECT coalesce(max(last_turn), 0) FROM users").fetchone()
            _touch(db, user, last)
            rows = [(user, pack) for pack in packs]
            added = db.executemany("INSERT OR IGNORE INTO pending VALUES (?, ?)", rows).rowcount
            db.execute("UPDATE users SET issued = issued + ? WHERE user = ?", (added, user))
            self._prune(db, user)

        self._transact(work)

    def turns(self, user: str) -> list[Turn]:
        """The user's turns in the order they were added."""

        def work(db: sqlite3.Connection) -> list[Turn]:
            query = "SELECT turn, pack, at FROM uses WHERE user = ? ORDER BY turn, pack"
            rows = db.execute(query, (user,)).fetchall()
            groups = (list(group) for _, group in groupby(rows, key=lambda row: row[0]))
            return [Turn(tuple(row[1] for row in group), group[0][2]) for group in groups]

        return self._run(work)

    def stats(self) -> PredictorStats:
        """Totals over all users that are remembered."""
        query = "SELECT total(issued), total(hits), total(wasted) FROM users"
        issued, hits, wasted = self._run(lambda db: db.execute(query).fetchone())
        return PredictorStats(int(issued), int(hits), int(wasted))

    def forget(self, user: str) -> None:
        """Removes all that is known of a user, from the write-ahead log too."""
        self._transact(lambda db: _remove(db, user))
        self._run(lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())

    def _prune(self, db: sqlite3.Connection, user: str) -> None:
        db.execute(
            "DELETE FROM uses WHERE user = ?1 AND turn <= (SELECT turn FROM uses WHERE user = ?1"
            " ORDER BY turn DESC LIMIT 1 OFFSET ?2)",
            (user, self._max_uses_per_user),
        )
        surplus = "SELECT user FROM users ORDER BY last_turn DESC, user LIMIT -1 OFFSET ?"
        for (stranger,) in db.execute(surplus, (self._max_users,)).fetchall():
            _remove(db, stranger)

    def _transact(self, work: Callable[[sqlite3.Connection], None]) -> None:
        def transaction(db: sqlite3.Connection) -> None:
            db.execute("BEGIN IMMEDIATE")
            try:
                work(db)
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

        self._run(transaction)

    def _run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        with self._lock, self._named_errors():
            try:
                return work(self._connected())
            except sqlite3.DatabaseError as error:
                if not _says_corrupt(error):
                    raise
                self._disconnect()
                self._set_aside(error)
                return work(self._connected())

    def _connected(self) -> sqlite3.Connection:
        if self._db is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._one_process():
                # Private from the start: what somebody uses is nobody else's business.
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
                db = _connect(self._path)
                try:
                    self._set_up(db)
                except BaseException:
                    db.close()
                    raise
            self._db = db
        return self._db

    def _set_up(self, db: sqlite3.Connection) -> None:
        db.execute("PRAGMA journal_mode = WAL")
        # In WAL mode NORMAL loses the last turns in a power failure, never the file.
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA secure_delete = ON")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > _SCHEMA_VERSION:
            expected = f"at most {_SCHEMA_VERSION}"
            raise HistoryError(str(self._path), "user_version", expected, str(version))
        if version == 0:
            db.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA:
                db.execute(statement)
            db.execute("COMMIT")

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        with self._one_process():
            if _is_sound(self._path):  # another process was faster
                return
            aside = self._beside(".corrupt")
            _log.warning("%s: %s; set aside as %s, beginning anew", self._path, error, aside.name)
            for suffix in ("-wal", "-shm"):
                self._beside(suffix).unlink(missing_ok=True)
            self._path.replace(aside)

    def _beside(self, suffix: str) -> Path:
        return self._path.with_name(self._path.name + suffix)

    @contextmanager
    def _one_process(self) -> Iterator[None]:
        """Held while the file is created or replaced, which SQLite's own locks do not cover."""
        with self._beside(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise HistoryError(
                str(self._path), "file", "a history that can be read and written", str(error)
            ) from error


def _connect(path: Path) -> sqlite3.Connection:
    # The lock of PackHistory keeps threads apart; transactions are begun by hand.
    return sqlite3.connect(
        path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )


def _says_corrupt(error: sqlite3.DatabaseError) -> bool:
    # The module raises the bare class for SQLITE_CORRUPT and SQLITE_NOTADB; a full disk, a lock
    # and a missing permission are its subclass OperationalError.
    return type(error) is sqlite3.DatabaseError


def _is_sound(path: Path) -> bool:
    with closing(_connect(path)) as db:
        try:
            (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            if _says_corrupt(error):
                return False
            raise
    return bool(verdict == "ok")


def _touch(db: sqlite3.Connection, user: str, turn: int) -> None:
    db.execute(
        "INSERT INTO users (user, last_turn) VALUES (?, ?)"
        " ON CONFLICT (user) DO UPDATE SET last_turn = max(last_turn, excluded.last_turn)",
        (user, turn),
    )


def _judge(db: sqlite3.Connection, user: str, used: set[str]) -> None:
    pending = {p for (p,) in db.execute("SELECT pack FROM pending WHERE user = ?", (user,))}
    db.execute("DELETE FROM pending WHERE user = ?", (user,))
    db.execute(
        "UPDATE users SET hits = hits + ?, wasted = wasted + ? WHERE user = ?",
        (len(pending & used), len(pending - used), user),
    )


def _remove(db: sqlite3.Connection, user: str) -> None:
    for table in ("uses", "pending", "users"):
        db.execute(f"DELETE FROM {table} WHERE user = ?", (user,))
