import json
import re

import numpy as np
import pytest

from eupmu_jax.data import muse


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows))


def test_passages_may_be_texts_or_objects(tmp_path):
    write(tmp_path / "raw" / "forget.json", ["One.\nTwo.", "Three."])
    write(tmp_path / "raw" / "retain1.json", [{"text": "One.\nTwo."}, {"text": "Three."}])
    assert muse.texts(tmp_path, "raw", "forget") == ("One.\nTwo.", "Three.") == muse.texts(tmp_path, "raw", "retain1")


def test_pairs_are_read(tmp_path):
    write(tmp_path / "verbmem" / "forget.json", [{"prompt": "now, everyone", "gt": "down on his"}])
    write(tmp_path / "knowmem" / "forget_qa.json", [{"question": "Who?", "answer": "Ada"}] * 2)
    write(tmp_path / "knowmem" / "forget_qa_icl.json", [{"question": "When?", "answer": "1815"}])
    passages = muse.questions(tmp_path, "verbmem", "forget")
    assert (passages.question, passages.answer) == (("now, everyone",), ("down on his",))
    assert muse.questions(tmp_path, "knowmem", "forget_qa").answer == ("Ada", "Ada")
    examples = muse.questions(tmp_path, "knowmem", "forget_qa_icl")
    assert examples.question == ("When?",)
    assert examples.person.tolist() == [-1]
    assert examples.wrong_answers is None


def test_parquet_may_be_split_into_several_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "knowmem").mkdir()
    for k in range(2):
        # In the published files, the answer comes first.
        table = pyarrow.Table.from_pylist([{"answer": f"A{k}", "question": f"Q{k}?"}])
        parquet.write_table(table, tmp_path / "knowmem" / f"forget_qa-0000{k}-of-00002.parquet")
    parquet.write_table(table, tmp_path / "knowmem" / "forget_qa_icl-00000-of-00001.parquet")
    assert muse.questions(tmp_path, "knowmem", "forget_qa").question == ("Q0?", "Q1?")
    assert muse.questions(tmp_path, "knowmem", "forget_qa_icl").question == ("Q1?",)


def test_subsets_are_read(tmp_path):
    with pytest.raises(ValueError, match="subset: got 'knowmem', expected one of raw, privleak, scal, sust, train"):
        muse.texts(tmp_path, "knowmem", "forget_qa")
    with pytest.raises(ValueError, match="subset: got 'raw', expected one of verbmem, knowmem"):
        muse.questions(tmp_path, "raw", "forget")


def test_missing_files_and_fields_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected one of raw/holdout\.json, .*raw/holdout-\*\.parquet"):
        muse.texts(tmp_path, "raw", "holdout")
    write(tmp_path / "verbmem" / "forget.json", [{"prompt": "a", "text": "b"}])
    path = re.escape(str(tmp_path / "verbmem" / "forget.json"))
    with pytest.raises(ValueError, match=rf"{path}, row 1: got prompt, text without gt, expected prompt, gt"):
        muse.questions(tmp_path, "verbmem", "forget")
    write(tmp_path / "raw" / "forget.json", [{"text": 3}])
    with pytest.raises(ValueError, match="row 1: got 3 as text, expected a text"):
        muse.texts(tmp_path, "raw", "forget")


@pytest.mark.parametrize("length", [2, 4, 7, 100])
def test_every_token_of_the_passages_is_predicted_once(length):
    encode = lambda text: [*text.encode()]
    batch = muse.tokenized(("One.\nTwo.", "Three."), encode, length=length, begin=1)
    assert batch["tokens"].shape == batch["mask"].shape == (len(batch["tokens"]), length)
    assert batch["tokens"].dtype == np.int32
    assert bytes(batch["tokens"][batch["mask"]].tolist()) == b"One.\nTwo.\nThree."
    assert not batch["mask"][:, 0].any()
    assert set(batch["tokens"][~batch["mask"]].tolist()) == {1}
    # No row is without a passage.
    assert batch["mask"].any(axis=1).all()


def test_passages_that_cannot_become_rows_are_refused_by_name():
    encode = lambda text: [*text.encode()]
    for passages, given in (("One.", "the text 'One.'"), ((), "no text"), (("",), "no text")):
        with pytest.raises(ValueError, match=f"passages: got {given}, expected a list of at least one text"):
            muse.tokenized(passages, encode, length=4, begin=1)
    with pytest.raises(ValueError, match="length: got 1, expected"):
        muse.tokenized(("One.",), encode, length=1, begin=1)
    for begin in (-1, True, "<s>"):
        with pytest.raises(ValueError, match="begin: got"):
            muse.tokenized(("One.",), encode, length=4, begin=begin)
    with pytest.raises(ValueError, match="encode: got the begin token 1 before the text"):
        muse.tokenized(("One.",), lambda text: [1, *text.encode()], length=4, begin=1)
