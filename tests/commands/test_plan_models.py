"""Models that `eupmu plan` compiles: published sizes, losses that can be traced, and meshes that do not fit."""

import chex
import jax
import pytest
from jax.sharding import AbstractMesh

from eupmu_jax.commands import plan_models
from eupmu_jax.sharding import make_mesh


@pytest.mark.parametrize(
    ("model", "parameters", "examples"),
    [
        ("tiny", 361_088, "sequences of 16 tokens"),
        pytest.param("ddpm-cifar10", 26_871_427, "images of 32 x 32 pixels", marks=pytest.mark.slow),
        # The published number of parameters.
        pytest.param("stable-diffusion", 859_520_964, "latent images of 512 x 512 pixels", marks=pytest.mark.long),
    ],
)
def test_every_model_has_its_size_and_a_differentiable_loss(model, parameters, examples):
    planned = plan_models.planned(model, make_mesh(1, 1), batch=2, sequence=16)
    assert sum(leaf.size for leaf in jax.tree.leaves(planned.params)) == parameters
    assert planned.examples == examples
    gradient = jax.eval_shape(jax.grad(planned.loss), planned.params, planned.batch, planned.fixed)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, planned.params)
    assert jax.tree.structure(planned.shardings) == jax.tree.structure(planned.params)


def test_adapters_are_the_only_parameters_and_are_sharded_like_the_matrices_they_adapt():
    mesh = make_mesh(1, 1)
    whole = plan_models.planned("tiny", mesh, batch=2, sequence=16)
    planned = plan_models.planned("tiny", mesh, batch=2, sequence=16, adapters=3)
    sizes = [(128, 128), (128, 64), (128, 64), (128, 128), (128, 256), (128, 256), (256, 128)]
    expected = 2 * sum(3 * (inputs + outputs) for inputs, outputs in sizes)
    assert sum(leaf.size for leaf in jax.tree.leaves(planned.params)) == expected
    assert sorted(leaf.size for leaf in jax.tree.leaves(planned.fixed)) == sorted(
        leaf.size for leaf in jax.tree.leaves(whole.params)
    )
    down = planned.shardings["blocks"]["down"]["lora"]
    assert (tuple(down["lora_a"].spec), tuple(down["lora_b"].spec)) == ((None, "model", None), (None, None, "data"))
    gradient = jax.eval_shape(jax.grad(planned.loss), planned.params, planned.batch, planned.fixed)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, planned.params)


def test_a_batch_that_the_devices_cannot_divide_is_named():
    mesh = AbstractMesh((4, 1), ("data", "model"))
    with pytest.raises(ValueError, match="batch: got 6 on a mesh of data 4 x tensor 1, expected a multiple of data"):
        plan_models.planned("ddpm-cifar10", mesh, batch=6, sequence=16)
    with pytest.raises(ValueError, match="model: got 'dit', expected one of tiny, 135m, 1b, 7b, 8b, 70b, ddpm-cifar10"):
        plan_models.planned("dit", mesh, batch=4, sequence=16)


def test_sequences_that_overflow_in_the_compiler_are_named():
    # BUG: the compiler aborted the process.
    message = r"batch, sequence: got 1000000 and 1000000, whose attention scores take 3.2e\+19 bytes; expected at most"
    with pytest.raises(ValueError, match=message):
        plan_models.planned("tiny", make_mesh(1, 1), batch=10**6, sequence=10**6)
