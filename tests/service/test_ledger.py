"""The ledger: each request is recorded once, and is whole or absent, despite concurrent processes and kills."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest

from eupmu_jax.service import ledger

DATA = "d" * 64


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "requests.db"


def add(path, ids, data=DATA, reason="a letter"):
    with ledger.opened(path) as connection:
        return ledger.add(connection, data, np.array(ids), reason)


def listed(path):
    with ledger.opened(path) as connection:
        return ledger.listed(connection)


def test_a_request_is_stored_with_all_its_fields(path):
    request, is_new = add(path, [3, 1, 2])
    assert is_new
    assert request[:1] + request[1:3] + request[4:6] == (1, DATA, 3, "a letter", "open")
    assert request.made.endswith("+00:00")
    assert listed(path) == [request]
    with ledger.opened(path) as connection:
        assert ledger.ids_of(connection, 1).tolist() == [1, 2, 3]


def test_a_repeated_request_is_stored_once(path):
    first, _ = add(path, [3, 1, 2])
    again, is_new = add(path, [1, 2, 3], reason="another letter")
    assert not is_new
    assert again == first
    assert len(listed(path)) == 1


def test_positions_of_an_earlier_request_are_refused_and_nothing_is_added(path):
    add(path, [1, 2, 3])
    add(path, [7])
    with pytest.raises(
        ValueError, match=r"ids: got 2 of 3 that earlier requests have \(3, 7; the first is in request 1\)"
    ):
        add(path, [3, 7, 9])
    assert [request.examples for request in listed(path)] == [3, 1]
    assert add(path, [9])[0].number == 3


def test_positions_in_other_data_are_separate(path):
    add(path, [1, 2])
    assert add(path, [1, 2], data="e" * 64)[1]


def test_states_are_stored_and_invalid_ones_are_refused(path):
    add(path, [1])
    with ledger.opened(path) as connection:
        ledger.set_state(connection, 1, "unlearned")
        assert ledger.find(connection, 1).state == "unlearned"
        with pytest.raises(ValueError, match=r"state: got 'gone', expected one of open, unlearned, infeasible$"):
            ledger.set_state(connection, 1, "gone")
        with pytest.raises(ValueError, match="number: got 2, which the ledger does not have; expected a number from 1"):
            ledger.set_state(connection, 2, "open")


def test_a_file_that_is_not_a_ledger_is_named_and_left_unchanged(tmp_path):
    path = tmp_path / "requests.db"
    path.write_text("not a database, and longer than a page header would be" * 40)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"ledger: got .*requests.db, which is damaged or not a ledger"):
        add(path, [1])
    assert path.read_bytes() == before


def test_a_truncated_ledger_is_named(path):
    add(path, range(2_000))
    with ledger.opened(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    path.write_bytes(path.read_bytes()[: 3 * 4096 + 100])
    with pytest.raises(ValueError, match=r"ledger: got .*, which is damaged"):
        add(path, [5_000])


def test_a_ledger_of_a_newer_version_is_left_unchanged(path):
    add(path, [1])
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA user_version = 7")
    with pytest.raises(ValueError, match=r"is of version 7, .* expected a newer eupmu-jax"):
        add(path, [2])


def test_an_older_schema_is_migrated_with_its_requests(path, monkeypatch):
    add(path, [1, 2])
    monkeypatch.setattr(
        ledger, "MIGRATIONS", (*ledger.MIGRATIONS, "CREATE TABLE audit (request INTEGER REFERENCES request (number))")
    )
    assert add(path, [3])[0].number == 2
    with ledger.opened(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone()[0] == 2
        assert connection.execute("SELECT count(*) FROM audit").fetchone()[0] == 0


def test_a_ledger_that_cannot_be_opened_is_an_os_error(tmp_path):
    (tmp_path / "requests.db").mkdir()
    with pytest.raises(OSError, match=r"requests\.db"):
        add(tmp_path / "requests.db", [1])


def test_many_ids_and_many_requests_are_stored_completely(path):
    assert add(path, np.arange(5_000))[0].examples == 5_000
    with ledger.opened(path) as connection:
        for number in range(50):
            ledger.add(connection, DATA, np.array([10_000 + number]), "one")
        assert [request.examples for request in ledger.listed(connection)] == [5_000] + 50 * [1]


SCRIPT = """
import sys
import numpy as np
from eupmu_jax.service import ledger
from pathlib import Path

path, first, step, count = Path(sys.argv[1]), *map(int, sys.argv[2:])
for start in range(first, count, step):
    with ledger.opened(path) as connection:
        ledger.add(connection, "d" * 64, np.arange(100 * start, 100 * start + 100), "a letter")
    print(start, flush=True)
"""


def adding(path, first, step, count):
    command = [sys.executable, "-c", SCRIPT, *map(str, (path, first, step, count))]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def whole(path):
    """Returns the requests, after checking that each has all of its positions and that no two share a position."""
    with ledger.opened(path) as connection:
        found = ledger.listed(connection)
        positions = [ledger.ids_of(connection, request.number) for request in found]
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    assert all(len(ids) == 100 for ids in positions)
    assert len(set(np.concatenate(positions).tolist())) == 100 * len(found)
    return found


@pytest.mark.slow
def test_two_concurrent_processes_lose_and_duplicate_nothing(path):
    processes = [adding(path, first, 2, 60) for first in (0, 1)]
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert [request.number for request in whole(path)] == list(range(1, 61))


@pytest.mark.slow
def test_after_a_kill_at_any_moment_every_request_is_whole_or_absent(path):
    rng = np.random.default_rng(0)
    for _ in range(4):
        process = adding(path, 0, 1, 4_000)
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        said, _ = process.communicate()
        found = whole(path)
        # Every request that was reported as added is in the ledger.
        assert len(found) >= max([int(line) + 1 for line in said.split()], default=0)


@pytest.mark.parametrize("version", [0, 1, 7])
def test_a_database_of_another_program_is_left_unchanged(version, tmp_path):
    path = tmp_path / "app.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE users (name TEXT)")
        connection.execute(f"PRAGMA user_version = {version}")
        connection.commit()
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"ledger: got .*app.db, a database that is not a ledger"), ledger.opened(path):
        pass
    assert path.read_bytes() == before


def test_an_empty_file_cannot_be_read_as_a_ledger(tmp_path):
    path = tmp_path / "empty.db"
    path.touch()
    with pytest.raises(ValueError, match=r"^ledger: got .*empty.db, an empty file; expected a ledger"):
        ledger.known(path)
    assert not path.read_bytes()


def test_adding_to_a_ledger_of_the_next_version_is_refused(path):
    add(path, [1])
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {len(ledger.MIGRATIONS) + 1}")
    with pytest.raises(ValueError, match="expected a newer eupmu-jax"):
        add(path, [2])


def test_a_database_with_the_tables_of_a_ledger_but_no_version_is_left_unchanged(tmp_path):
    path = tmp_path / "app.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE request (a TEXT)")
        connection.execute("CREATE TABLE requested (a TEXT)")
        connection.commit()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="a database that is not a ledger"), ledger.opened(path):
        pass
    assert path.read_bytes() == before


def test_only_positions_of_earlier_requests_are_counted(path):
    add(path, [3])
    told = r"ids: got 1 of 2 that earlier requests have \(3; the first is in request 1\)"
    with pytest.raises(ValueError, match=told):
        add(path, [1, 3])


def test_only_requests_unlearned_on_other_data_are_listed_as_unlearned_elsewhere(path):
    for ids, data in (([1], DATA), ([2], DATA), ([1], "e" * 64)):
        add(path, ids, data=data)
    with ledger.opened(path) as connection:
        ledger.set_state(connection, 3, "infeasible")
        assert ledger.unlearned_elsewhere(connection, DATA) == []
        ledger.set_state(connection, 3, "unlearned")
        assert ledger.unlearned_elsewhere(connection, DATA) == [3]
        for number in (1, 2):
            ledger.set_state(connection, number, "unlearned")
        assert ledger.unlearned(connection, DATA) == [1, 2]
        assert ledger.unlearned(connection, DATA, but=2) == [1]
        assert ledger.overlaps(connection, DATA, np.array([1, 2, 3]), but=2) == {1: 1}


def test_a_number_too_large_for_sqlite_is_not_found(path):
    with ledger.opened(path) as connection, pytest.raises(ValueError, match=f"^number: got {2**63}, which the ledger"):
        ledger.find(connection, 2**63)
