"""Problems with BatchNorm models and augmented images, and the number of steps that fit the pass budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupmu_jax import data
from eupmu_jax.benchmark import problems
from eupmu_jax.methods.passes import affordable_steps
from eupmu_jax.objectives import cross_entropy
from eupmu_jax.tasks import Examples, classification
from eupmu_jax.training import fitting
from eupmu_jax.training.unlearning import unlearn

SHORT = problems.Recipe(1, 32, 1e-3)


@pytest.fixture(scope="module")
def colour():
    """A model with BatchNorm and a few augmented images in the shape of CIFAR-10's."""
    rng = np.random.default_rng(0)
    images, labels = rng.random((96, 32, 32, 3), np.float32), rng.integers(0, 10, 96, np.int32)
    dataset = data.Dataset("cifar10", images[:64], labels[:64], images[64:], labels[64:], 10)
    return problems.make("cifar10", "random:25%", 0, model="resnet8", recipe=SHORT, dataset=dataset, augment=True)


@pytest.mark.slow
def test_training_statistics_are_folded_into_the_model_to_be_unlearned(colour, tmp_path):
    everything, pure, images = np.arange(64), colour.functions, colour.tree["inputs"]

    def loss(params, statistics, batch, key):
        logits, statistics = pure.forward(params, statistics, data.augment(key, batch["inputs"]), True)
        return cross_entropy(logits, batch["labels"]), statistics

    start, examples = pure.initial(jax.random.key(0)), Examples(colour.tree, everything)
    fitted = fitting.fit(loss, *start, examples, **SHORT._asdict(), seed=0)
    model = problems.train(colour, everything, init_seed=0, cache=tmp_path, on_step=lambda: None)
    expected, _ = pure.forward(fitted.params, fitted.statistics, images, False)
    np.testing.assert_allclose(pure.apply(model.params, images), expected, rtol=1e-4, atol=1e-4)
    untrained, _ = pure.forward(*start, images, False)
    folded = pure.apply(pure.fresh_params(jax.random.key(0)), images)
    np.testing.assert_allclose(folded, untrained, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_augmentation_affects_training_unlearning_and_the_cache_key(colour, tmp_path):
    plain = colour._replace(augment=False, task=classification(colour.functions.apply, num_classes=10))
    everything = np.arange(64)
    models = [
        problems.train(each, everything, init_seed=0, cache=tmp_path, on_step=lambda: None).params
        for each in (colour, plain, colour)
    ]
    differ = lambda a, b: any(np.any(x != y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    assert differ(models[0], models[1])
    assert not differ(models[0], models[2])
    settings = {"learning_rate": 0.01, "forget_objective": "bounded_ascent", "retain_weight": 1.0}
    options = {"steps": 2, "settings": settings, "forget_batch": 8, "retain_batch": 8, "probes": 0}
    runs = [
        unlearn("weighted sum", each.task, models[0], each.forget, each.retain, **options).params
        for each in (colour, plain)
    ]
    assert differ(*runs)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(runs[0]))


def test_as_many_steps_are_taken_as_fit_the_pass_budget():
    prepared = problems.make("digits", "random:10%", 0)
    forgotten, retained = len(prepared.forget), len(prepared.retain)

    def steps(method, **settings):
        settings = {"learning_rate": 0.1, "forget_objective": "bounded_ascent"} | settings
        return affordable_steps(method, settings, prepared.task, (forgotten, retained), 60, (16, 48))

    assert steps("EUPMU next-batch", multiplier_learning_rate=1.0) == 60
    # 1F 1B on 16 forget and 2F 1B on 48 retain examples, in units of a forward pass; a backward pass counts two.
    assert steps("EUPMU implicit", multiplier_learning_rate=1.0) == 60 * 3 * 64 // (3 * 16 + 4 * 48)
    assert steps("fine-tuning") == 60
    assert steps("SalUn", mask_fraction=0.5) == (60 * 3 * 64 - 3 * forgotten) // (3 * 64)


def test_the_error_for_an_unknown_model_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"^model: got 'vgg', expected one of mlp for digits"):
        problems.make("digits", "class:3", 0, model="vgg")
