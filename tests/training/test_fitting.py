import itertools

import jax
import numpy as np

from eupmu_jax.benchmark import problems
from eupmu_jax.metrics import accuracy
from eupmu_jax.objectives import cross_entropy
from eupmu_jax.training import fitting
from eupmu_jax.training._streams import id_batches


def test_id_batches_pass_over_all_ids_before_any_comes_again():
    ids = np.arange(10)
    batches = list(itertools.islice(id_batches(ids, 4, np.random.default_rng(0)), 5))
    stream = np.concatenate(batches)
    np.testing.assert_array_equal(np.sort(stream[:10]), ids)
    np.testing.assert_array_equal(np.sort(stream[10:20]), ids)
    assert (stream[:10] != stream[10:20]).any()


def test_fit_learns_real_digits_from_the_given_ids_only():
    prepared = problems.make("digits", "class:3", seed=0, recipe=problems.Recipe(15, 64, 1e-3))
    steps = []
    model = prepared.functions

    def loss(params, statistics, batch, key):
        logits, statistics = model.forward(params, statistics, batch["inputs"], True)
        return cross_entropy(logits, batch["labels"]), statistics

    fitted = fitting.fit(
        loss,
        *model.initial(jax.random.key(0)),
        prepared.retain,
        epochs=15,
        batch_size=64,
        learning_rate=1e-3,
        seed=0,
        on_step=lambda: steps.append(1),
    )
    logits = fitting.predict(model.apply, fitted.params, prepared.tree["inputs"], batch_size=500)
    labels, split = prepared.dataset.train_labels, prepared.split
    assert logits.shape == (len(labels), 10)
    assert accuracy(logits[split.retain_ids], labels[split.retain_ids]) > 97
    assert accuracy(logits[split.forget_ids], labels[split.forget_ids]) == 0
    assert len(steps) == problems.training_steps(prepared, split.retain_ids)
    assert fitted.examples == 64 * len(steps)


def test_training_is_cached_and_other_recipes_or_data_are_not_mixed_up(tmp_path):
    prepared = problems.make("digits", "random:10%", seed=1, recipe=problems.Recipe(1, 64, 1e-3))
    steps = []
    arguments = dict(init_seed=0, cache=tmp_path, on_step=lambda: steps.append(1))
    first = problems.train(prepared, prepared.split.retain_ids, **arguments)
    made = len(steps)
    again = problems.train(prepared, prepared.split.retain_ids, **arguments)
    assert len(steps) == made > 0
    np.testing.assert_array_equal(first.params["layers"][0]["kernel"], again.params["layers"][0]["kernel"])
    assert again.seconds == first.seconds
    longer = prepared._replace(recipe=problems.Recipe(2, 64, 1e-3))
    problems.train(longer, prepared.split.retain_ids, **arguments)
    assert len(steps) == 3 * made
    other = prepared._replace(dataset=prepared.dataset._replace(train_labels=prepared.dataset.train_labels[::-1]))
    problems.train(other, prepared.split.retain_ids, **arguments)
    assert len(steps) == 4 * made
