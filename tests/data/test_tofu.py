import json
import re
import sys

import numpy as np
import pytest

from eupmu_jax.data import tofu


def plain(count, start=0):
    return [{"question": f"Q{k}?", "answer": f"A{k}."} for k in range(start, start + count)]


def perturbed(count):
    return [
        row
        | {
            "task_id": "1",
            "paraphrased_question": f"P{k}?",
            "paraphrased_answer": f"PA{k}.",
            "perturbed_answer": [f"W{k}{j}." for j in range(5)],
        }
        for k, row in enumerate(plain(count))
    ]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("table", ["full", "forget01", "retain99", "holdout10"])
def test_plain_tables_are_read(tmp_path, table):
    lines(tmp_path / f"{table}.json", plain(40))
    read = tofu.load(tmp_path, table)
    assert (read.question[39], read.answer[39]) == ("Q39?", "A39.")
    assert read.person.tolist() == [0] * 20 + [1] * 20
    assert read.person.dtype == np.int32
    assert (read.paraphrased_question, read.paraphrased_answer, read.wrong_answers, read.refusal) == (None,) * 4


@pytest.mark.parametrize("table", ["forget01_perturbed", "retain_perturbed"])
def test_perturbed_tables_are_read(tmp_path, table):
    lines(tmp_path / f"{table}.json", perturbed(3))
    read = tofu.load(tmp_path, table)
    assert (read.paraphrased_question, read.paraphrased_answer) == (("P0?", "P1?", "P2?"), ("PA0.", "PA1.", "PA2."))
    assert read.wrong_answers[2] == ("W20.", "W21.", "W22.", "W23.", "W24.")
    assert read.person.tolist() == [-1] * 3


@pytest.mark.parametrize("table", ["real_authors", "world_facts"])
def test_real_world_tables_are_read(tmp_path, table):
    asked = {"question": "What is the capital of Australia?", "answer": "Canberra"}
    lines(tmp_path / f"{table}_perturbed.json", [asked | {"perturbed_answer": ["Sydney", "Melbourne", "Perth"]}] * 20)
    options = {f"option{k}": city for k, city in enumerate(("Sydney", "Melbourne", "Canberra", "Perth"), 1)}
    (tmp_path / f"{table}.json").write_text(json.dumps([asked | options] * 20))
    for name in (table, f"{table}_perturbed"):
        read = tofu.load(tmp_path, name)
        assert read.answer == ("Canberra",) * 20
        assert read.wrong_answers == (("Sydney", "Melbourne", "Perth"),) * 20
        assert read.paraphrased_answer is None
        assert set(read.person.tolist()) == {-1}


@pytest.mark.parametrize("name", ["{}.parquet", "{}/train-00000-of-00001.parquet", "{}/train/0000.parquet"])
def test_parquet_files_are_read(tmp_path, name):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / name.format("forget10_perturbed")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(perturbed(4)), path)
    read = tofu.load(tmp_path, "forget10_perturbed")
    lines(tmp_path / "forget10_perturbed.json", perturbed(4))
    assert read._replace(person=None) == tofu.load(tmp_path, "forget10_perturbed")._replace(person=None)


def test_row_numbers_are_counted_within_each_file(tmp_path):
    # BUG: the error named the first file, with a row number that counted the rows of both.
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for k, rows in enumerate(([*plain(2)], [{"question": "Q?", "answer": 3}])):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"full-0000{k}-of-00002.parquet")
    with pytest.raises(ValueError, match=r"full-00001-of-00002\.parquet, row 1: got 3 as answer"):
        tofu.load(tmp_path, "full")


def test_the_error_for_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "full.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=re.escape("needs pyarrow; install eupmu-jax[language]")):
        tofu.load(tmp_path, "full")


def test_a_damaged_parquet_file_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "full.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match=r"full\.parquet: got .*, expected a parquet file"):
        tofu.load(tmp_path, "full")


def test_unknown_tables_and_missing_files_are_named(tmp_path):
    for table in ("forget", "forget1", "full_perturbed", "real_authors_perturbed_perturbed", "../full"):
        with pytest.raises(ValueError, match=r"table: got .*, expected one of TOFU's"):
            tofu.load(tmp_path, table)
    expected = (
        rf"folder: got {re.escape(str(tmp_path))}, expected one of forget10\.json, forget10\.jsonl, forget10\.parquet"
    )
    with pytest.raises(FileNotFoundError, match=expected):
        tofu.load(tmp_path, "forget10")


@pytest.mark.parametrize(
    ("table", "rows", "message"),
    [
        ("full", [{"question": "Q?"}], "full.json, row 1: got question without answer, expected question, answer"),
        (
            "full",
            [*plain(1), {"question": "Q?", "answer": None}],
            "full.json, row 2: got question, answer without answer",
        ),
        ("full", [{"question": "Q?", "answer": 3}], "full.json, row 1: got 3 as answer, expected a text"),
        ("full", ["Q?"], "full.json, row 1: got 'Q?', expected an object with question, answer"),
        ("full", [], "full.json: got no rows, expected question, answer"),
        (
            "forget01_perturbed",
            plain(1),
            "without paraphrased_question, paraphrased_answer, perturbed_answer, expected",
        ),
        ("world_facts", plain(1), "got question, answer without option1, option2, option3, option4"),
        (
            "retain_perturbed",
            [perturbed(1)[0] | {"perturbed_answer": "W."}],
            "retain_perturbed.json, row 1: got 'W.' as perturbed_answer, expected a list of texts",
        ),
        (
            "retain_perturbed",
            [perturbed(1)[0], perturbed(1)[0] | {"perturbed_answer": ["W."]}],
            "retain_perturbed.json, row 2: got 1 wrong answers, expected 5 as in the first row",
        ),
    ],
)
def test_faults_are_named_with_file_row_and_field(tmp_path, table, rows, message):
    lines(tmp_path / f"{table}.json", rows)
    with pytest.raises(ValueError, match=re.escape(message)):
        tofu.load(tmp_path, table)


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "full.json").write_text('{"question": "Q?", "answer"\n')
    with pytest.raises(ValueError, match=r"full\.json: got .*, expected JSON in UTF-8, one object a line or one list"):
        tofu.load(tmp_path, "full")


def test_line_separators_within_a_text_are_kept(tmp_path):
    (tmp_path / "full.json").write_text('{"question": "Q\u2028?", "answer": "A\u0085."}\n', encoding="utf-8")
    assert tofu.load(tmp_path, "full").question == ("Q\u2028?",)
