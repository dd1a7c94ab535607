import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from eupmu_jax import data
from eupmu_jax.data import Split, digest, load_split, save_split, split

LABELS = np.arange(100, dtype=np.int32) % 10

label_lists = st.lists(st.integers(0, 4), min_size=2, max_size=200)
seeds = st.integers(0, 2**32 - 1)


def assert_partition(result: Split, size: int) -> None:
    forget, retain, _ = result
    assert forget.dtype == retain.dtype == np.int64
    assert len(forget) > 0
    assert len(retain) > 0
    assert (np.diff(forget) > 0).all()
    assert (np.diff(retain) > 0).all()
    np.testing.assert_array_equal(np.sort(np.concatenate([forget, retain])), np.arange(size))


@given(labels=label_lists, seed=seeds)
def test_class_split_takes_exactly_that_class(labels, seed):
    forget_class = labels[0]
    assume(len(set(labels)) > 1)
    result = split(labels, f"class:{forget_class}", num_classes=5, seed=seed)
    assert_partition(result, len(labels))
    assert result.forget_class == forget_class
    np.testing.assert_array_equal(result.forget_ids, np.flatnonzero(np.array(labels) == forget_class))


@given(labels=label_lists, seed=seeds, tenths=st.integers(1, 999))
def test_random_split_takes_the_requested_share(labels, seed, tenths):
    count = round(len(labels) * (tenths / 10) / 100)
    assume(0 < count < len(labels))
    result = split(labels, f"random:{tenths / 10}%", num_classes=5, seed=seed)
    assert_partition(result, len(labels))
    assert result.forget_class is None
    assert len(result.forget_ids) == count


@given(seed=seeds)
def test_the_seed_determines_the_random_split(seed):
    first, again, other = (split(LABELS, "random:50%", num_classes=10, seed=s) for s in (seed, seed, seed + 1))
    assert digest(first) == digest(again)
    assert digest(first) != digest(other)


def test_the_seed_does_not_affect_the_class_split():
    first, other = (split(LABELS, "class:3", num_classes=10, seed=seed) for seed in (0, 1))
    assert digest(first) == digest(other)


def test_percentages_may_be_fractional():
    assert len(split(np.zeros(1000), "random:2.5%", num_classes=1, seed=0).forget_ids) == 25


def test_a_random_split_is_independent_of_the_class():
    ids = split(LABELS, "random:50%", num_classes=10, seed=0).forget_ids
    assert len(set(LABELS[ids])) > 5


@pytest.mark.parametrize(
    "forget",
    [
        "",
        "class",
        "class:",
        "class:x",
        "class:1.5",
        "class:3 ",
        "3",
        "random:10",
        "random:%",
        "random:1e1%",
        "all",
        "memorised",
    ],
)
def test_bad_syntax_is_refused(forget):
    with pytest.raises(ValueError, match=r"^forget: got '.*', expected 'class:<index>', 'random:<number>%' or 'mem"):
        split(LABELS, forget, num_classes=10, seed=0)


@pytest.mark.parametrize("forget", ["class:10", "class:-1"])
def test_an_unknown_class_is_refused(forget):
    with pytest.raises(ValueError, match=rf"^forget: got '{forget}', expected a class from 0 to 9$"):
        split(LABELS, forget, num_classes=10, seed=0)


@pytest.mark.parametrize("forget", ["random:0%", "random:0.0%", "random:100%", "random:250%", "random:-5%"])
def test_a_percentage_out_of_range_is_refused(forget):
    with pytest.raises(ValueError, match=rf"^forget: got '{forget}', expected a percentage above 0 and below 100$"):
        split(LABELS, forget, num_classes=10, seed=0)


@pytest.mark.parametrize("forget", ["random:0.1%", "class:10"])
def test_an_empty_forget_set_is_refused(forget):
    with pytest.raises(ValueError, match=rf"^forget: got '{forget}', which selects none of the 100 examples"):
        split(LABELS, forget, num_classes=11, seed=0)


def test_data_without_examples_are_refused():
    with pytest.raises(ValueError, match="which selects none of the 0 examples"):
        split(np.empty(0, np.int32), "random:10%", num_classes=10, seed=0)


@pytest.mark.parametrize("forget", ["random:99.9%", "class:2"])
def test_a_forget_set_of_all_examples_is_refused(forget):
    with pytest.raises(ValueError, match=rf"^forget: got '{forget}', which selects all 100 examples"):
        split(np.full(100, 2), forget, num_classes=3, seed=0)


def test_one_hot_labels_are_refused():
    with pytest.raises(ValueError, match=r"^labels: got shape \(10, 10\), expected \(N,\) class indices$"):
        split(np.eye(10), "class:3", num_classes=10, seed=0)


def test_the_digest_of_a_split_is_fixed():
    # The digest is recorded with results, so it must not change between versions or platforms.
    result = Split(np.array([1, 2]), np.array([0, 3]), None)
    assert digest(result) == "473c1ac3babfb8ef57bd567a369a7d669beb5af6daef92e10deb9b150f608aea"


def test_the_digest_depends_on_the_boundary():
    ids = np.arange(4)
    assert digest(Split(ids[:1], ids[1:], None)) != digest(Split(ids[:2], ids[2:], None))


@given(labels=label_lists, seed=seeds, tenths=st.integers(1, 999))
def test_memorised_split_takes_the_highest_scores(labels, seed, tenths):
    count = round(len(labels) * (tenths / 10) / 100)
    assume(0 < count < len(labels))
    # Use few distinct scores, so that there are ties.
    scores = np.random.default_rng(seed).integers(-3, 4, len(labels)) / 2
    result = split(labels, f"memorised:{tenths / 10}%", num_classes=5, seed=seed, scores=scores)
    assert_partition(result, len(labels))
    assert result.forget_class is None
    ranked = sorted(range(len(labels)), key=lambda example: (-scores[example], example))
    assert result.forget_ids.tolist() == sorted(ranked[:count])


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, r"^scores: got None, expected \(N,\) scores for 'memorised:10%'"),
        (np.zeros((100, 1)), r"^scores: got shape \(100, 1\), expected one for each of the 100 labels$"),
        (np.where(np.arange(100) < 3, np.nan, 0), "^scores: got 3 that are not numbers"),
    ],
)
def test_bad_scores_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        split(LABELS, "memorised:10%", num_classes=10, seed=0, scores=scores)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.mark.parametrize("forget", ["class:3", "random:10%"])
def test_a_saved_split_can_be_loaded(forget, digits, tmp_path):
    saved = split(digits.train_labels, forget, num_classes=10, seed=0)
    for _ in range(2):
        save_split(saved, tmp_path / "split.json", digits)
    loaded = load_split(tmp_path / "split.json", digits)
    assert_partition(loaded, len(digits.train_labels))
    assert digest(loaded) == digest(saved)
    assert loaded.forget_class == saved.forget_class
    assert [path.name for path in tmp_path.iterdir()] == ["split.json"]


def test_a_split_of_other_data_is_refused_with_both_hashes(digits, tmp_path):
    save_split(split(digits.train_labels, "class:3", num_classes=10, seed=0), tmp_path / "split.json", digits)
    images = digits.train_images.copy()
    images[5, 0, 0, 0] += 1 / 16
    other = digits._replace(train_images=images)
    with pytest.raises(ValueError, match=r"^dataset: got digits with SHA-256") as caught:
        load_split(tmp_path / "split.json", other)
    assert data.dataset.digest(digits) in str(caught.value)
    assert data.dataset.digest(other) in str(caught.value)


@pytest.mark.parametrize("ids", [[1, 2], [-1], [10**6], []])
def test_a_changed_file_is_refused(ids, digits, tmp_path):
    path = tmp_path / "split.json"
    save_split(split(digits.train_labels, "class:3", num_classes=10, seed=0), path, digits)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"forget_ids": ids}))
    with pytest.raises(ValueError, match=r"the file was changed$"):
        load_split(path, digits)


@pytest.mark.parametrize("forget_ids", [np.arange(10, 5, -1), np.array([1, 1]), np.array([2000])])
def test_only_a_complete_split_of_the_data_is_saved(forget_ids, digits, tmp_path):
    retain_ids = np.setdiff1d(np.arange(len(digits.train_labels)), forget_ids)
    with pytest.raises(
        ValueError, match=r"^split: got indices that are not 0 to 1436, sorted, each on exactly one side"
    ):
        save_split(Split(forget_ids, retain_ids, None), tmp_path / "split.json", digits)
    assert list(tmp_path.iterdir()) == []


def test_a_split_that_names_a_class_but_forgets_others_is_not_saved(digits, tmp_path):
    # BUG: it was written, and `load_split` then said that the file was changed.
    some = split(digits.train_labels, "random:10%", num_classes=10, seed=0)._replace(forget_class=3)
    with pytest.raises(ValueError, match=r"^split: got forget_class 3 with other examples .* or forget_class None"):
        save_split(some, tmp_path / "split.json", digits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"data": "digits"}'])
def test_a_file_that_is_not_a_split_is_refused(text, digits, tmp_path):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(ValueError, match=r"split\.json: got .*, expected a split as `save_split` writes it"):
        load_split(tmp_path / "split.json", digits)
