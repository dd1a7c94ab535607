import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from eupmu_jax.data import Split, digest, split

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
def test_random_split_takes_the_share(labels, seed, tenths):
    count = round(len(labels) * (tenths / 10) / 100)
    assume(0 < count < len(labels))
    result = split(labels, f"random:{tenths / 10}%", num_classes=5, seed=seed)
    assert_partition(result, len(labels))
    assert result.forget_class is None
    assert len(result.forget_ids) == count


@given(seed=seeds)
def test_seed_decides_the_random_split(seed):
    first, again, other = (split(LABELS, "random:50%", num_classes=10, seed=s) for s in (seed, seed, seed + 1))
    assert digest(first) == digest(again)
    assert digest(first) != digest(other)


def test_seed_leaves_the_class_split_alone():
    first, other = (split(LABELS, "class:3", num_classes=10, seed=seed) for seed in (0, 1))
    assert digest(first) == digest(other)


def test_fractional_percentage():
    assert len(split(np.zeros(1000), "random:2.5%", num_classes=1, seed=0).forget_ids) == 25


def test_random_split_does_not_follow_the_class():
    ids = split(LABELS, "random:50%", num_classes=10, seed=0).forget_ids
    assert len(set(LABELS[ids])) > 5


@pytest.mark.parametrize(
    "forget",
    ["", "class", "class:", "class:x", "class:1.5", "class:3 ", "3", "random:10", "random:%", "random:1e1%", "all"],
)
def test_bad_syntax(forget):
    with pytest.raises(ValueError, match=r"^forget: got '.*', want 'class:<index>' or 'random:<number>%'$"):
        split(LABELS, forget, num_classes=10, seed=0)


@pytest.mark.parametrize("forget", ["class:10", "class:-1"])
def test_unknown_class(forget):
    with pytest.raises(ValueError, match=rf"^forget: got '{forget}', want a class from 0 to 9$"):
        split(LABELS, forget, num_classes=10, seed=0)


@pytest.mark.parametrize("forget", ["random:0%", "random:0.0%", "random:100%", "random:250%", "random:-5%"])
def test_percentage_out_of_range(forget):
    with pytest.raises(ValueError, match=rf"^forget: got '{forget}', want a percentage above 0 and below 100$"):
        split(LABELS, forget, num_classes=10, seed=0)


@pytest.mark.parametrize("forget", ["random:0.1%", "class:10"])
def test_empty_forget_set(forget):
    with pytest.raises(ValueError, match=rf"^forget: got '{forget}', which is none of the 100 examples"):
        split(LABELS, forget, num_classes=11, seed=0)


def test_no_examples_at_all():
    with pytest.raises(ValueError, match="which is none of the 0 examples"):
        split(np.empty(0, np.int32), "random:10%", num_classes=10, seed=0)


@pytest.mark.parametrize("forget", ["random:99.9%", "class:2"])
def test_forget_set_is_everything(forget):
    with pytest.raises(ValueError, match=rf"^forget: got '{forget}', which is all 100 examples"):
        split(np.full(100, 2), forget, num_classes=3, seed=0)


def test_one_hot_labels():
    with pytest.raises(ValueError, match=r"^labels: got shape \(10, 10\), want \(N,\) class indices$"):
        split(np.eye(10), "class:3", num_classes=10, seed=0)


def test_digest_is_fixed():
    # Recorded beside results, so it must not drift between versions or platforms.
    result = Split(np.array([1, 2]), np.array([0, 3]), None)
    assert digest(result) == "473c1ac3babfb8ef57bd567a369a7d669beb5af6daef92e10deb9b150f608aea"


def test_digest_sees_the_boundary():
    ids = np.arange(4)
    assert digest(Split(ids[:1], ids[1:], None)) != digest(Split(ids[:2], ids[2:], None))
