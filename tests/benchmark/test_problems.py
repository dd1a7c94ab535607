"""Tasks whose models have BatchNorm and whose images are augmented; steps that are paid for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupmu_jax import data
from eupmu_jax.benchmark import problems
from eupmu_jax.training import fitting
from eupmu_jax.training.unlearning import Plan, affordable_steps, run_method

SHORT = problems.Recipe(1, 32, 1e-3)


@pytest.fixture(scope="module")
def colour():
    """A model with BatchNorm and a few images in the shape of CIFAR-10's, which are augmented."""
    rng = np.random.default_rng(0)
    images, labels = rng.random((96, 32, 32, 3), np.float32), rng.integers(0, 10, 96, np.int32)
    dataset = data.Dataset("cifar10", images[:64], labels[:64], images[64:], labels[64:], 10)
    return problems.make("cifar10", "random:25%", 0, model="resnet8", recipe=SHORT, dataset=dataset, augment=True)


def test_statistics_of_training_are_folded_into_what_is_unlearned(colour, tmp_path):
    everything = np.arange(len(colour.labels))
    arguments = colour.forward, *colour.initial(jax.random.key(0)), colour.images, colour.labels, everything
    fitted = fitting.fit(*arguments, **SHORT._asdict(), seed=0, augment=True)
    model = problems.train(colour, everything, init_seed=0, cache=tmp_path, on_step=lambda: None)
    expected, _ = colour.forward(fitted.params, fitted.batch_stats, colour.images, False)
    np.testing.assert_allclose(colour.apply(model.params, colour.images), expected, rtol=1e-4, atol=1e-4)
    untrained, _ = colour.forward(*colour.initial(jax.random.key(0)), colour.images, False)
    folded = colour.apply(colour.fresh_params(jax.random.key(0)), colour.images)
    np.testing.assert_allclose(folded, untrained, rtol=1e-4, atol=1e-4)


def test_augmentation_changes_training_and_unlearning_and_the_cache_knows(colour, tmp_path):
    plain = colour._replace(augment=False)
    everything = np.arange(len(colour.labels))
    models = [
        problems.train(each, everything, init_seed=0, cache=tmp_path, on_step=lambda: None).params
        for each in (colour, plain, colour)
    ]
    differ = lambda a, b: any(np.any(x != y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    assert differ(models[0], models[1])
    assert not differ(models[0], models[2])
    settings = {"learning_rate": 0.01, "forget_objective": "bounded_ascent", "retain_weight": 1.0, "optimizer": "adam"}
    plan = Plan(2, 8, 8, probes=0)
    runs = [run_method("weighted sum", settings, plan, each, models[0], seed=0).params for each in (colour, plain)]
    assert differ(*runs)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(runs[0]))


def test_steps_are_as_many_as_the_passes_of_plain_ones_pay_for():
    prepared = problems.make("digits", "random:10%", 0)
    plan = Plan(steps=60, forget_batch=16, retain_batch=48)
    settings = {"learning_rate": 0.1, "forget_objective": "bounded_ascent", "multiplier_learning_rate": 1.0}
    assert affordable_steps("EUPMU next-batch", settings, plan, prepared) == 60
    # 1F 1B of 16 forget and 2F 1B of 48 retain examples, in units of a forward pass; a backward pass is two.
    assert affordable_steps("EUPMU implicit", settings, plan, prepared) == 60 * 3 * 64 // (3 * 16 + 4 * 48)
    assert affordable_steps("fine-tuning", {"learning_rate": 0.1}, plan, prepared) == 60
    mask = settings | {"mask_fraction": 0.5}
    forgotten = len(prepared.split.forget_ids)
    assert affordable_steps("SalUn", mask, plan, prepared) == (60 * 3 * 64 - 3 * forgotten) // (3 * 64)


def test_an_unknown_model_lists_the_known():
    with pytest.raises(ValueError, match=r"^model: got 'vgg', expected one of mlp for digits"):
        problems.make("digits", "class:3", 0, model="vgg")
