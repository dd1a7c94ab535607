"""On real digits, a class that is merely suppressed comes back at once; one that was never learned does not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eupmu_jax.benchmark import problems
from eupmu_jax.objectives import cross_entropy
from eupmu_jax.tasks import Examples, classification
from eupmu_jax.training.relearning import Curve, area_between, relearn, relearn_part

pytestmark = pytest.mark.slow

FORGOTTEN = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The task, and parameters of four models: original, retrained, just suppressed, and suppressed further."""
    recipe, cache = problems.Recipe(20, 64, 1e-3), tmp_path_factory.mktemp("cache")
    prepared = problems.make("digits", f"class:{FORGOTTEN}", seed=0, recipe=recipe)
    everything = np.arange(len(prepared.dataset.train_labels))
    original, retrained = (
        problems.train(prepared, ids, init_seed=init_seed, cache=cache, on_step=lambda: None).params
        for ids, init_seed in ((everything, 0), (prepared.split.retain_ids, 1))
    )
    forget = prepared.forget[np.arange(len(prepared.forget))]
    logits = np.asarray(prepared.task.outputs(original, forget, None))
    margin = np.max(logits[:, FORGOTTEN] - np.delete(logits, FORGOTTEN, axis=1).max(axis=1)) + 0.1
    return prepared, original, retrained, suppress(original, margin), suppress(original, 2 * margin)


def suppress(params, amount):
    suppressed = jax.tree.map(lambda leaf: leaf, params)
    last = suppressed["layers"][len(suppressed["layers"]) - 1]
    last["bias"] = last["bias"].at[FORGOTTEN].add(-amount)
    return suppressed


def curve_of(prepared, params, train_ids, watch_ids, **options):
    arguments = {"steps": 40, "every": 10, "batch_size": 16} | options
    train, watch = (Examples(prepared.tree, ids) for ids in (train_ids, watch_ids))
    return relearn(prepared.task, params, train, watch, **arguments)


def test_a_suppressed_class_relearns_faster_than_one_never_learned(models):
    prepared, _, retrained, suppressed, further = models
    forget = np.random.default_rng(0).permutation(prepared.split.forget_ids)
    retrained, suppressed, further = (
        curve_of(prepared, params, forget[:16], forget[16:]) for params in (retrained, suppressed, further)
    )
    assert retrained.accuracy[0] == suppressed.accuracy[0] == further.accuracy[0] == 0
    assert suppressed.accuracy[-1] > 60
    assert retrained.accuracy[-1] < 20
    assert area_between(suppressed, retrained) > 20
    assert area_between(retrained, suppressed) == -area_between(suppressed, retrained)
    # As `area_between` warns, a class that was suppressed further relearns more slowly, though no more is forgotten.
    assert area_between(further, suppressed) < -20


def test_retain_examples_alone_do_not_teach_a_class_never_learned(models):
    prepared, original, retrained, *_ = models
    retain, forget = prepared.split.retain_ids, prepared.split.forget_ids
    curves = [curve_of(prepared, params, retain, forget, steps=20) for params in (original, retrained)]
    assert (curves[1].accuracy == 0).all()
    assert (curves[0].accuracy > 95).all()
    assert area_between(*curves) > 95


def test_the_step_is_compiled_once_for_all_models_and_rates_and_parameters_are_left_alone(models):
    prepared, original, retrained, *_ = models
    forget, traces = prepared.split.forget_ids, []

    def outputs(params, batch, key):
        traces.append(batch["inputs"].shape)
        return prepared.task.outputs(params, batch, key)

    counted = prepared._replace(task=prepared.task._replace(outputs=outputs))
    before = jax.tree.map(np.asarray, original)
    curves = [
        curve_of(counted, params, forget[:8], forget, **options)
        for params in (original, retrained, original)
        for options in ({"steps": 4, "every": 2, "batch_size": 8, "learning_rate": rate} for rate in (1e-4, 1e-3))
    ]
    # A step, a measurement, and a single example, whose outputs tell how many to measure at once.
    assert len(traces) == len(set(traces)) == 3
    chex.assert_trees_all_equal(original, before)
    np.testing.assert_array_equal(curves[0].accuracy, curves[4].accuracy)


def test_the_curve_is_that_of_a_plain_loop(models):
    prepared, _, _, suppressed, _ = models
    forget, optimizer = prepared.split.forget_ids, optax.adam(1e-3)
    # One batch holds all ids, so their order does not matter.
    curve = curve_of(prepared, suppressed, forget, forget, steps=5, every=2, batch_size=10_000, learning_rate=1e-3)
    params, state, expected = suppressed, optimizer.init(suppressed), []
    inputs, labels = prepared.forget[np.arange(len(forget))].values()
    apply = prepared.functions.apply

    @jax.jit
    def step(params, state):
        loss = lambda p: cross_entropy(apply(p, inputs), labels)
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for _ in range(6):
        expected.append(100 * float(jnp.mean(jnp.argmax(apply(params, inputs), -1) == labels)))
        params, state = step(params, state)
    assert curve.step.tolist() == [0, 2, 4, 5]
    np.testing.assert_allclose(curve.accuracy, [expected[i] for i in curve.step], atol=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"^steps: got 0, expected an int of at least 1"),
        ({"every": 0}, r"^every: got 0, expected an int of at least 1"),
        ({"batch_size": -1}, r"^batch_size: got -1, expected an int of at least 1"),
        ({"train_ids": np.array([], int)}, r"^train: got no examples"),
        ({"watch_ids": np.array([], int)}, r"^watch: got no examples"),
    ],
)
def test_bad_arguments_are_named(models, changes, message):
    prepared, original, *_ = models
    arguments = {"train_ids": np.arange(4), "watch_ids": np.arange(4)} | changes
    with pytest.raises(ValueError, match=message):
        curve_of(prepared, original, **arguments)


def test_a_task_without_an_error_has_no_curve(models):
    prepared, original, *_ = models
    with pytest.raises(ValueError, match=r"^task\.error: got None, expected a function"):
        curve_of(prepared._replace(task=prepared.task._replace(error=None)), original, np.arange(4), np.arange(4))


def test_curves_with_different_steps_are_not_compared():
    one, other = (Curve(np.array(steps), np.zeros(2)) for steps in ([0, 10], [0, 20]))
    with pytest.raises(ValueError, match=r"^retrained: got steps \[ 0 20\], expected those of curve, \[ 0 10\]"):
        area_between(one, other)


LINEAR = classification(lambda params, inputs: inputs @ params["kernel"] + params["bias"], num_classes=2)
PARAMS = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
NOTHING = {"kernel": np.zeros((3, 2), bool), "bias": np.zeros(2, bool)}
FIRST_ROW = NOTHING | {"kernel": np.array([[True, True], [False, False], [False, False]])}


def linear_examples(count=12):
    inputs = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)
    return Examples({"inputs": inputs, "labels": (inputs[:, 0] > 0).astype(int)}, np.arange(count))


def test_relearning_a_part_leaves_the_rest_unchanged_bit_for_bit():
    examples = linear_examples()
    found = relearn_part(LINEAR, PARAMS, FIRST_ROW, examples, steps=20, batch_size=8, learning_rate=0.1)
    jax.tree.map(
        lambda before, after, part: np.testing.assert_array_equal(before != after, part), PARAMS, found, FIRST_ROW
    )
    error = lambda params: np.mean(LINEAR.error(LINEAR.outputs(params, examples.tree, None), examples.tree))
    assert error(found) < error(PARAMS)
    again = relearn_part(LINEAR, PARAMS, FIRST_ROW, examples, steps=20, batch_size=8, learning_rate=0.1)
    chex.assert_trees_all_equal(found, again)
    other = relearn_part(LINEAR, PARAMS, FIRST_ROW, examples, steps=20, batch_size=8, learning_rate=0.1, seed=1)
    assert np.any(found["kernel"] != other["kernel"])


def test_models_that_are_compared_share_one_compiled_step():
    outputs = chex.assert_max_traces(LINEAR.outputs, n=1)
    task, examples = LINEAR._replace(outputs=outputs), linear_examples()
    for scale in (1.0, 2.0):
        params = jax.tree.map(lambda leaf, scale=scale: scale * leaf, PARAMS)
        relearn_part(task, params, FIRST_ROW, examples, steps=2, batch_size=4, learning_rate=0.1 * scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: got 0, expected an int of at least 1"),
        ({"batch_size": 0}, "batch_size: got 0, expected an int of at least 1"),
        ({"examples": linear_examples(0)}, "examples: got none, expected at least one"),
        ({"part": {"kernel": FIRST_ROW["kernel"]}}, r"part: got no leaf \['bias'\], expected the structure of params"),
        ({"part": {"kernel": True, "bias": True}}, r"part: leaf \['bias'\] has shape \(\), but \(2,\) in params"),
        ({"part": jax.tree.map(jnp.ones_like, PARAMS)}, "part: got float32, expected bools"),
        ({"part": NOTHING}, "part: got no True, expected at least one number that may change"),
    ],
)
def test_bad_arguments_of_relearning_a_part_are_named(change, message):
    options = {"part": FIRST_ROW, "examples": linear_examples(), "steps": 1, "batch_size": 4} | change
    with pytest.raises(ValueError, match=message):
        relearn_part(LINEAR, PARAMS, options.pop("part"), options.pop("examples"), **options)


@pytest.mark.parametrize("name", ["steps", "every", "batch_size"])
def test_fractional_counts_are_refused(name):
    both = Examples({"inputs": np.eye(2), "labels": np.arange(2)}, np.arange(2))
    task = classification(lambda w, x: x @ w, num_classes=2)
    with pytest.raises(ValueError, match=rf"^{name}: got 1\.5, expected an int of at least 1"):
        relearn(task, np.eye(2), both, both, **{"steps": 2, "every": 1, "batch_size": 2, name: 1.5})


class Source:
    """Gives batches for positions, as `unlearn` takes it too."""

    def __len__(self):
        return 2

    def __getitem__(self, positions):
        return {"inputs": np.eye(2)[positions], "labels": np.arange(2)[positions]}


def test_examples_may_be_arrays_but_not_a_source():
    # BUG: "object has no attribute 'tree'", for both.
    task = classification(lambda w, x: x @ w, num_classes=2)
    params, both = jnp.zeros((2, 2)), {"inputs": np.eye(2), "labels": np.arange(2)}
    options = {"steps": 1, "batch_size": 2}
    curve = relearn(task, params, both, both, every=1, **options)
    assert curve.accuracy[-1] == 100.0
    relearned = relearn_part(task, params, jnp.ones((2, 2), bool), both, **options)
    assert bool(jnp.any(relearned != params))
    message = "got Source, expected a tree of arrays, or Examples of one"
    with pytest.raises(ValueError, match=f"^watch: {message}"):
        relearn(task, params, both, Source(), every=1, **options)
    with pytest.raises(ValueError, match=f"^examples: {message}"):
        relearn_part(task, params, jnp.ones((2, 2), bool), Source(), **options)


def test_each_step_has_its_own_key_and_the_seed_orders_the_examples():
    seen = []

    def outputs(params, batch, key):
        if key is not None:
            jax.debug.callback(
                lambda data, x: seen.append((data.tolist(), x.ravel().tolist())),
                jax.random.key_data(key),
                batch["inputs"],
            )
        return batch["inputs"] @ params

    task = classification(lambda w, x: x @ w, num_classes=2)._replace(outputs=outputs)
    examples = Examples({"inputs": np.arange(8.0)[:, None], "labels": np.arange(8) % 2}, np.arange(8))
    runs = []
    for seed in (0, 1):
        relearn(task, jnp.ones((1, 2)), examples, examples, steps=3, every=3, batch_size=2, seed=seed)
        jax.effects_barrier()
        runs.append(list(seen))
        seen.clear()
    keys, batches = ([[step[k] for step in run] for run in runs] for k in (0, 1))
    assert len({tuple(key) for key in keys[0] + keys[1]}) == 6
    assert batches[0] != batches[1]
