"""A durable ledger of deletion requests, in a SQLite file that several processes may use at once.

A request is a set of positions in one data set, with a reason, the time it was made and a state. Nothing is ever
deleted from a ledger. If a process is killed at any moment, its request is complete or absent.
"""

import collections
import contextlib
import datetime
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eupmu_jax.service.ids import NAMED, digest_of_ids

STATES = ("open", "unlearned", "infeasible")
# Migrations from each schema version to the next; the version is the number of migrations made. The columns of a key
# come first, or the integrity check of SQLite 3.40 reports false errors. The state "failed", which the first migration
# allows, is never used.
MIGRATIONS = (
    """
    CREATE TABLE request (
      number INTEGER PRIMARY KEY,
      data TEXT NOT NULL,
      digest TEXT NOT NULL,
      reason TEXT NOT NULL,
      state TEXT NOT NULL CHECK (state IN ('open', 'unlearned', 'infeasible', 'failed')),
      made TEXT NOT NULL,
      UNIQUE (data, digest)
    ) STRICT;
    CREATE TABLE requested (
      data TEXT NOT NULL,
      id INTEGER NOT NULL CHECK (id >= 0),
      request INTEGER NOT NULL REFERENCES request (number),
      PRIMARY KEY (data, id)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX of_request ON requested (request);
    """,
)
# How long a process waits for another one's lock.
BUSY_SECONDS = 60


class Request(NamedTuple):
    """A row of the ledger.

    Attributes:
      number: Number of the request, from 1.
      data: SHA-256 of the data set, `user_file.data_digest`.
      examples: Number of examples to be deleted.
      digest: SHA-256 of their positions.
      reason: The reason, in the user's words.
      state: One of `STATES`.
      made: Time of the request in UTC, by the clock of that machine; the order of requests is that of their numbers.
    """

    number: int
    data: str
    examples: int
    digest: str
    reason: str
    state: str
    made: str


@contextlib.contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Yields a connection to the ledger, which is created or migrated to the current schema if needed.

    Raises:
      ValueError: For a file that is not a ledger, or is one of a newer version.
      OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
            connection.execute("PRAGMA foreign_keys = ON")
            _check_own(connection, path)
            connection.execute("PRAGMA journal_mode = WAL")
            _migrate(connection, path)
            yield connection
    except sqlite3.OperationalError as error:
        raise OSError(0, f"the ledger cannot be used ({error})", str(path)) from error
    except sqlite3.DatabaseError as error:
        raise ValueError(
            f"ledger: got {path}, which is damaged or not a ledger ({error}); expected another file"
        ) from error


def known(path: Path) -> contextlib.AbstractContextManager[sqlite3.Connection]:
    """As `opened`, for an existing ledger; raises `FileNotFoundError` if there is none, `ValueError` if it is empty."""
    if not path.is_file():
        raise FileNotFoundError(f"ledger: {path} is not there; `eupmu request add` creates it")
    if not path.stat().st_size:
        raise ValueError(f"ledger: got {path}, an empty file; expected a ledger, as `eupmu request add` creates it")
    return opened(path)


def _check_own(connection, path):
    """Raises `ValueError` for another program's database, before anything is written to it."""
    # Both are read in one transaction, as another process creates them together.
    connection.execute("BEGIN")
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    connection.execute("COMMIT")
    if (tables or version) and not (version and {"request", "requested"} <= tables):
        raise ValueError(f"ledger: got {path}, a database that is not a ledger; expected another file")


def _migrate(connection, path):
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise ValueError(
            f"ledger: {path} is of version {version}, and this eupmu-jax knows versions up to {len(MIGRATIONS)}; "
            "expected a newer eupmu-jax"
        )
    while version < len(MIGRATIONS):
        with transaction(connection):
            # Read again, as another process may have been first.
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version < len(MIGRATIONS):
                for statement in filter(str.strip, MIGRATIONS[version].split(";")):
                    connection.execute(statement)
                version += 1
                connection.execute(f"PRAGMA user_version = {version}")


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """A transaction: everything written within it is kept, or nothing; a nested one becomes part of the outer one."""
    if connection.in_transaction:
        yield
        return
    # Immediate, so that nothing read before the first write can change in between.
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def add(connection: sqlite3.Connection, data: str, ids: np.ndarray, reason: str) -> tuple[Request, bool]:
    """Adds a request, or finds an identical one.

    Args:
      connection: Connection to the ledger.
      data: Digest of the data set.
      ids: `(n,)` positions in it, as `read_ids` returns them.
      reason: The reason, in the user's words.

    Returns:
      The request, and whether it is new. The same positions of the same data are a single request.

    Raises:
      ValueError: If an earlier request has some of the positions, or the reason is not text that UTF-8 can hold;
        nothing is added then.
    """
    # What Python makes of bytes on the command line that are not UTF-8.
    if any("\ud800" <= character <= "\udfff" for character in reason):
        raise ValueError(f"reason: got {reason!r}, expected text in UTF-8")
    digest = digest_of_ids(ids)
    with transaction(connection):
        earlier = connection.execute(
            "SELECT number FROM request WHERE data = ? AND digest = ?", (data, digest)
        ).fetchone()
        if earlier:
            return find(connection, earlier[0]), False
        made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = (data, digest, reason, "open", made)
        statement = "INSERT INTO request (data, digest, reason, state, made) VALUES (?, ?, ?, ?, ?)"
        number = connection.execute(statement, row).lastrowid
        assert number is not None
        rows = ((number, data, int(position)) for position in ids)
        try:
            connection.executemany("INSERT INTO requested (request, data, id) VALUES (?, ?, ?)", rows)
        except sqlite3.IntegrityError:
            raise ValueError(_overlap(connection, data, ids, number)) from None
        return find(connection, number), True


def overlaps(connection: sqlite3.Connection, data: str, ids: np.ndarray, but: int = 0) -> dict[int, int]:
    """How many of these positions each request on the same data shares, except request `but`; zeros are omitted."""
    found = collections.Counter(request for _, request in _requested(connection, data, ids) if request != but)
    return dict(sorted(found.items()))


def _requested(connection, data, ids):
    wanted = set(ids.tolist())
    rows = connection.execute("SELECT id, request FROM requested WHERE data = ?", (data,))
    return [(position, request) for position, request in rows if position in wanted]


def _overlap(connection, data, ids, number):
    found = sorted((request, position) for position, request in _requested(connection, data, ids) if request < number)
    some = ", ".join(str(position) for _, position in found[:NAMED]) + (", ..." if len(found) > NAMED else "")
    return (
        f"ids: got {len(found)} of {len(ids)} that earlier requests have ({some}; the first is in request "
        f"{found[0][0]}), expected positions that no request has"
    )


_COLUMNS = """
  SELECT number, data, (SELECT count(*) FROM requested WHERE request = number), digest, reason, state, made FROM request
"""


def unlearned(connection: sqlite3.Connection, data: str, but: int = 0) -> list[int]:
    """Numbers of the unlearned requests on the same data, except request `but`."""
    statement = "SELECT number FROM request WHERE data = ? AND state = 'unlearned' AND number != ? ORDER BY number"
    return [row[0] for row in connection.execute(statement, (data, but))]


def unlearned_elsewhere(connection: sqlite3.Connection, data: str) -> list[int]:
    """Numbers of the unlearned requests on other data."""
    statement = "SELECT number FROM request WHERE data != ? AND state = 'unlearned' ORDER BY number"
    return [row[0] for row in connection.execute(statement, (data,))]


def listed(connection: sqlite3.Connection) -> list[Request]:
    """All requests in the order of their numbers."""
    return [Request(*row) for row in connection.execute(f"{_COLUMNS} ORDER BY number")]


def find(connection: sqlite3.Connection, number: int, argument: str = "number") -> Request:
    """The request with that number; raises `ValueError`, which begins with the argument's name, if there is none."""
    # SQLite has no larger integers.
    is_one = abs(number) < 2**63
    row = connection.execute(f"{_COLUMNS} WHERE number = ?", (number,)).fetchone() if is_one else None
    if row is None:
        count = connection.execute("SELECT count(*) FROM request").fetchone()[0]
        known = f"a number from 1 to {count}" if count else "a ledger that has requests"
        raise ValueError(f"{argument}: got {number}, which the ledger does not have; expected {known}")
    return Request(*row)


def ids_of(connection: sqlite3.Connection, number: int) -> np.ndarray:
    """The positions of a request, in increasing order."""
    rows = connection.execute("SELECT id FROM requested WHERE request = ? ORDER BY id", (number,)).fetchall()
    return np.array([row[0] for row in rows], np.int64)


def set_state(connection: sqlite3.Connection, number: int, state: str) -> None:
    """Sets the state of a request; raises `ValueError` if it does not exist or the state is not one of `STATES`."""
    if state not in STATES:
        raise ValueError(f"state: got {state!r}, expected one of {', '.join(STATES)}")
    with transaction(connection):
        find(connection, number)
        connection.execute("UPDATE request SET state = ? WHERE number = ?", (state, number))
