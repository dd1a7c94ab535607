import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eupmu_jax.benchmark import problems
from eupmu_jax.metrics import accuracy
from eupmu_jax.objectives import cross_entropy
from eupmu_jax.tasks import Examples, classification
from eupmu_jax.training import fitting
from eupmu_jax.training._streams import id_batches, paired_batches, sample_positions


def test_id_batches_use_every_id_once_before_any_repeats():
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


def test_what_cannot_be_trained_is_refused_before_any_work():
    fit = lambda count=3, **recipe: fitting.fit_task(
        classification(lambda w, x: x @ w, 2),
        jnp.zeros((2, 2)),
        {"inputs": np.ones((count, 2), np.float32), "labels": np.zeros(count, int)},
        **{"epochs": 1, "batch_size": 2, "learning_rate": 0.1, "seed": 0} | recipe,
    )
    # BUG: a division by zero, or an error of optax.
    for name in ("epochs", "batch_size"):
        with pytest.raises(ValueError, match=f"^{name}: got 0, expected an int of at least 1"):
            fit(**{name: 0})
    with pytest.raises(ValueError, match=r"^examples: got an empty set, expected at least one example"):
        fit(count=0)
    # BUG: parameters that are not numbers, after all the work.
    for rate in (float("nan"), float("inf"), -0.1):
        with pytest.raises(ValueError, match=f"^learning_rate: got {rate}, expected a finite number >= 0$"):
            fit(learning_rate=rate)


def test_training_is_cached_and_the_cache_distinguishes_recipes_and_data(tmp_path):
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


def test_the_average_of_the_parameters_follows_its_formula():
    examples = Examples({"x": jnp.arange(6.0)}, np.arange(6))
    loss = lambda params, statistics, batch, key: (jnp.mean((params - batch["x"]) ** 2), statistics)
    options = {"epochs": 4, "batch_size": 2, "learning_rate": 0.3, "seed": 0}
    batches = id_batches(examples.ids, 2, np.random.default_rng(0))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.3, 12))
    # `fit` uses the first batch only to compile the step.
    next(batches)
    params = expected = jnp.float32(0)
    state = optimizer.init(params)
    for n in range(12):
        slope = 2 * (params - jnp.mean(examples.tree["x"][next(batches)]))
        updates, state = optimizer.update(slope, state)
        params = params + updates
        decay = min(0.4, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * params
    averaged = fitting.fit(loss, jnp.float32(0), {}, examples, average=0.4, **options)
    np.testing.assert_allclose(averaged.params, expected, rtol=1e-5)
    np.testing.assert_allclose(fitting.fit(loss, jnp.float32(0), {}, examples, **options).params, params, rtol=1e-5)
    # BUG: the second step failed, since its average had become float32.
    half = fitting.fit(loss, jnp.bfloat16(0), {}, examples, average=0.4, **options).params
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half, expected, rtol=0.05)


def test_the_watched_examples_are_not_those_of_the_first_step():
    counts = (50, 80)
    watched = sample_positions(counts, np.random.default_rng(0))
    first = next(paired_batches(counts, (50, 80), 0))
    assert all(np.any(one != other) for one, other in zip(first, watched, strict=True))
