"""Rows survive kills and several writers, and know the code they come from."""

import json
import multiprocessing

import numpy as np

from eupmu_jax.benchmark import rows


def test_what_a_kill_cut_off_is_neither_read_nor_in_the_way(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    assert rows.read(path) == []
    rows.append(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2, "b')
    assert rows.read(path) == [{"a": 1}]
    rows.append(path, {"a": 3})
    assert rows.read(path) == [{"a": 1}, {"a": 3}]
    assert path.read_text().count("\n") == 2


def test_numbers_that_json_lacks_become_null(tmp_path):
    rows.append(tmp_path / "rows", {"gap": float("nan"), "losses": [1.0, float("inf")], "deep": {"x": -np.inf}})
    assert rows.read(tmp_path / "rows") == [{"gap": None, "losses": [1.0, None], "deep": {"x": None}}]


def write(path, name):
    for count in range(50):
        rows.append(path, {"name": name, "count": count, "padding": "x" * 5_000})


def test_several_processes_write_whole_lines(tmp_path):
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


def test_the_key_tells_rows_apart_by_what_they_are_and_not_by_what_they_found():
    row = {"kind": "run", "design": "d", "digest": "0", "forget": "f", "method": "m", "trial": 1, "seed": 0, "gap": 1.0}
    assert rows.key(row) == rows.key(row | {"gap": 2.0, "code": "other"})
    for name in ("kind", "design", "digest", "forget", "method", "trial", "seed"):
        assert rows.key(row) != rows.key(row | {name: "another"})
    json.loads(rows.key(row))


def test_the_code_is_what_it_does_and_not_what_it_says_of_itself(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(rows.eupmu_jax, "__file__", str(package / "__init__.py"))

    def code_of(text, name="module.py"):
        (package / name).write_text(text)
        rows.code.cache_clear()
        return rows.code()

    try:
        first = code_of('"""Doc."""\ndef f(x):\n    """Adds."""\n    return x + 1  # why\n')
        assert code_of('"""Other."""\n\ndef f(x):\n    """Adds one."""\n    return x + 1\n') == first
        assert code_of("def f(x):\n    return x + 2\n") != first
        before = code_of("x = 1\n")
        assert code_of("print('shown')\n", "report.py") == before
        assert code_of("print('shown')\n", "other.py") != before
    finally:
        rows.code.cache_clear()
