import gzip

import numpy as np
import pytest

from eupmu_jax.data import passages


@pytest.fixture
def dictionary(tmp_path, monkeypatch):
    """Replaces the text of the package by a given one."""

    def dictionary(text):
        path = tmp_path / "devil.dict.dz"
        path.write_bytes(gzip.compress(text.encode("latin-1")))
        monkeypatch.setenv(passages.SOURCE_VARIABLE, str(path))

    return dictionary


@pytest.mark.parametrize(
    "head",
    [
        "ABATIS, n.",
        "CONFIDANT, CONFIDANTE, n.",
        "BABE or BABY, n.",
        "TZETZE (or TSETSE) FLY, n.",
        "INFERIAE,n.",
        "ME, pro.",
    ],
)
def test_every_kind_of_headword_starts_an_entry(dictionary, head):
    # BUG: headwords of several words, of pronouns and without a blank were read as part of the previous entry.
    dictionary(f"ZEAL, n.  A certain nervous\ndisorder.\n{head}  Rubbish in front of a fort.\n")
    assert [passages.text_of(passage) for passage in passages.load(9)] == ["ZEAL, n. ", f"{head} Rubbish"[:9]]


def test_a_duplicate_entry_counts_once(dictionary):
    # BUG: the same text could be in both the forget and the retain set.
    dictionary("PRECIPITATE, adj.  Anteprandial.\n" * 2 + "RUIN, v.  To destroy.\n")
    assert [passages.text_of(passage) for passage in passages.load(12)] == ["PRECIPITATE,", "RUIN, v. To "]
    assert passages.load(12).dtype == np.int32
