"""Rows survive kills and concurrent writers and share their provenance, and a bad line is named."""

import errno
import json
import multiprocessing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eupmu_jax.benchmark import rows

ORIGIN = {"versions": {"jax": "0.10.2"}, "device": "cpu", "cores": 2, "command": "eupmu demo"}


def test_a_line_that_a_kill_truncated_is_ignored_and_overwritten(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    assert rows.read(path) == []
    rows.append(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2, "b')
    assert rows.read(path) == [{"a": 1}]
    rows.append(path, {"a": 3})
    assert rows.read(path) == [{"a": 1}, {"a": 3}]
    assert path.read_text().count("\n") == 2


@pytest.mark.parametrize("kept", range(1, 300, 7))
def test_a_kill_at_any_byte_leaves_complete_rows_with_their_provenance(kept, tmp_path):
    path, made = tmp_path / "rows", [ORIGIN | {"number": number} for number in range(3)]
    for row in made:
        rows.append(path, row)
    path.write_bytes(path.read_bytes()[:kept])
    left = rows.read(path)
    assert left == made[: len(left)]
    rows.append(path, made[-1])
    assert rows.read(path) == [*left, made[-1]]


def test_numbers_that_json_cannot_represent_become_null(tmp_path):
    rows.append(tmp_path / "rows", {"gap": float("nan"), "losses": [1.0, float("inf")], "deep": {"x": -np.inf}})
    assert rows.read(tmp_path / "rows") == [{"gap": None, "losses": [1.0, None], "deep": {"x": None}}]


def test_shared_provenance_is_stored_once_for_each_run(tmp_path):
    path = tmp_path / "rows"
    made = [{"number": 0, **ORIGIN}, {"number": 1}, {"number": 2, **ORIGIN, "cores": 4}, {"number": 3, **ORIGIN}]
    for row in made:
        rows.append(path, row)
    assert rows.read(path) == made
    assert path.read_text().count("versions") == 2
    whole = path.read_text()
    rows.replace(path, made)
    assert path.read_text() == whole
    rows.replace(path, made[1:2])
    assert rows.read(path) == made[1:2]
    assert [file.name for file in tmp_path.iterdir()] == ["rows"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.text(min_size=1).filter(lambda name: name not in ("run", "kind")) | st.sampled_from(rows.SHARED)


@pytest.mark.slow
@given(st.lists(st.dictionaries(NAMES, JSON, min_size=1, max_size=4), max_size=5))
def test_rows_are_read_as_written(tmp_path_factory, made):
    path = tmp_path_factory.mktemp("rows") / "rows"
    for row in made:
        rows.append(path, row)
    assert [rows.finite(row) for row in made] == rows.read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "line 3: got '{}', expected a row"),
        ("null", "line 3: got 'null', expected a row"),
        ("[1, 2]", r"line 3: got '\[1, 2\]', expected a row"),
        ('{"a": 1', "line 3: got '{\"a\": 1', expected a row"),
        ("\x80", "line 3: got "),
        ("[" * 100_000, r"line 3: got '\[\["),
        ('{"b": 1}', "line 3: got a row without a, expected one with a"),
        ('{"a": 1, "run": "0"}', "line 3: got a row of run '0', expected a line above it"),
    ],
)
def test_a_line_that_is_not_a_row_is_named(line, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows.append(path, {"a": 1, "command": "c"})
    path.write_bytes(path.read_bytes() + line.encode("latin-1") + b"\n" + b'{"a": 2}\n')
    with pytest.raises(ValueError, match=message) as raised:
        rows.read(path, ("a",))
    assert str(raised.value).startswith(f"{path}, line 3: ")


@pytest.mark.parametrize("row", [{"run": 1}, {"kind": "provenance"}])
def test_rows_may_not_use_reserved_fields(row, tmp_path):
    with pytest.raises(ValueError, match="expected neither"):
        rows.append(tmp_path / "rows", row)
    assert not (tmp_path / "rows").exists()


def test_existing_rows_are_not_computed_again(tmp_path):
    path, made = tmp_path / "rows", []

    def make():
        made.append(1)
        return {"value": len(made)}

    for seed in (1, 1, 2, 1):
        rows.add(path, {"stage": "trial", "seed": seed}, make, ORIGIN)
    assert rows.select(rows.read(path), seed=2) == [{"stage": "trial", "seed": 2, "value": 2, **ORIGIN}]
    assert rows.select(rows.read(path), seed=1, other=None) == []
    assert len(made) == 2


def test_provenance_lists_the_installed_versions():
    found = rows.provenance("eupmu demo", "TPU v5 lite")
    assert found["versions"].keys() >= {"eupmu-jax", "jax", "jaxlib", "optax", "flax"}
    assert (found["device"], found["command"]) == ("TPU v5 lite", "eupmu demo")
    assert found.keys() == set(rows.SHARED)
    json.dumps(found)


def write(path, name):
    for count in range(50):
        rows.append(path, {"name": name, "count": count, "padding": "x" * 5_000, "command": str(count % 2)})


@pytest.mark.slow
def test_concurrent_processes_write_complete_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write, args=(path, name)) for name in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = rows.read(path)
    assert len(found) == 150
    for name in range(3):
        assert [row["count"] for row in found if row["name"] == name] == list(range(50))
    assert path.read_text().count('"kind": "provenance"') == 2


def test_a_row_without_a_trailing_newline_counts(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    assert rows.read(path) == [{"a": 1}, {"a": 2}]
    rows.append(path, {"a": 3})
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'


def test_writers_with_one_process_number_do_not_mix_what_they_write(tmp_path):
    # BUG: in two containers, which may both have process 1, they shared the unfinished file.
    path = tmp_path / "audit.json"
    with rows.replacing(path) as first:
        first.write(b"first")
        with rows.replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_could_not_be_replaced_is_named_and_leaves_nothing_else(tmp_path):
    # BUG: "No space left on device" alone, and an empty file for each attempt.
    path = tmp_path / "audit.json"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left") as raised, rows.replacing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == str(path)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("audit.json", "old")]


@pytest.mark.parametrize("text", ["dear diary\n", "no end of a line", "[1, 2]", '{\n  "valuable": 1\n}'])
def test_a_file_that_holds_no_rows_is_left_unchanged(text, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"notes.txt: begins with .*, expected a file of rows"):
        rows.append(path, {"a": 1})
    assert path.read_text() == text
