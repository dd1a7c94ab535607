"""Which classes are to be forgotten entirely, and how unseen examples are matched to a set by class."""

import jax.numpy as jnp
import numpy as np
import pytest

from eupmu_jax import tasks
from eupmu_jax.tasks import as_examples
from eupmu_jax.training.classes import alike, classes_to_go
from eupmu_jax.training.levels import compare


def test_without_unseen_examples_of_a_retained_class_there_is_no_comparison():
    task = tasks.classification(lambda params, inputs: inputs, num_classes=3)
    # BUG: after the last step, the comparison was with an empty set.
    some, unseen = (as_examples("set", {"labels": np.array(labels)}) for labels in ([0, 0, 1], [0] * 9))
    assert alike(task, some, unseen, gone={0}) is None


def test_a_class_with_few_unseen_examples_is_not_compared_with_other_classes():
    # BUG: if every class of the forget set had fewer than five unseen examples, it was compared with all of them.
    task = tasks.classification(lambda params, inputs: inputs, num_classes=3)
    of = lambda labels: as_examples("set", {"labels": np.array(labels)})
    assert alike(task, of([2] * 9), of([0] * 50 + [2] * 4)) is None
    thin = of([0, 1, 2] * 4)
    assert [len(part) for part in alike(task, thin, thin)] == [12, 12]


def test_a_forget_set_of_a_hard_class_is_compared_with_unseen_examples_of_that_class():
    # The model gets half of class 0 and none of class 1 wrong, in the forget set as in unseen data.
    task = tasks.classification(lambda params, inputs: inputs * params, num_classes=2)
    of = lambda labels, shown: as_examples(
        "data", {"inputs": np.eye(2, dtype=np.float32)[shown], "labels": np.array(labels)}
    )
    unseen = of([0] * 100 + [1] * 100, [0, 1] * 50 + [1] * 100)
    forgotten = of([0] * 100, [0, 1] * 50)
    assert compare(task, jnp.ones(2), forgotten, unseen).low > 0
    fair = compare(task, jnp.ones(2), *alike(task, forgotten, unseen))
    assert fair.low < 0 < fair.high
    assert alike(task._replace(num_classes=None), forgotten, unseen) == (forgotten, unseen)
    assert alike(task, forgotten, unseen, gone={0}) is None


@pytest.mark.parametrize(
    ("forgotten", "unseen", "size"),
    [
        ({0: 500, **dict.fromkeys(range(1, 100), 1)}, dict.fromkeys(range(100), 100), 126),
        ({0: 500, 1: 500}, {0: 10_000, 1: 1}, 10_000),
        (dict.fromkeys(range(10), 3), dict.fromkeys(range(10), 25), 263),
    ],
)
def test_rare_classes_neither_fill_the_unseen_set_nor_empty_it(forgotten, unseen, size):
    task = tasks.classification(lambda params, inputs: inputs, num_classes=100)
    of = lambda counts: as_examples("data", {"labels": np.repeat(list(counts), list(counts.values()))})
    some, chosen = alike(task, of(forgotten), of(unseen))
    assert abs(len(chosen) - size) <= 0.06 * size
    shares = [np.bincount(part.tree["labels"][part.ids], minlength=100) / len(part) for part in (some, chosen)]
    assert abs(shares[0][0] - shares[1][0]) < 0.06


class Source:
    """A source of examples that counts how many were read."""

    def __init__(self, labels):
        self.labels, self.read = np.asarray(labels), 0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, positions):
        self.read += len(positions)
        return {"inputs": np.zeros((len(positions), 2)), "labels": self.labels[positions]}


def test_classes_to_be_forgotten_are_found_in_sources_too():
    # BUG: labels were read from arrays only, so a whole class in a source was brought to the level of unseen data.
    task = tasks.classification(lambda params, inputs: inputs, num_classes=4)
    retain = Source([0, 1] * 2_000)
    assert classes_to_go(task, Source([0, 1, 0]), retain) == frozenset()
    assert retain.read < len(retain)
    assert classes_to_go(task, Source([0, 3]), retain) == frozenset({3})
    some, unseen = alike(task, Source([0, 0, 1, 3]), Source([0, 1] * 10), {3})
    assert some[np.arange(len(some))]["labels"].tolist() == [0, 0, 1]
    assert np.mean(unseen[np.arange(len(unseen))]["labels"] == 0) == pytest.approx(2 / 3, abs=0.05)


def test_five_unseen_examples_of_a_class_are_enough_to_compare_with():
    task = tasks.classification(lambda params, inputs: inputs, num_classes=3)
    of = lambda labels: as_examples("set", {"labels": np.array(labels)})
    assert [len(part) for part in alike(task, of([2] * 9), of([0] * 50 + [2] * 5))] == [9, 5]


def test_where_every_class_is_rare_those_to_be_forgotten_are_left_out_on_both_sides():
    task = tasks.classification(lambda params, inputs: inputs, num_classes=3)
    thin = as_examples("set", {"labels": np.array([0, 1, 2] * 4)})
    for part in alike(task, thin, thin, gone={0}):
        assert part.tree["labels"][part.ids].tolist() == [1, 2] * 4


def test_five_unseen_examples_of_the_largest_class_are_enough_to_mix():
    task = tasks.classification(lambda params, inputs: inputs, num_classes=3)
    of = lambda labels: as_examples("set", {"labels": np.array(labels)})
    assert [len(part) for part in alike(task, of([0] * 9), of([0] * 5 + [1] * 5))] == [9, 5]
