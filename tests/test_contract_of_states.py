"""The contract of states: counts of refused steps, serialisation, diagnostics, shapes and meshes, for every row."""

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import eupmu_jax as eupmu

from .test_contract import every_row, problem, surgeries


def is_counter(path):
    return getattr(path[-1], "name", None) in ("nonfinite_count", "refused_microbatches")


def counted(state):
    """The number of refused steps, summed over all counters."""
    return sum(int(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state) if is_counter(path))


def without_counters(state):
    return jax.tree_util.tree_map_with_path(lambda path, leaf: None if is_counter(path) else leaf, state)


@every_row
def test_a_nonfinite_step_changes_nothing_and_is_counted(row):
    k = row.num_objectives
    params, grads, losses = problem(k)
    tx = row.make()
    update = jax.jit(lambda grads, state, losses: tx.update(grads, state, params, losses=losses))
    _, state = update(grads, tx.init(params), losses)
    bad = [({**grads, "w": grads["w"].at[i].set(value)}, losses) for i in range(k) for value in (jnp.nan, jnp.inf)]
    bad += [(grads, losses.at[i].set(value)) for i in range(k) for value in (jnp.nan, -jnp.inf)]

    for bad_grads, bad_losses in bad:
        updates, refused = update(bad_grads, state, bad_losses)
        assert counted(refused) == counted(state) + 1
        if row.restores_all:
            chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
            chex.assert_trees_all_equal(without_counters(refused), without_counters(state))
        else:
            chex.assert_tree_all_finite((updates, refused))
            chex.assert_trees_all_equal(without_counters(surgeries(refused)), without_counters(surgeries(state)))


@pytest.mark.slow
@every_row
def test_diagnostics_are_found_by_name_and_the_state_survives_serialisation(row):
    params, grads, losses = problem(row.num_objectives)
    tx = row.make()
    update = jax.jit(lambda state: tx.update(grads, state, params, losses=losses))
    _, state = update(tx.init(params))
    for name, shape in row.fields.items():
        chex.assert_shape(optax.tree_utils.tree_get(state, name), shape)
    if "gram" in row.fields:
        assert jnp.all(jnp.diagonal(optax.tree_utils.tree_get(state, "gram")) > 0)
    if "multipliers" in row.fields:
        chex.assert_trees_all_equal(optax.tree_utils.tree_get(state, "multipliers"), eupmu.multipliers(state))
    leaves, structure = jax.tree.flatten(state)
    rebuilt = jax.tree.unflatten(structure, [np.asarray(leaf) for leaf in leaves])
    restored = flax.serialization.from_bytes(tx.init(params), flax.serialization.to_bytes(state))
    for copy in rebuilt, restored:
        chex.assert_trees_all_equal(update(copy), update(state))


@every_row
def test_init_needs_only_shapes(row):
    params, _, _ = problem(row.num_objectives)
    tx = row.make()
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, shapes), tx.init(params))


@every_row
def test_tree_map_params_leaves_the_surgery_alone(row):
    params, _, _ = problem(row.num_objectives)
    tx = row.make()
    state = tx.init(params)
    # BUG: the init of `freeze` did not tolerate the placeholder that optax.tree_map_params passes as params.
    mapped = optax.tree_utils.tree_map_params(tx, lambda leaf: leaf + 1, state)
    chex.assert_trees_all_equal(surgeries(mapped), surgeries(state))
    found = [pair for name in ("mu", "gradient_sum") for pair in optax.tree_utils.tree_get_all_with_path(mapped, name)]
    moments = [moment for path, moment in found if "memory" not in str(path)]  # Leaves out an aggregator's.
    chex.assert_trees_all_equal(moments, jax.tree.map(jnp.ones_like, moments))


def sharded(mesh, tree, *prefix):
    def place(leaf):
        spec = PartitionSpec(*prefix, *(("data",) if leaf.ndim > len(prefix) else ()))
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


@pytest.mark.slow
@every_row
def test_sharded_gradients_give_the_same_updates(row):
    params, grads, losses = problem(row.num_objectives)
    tx = row.make()

    def update(params, grads):
        return tx.update(grads, tx.init(params), params, losses=losses)

    expected = jax.jit(update)(params, grads)

    # Explicit axes, as `test_mesh` has the others. BUG: `accumulate` made its sums without the sharding of the
    # parameters, which an explicit mesh of more than one device refuses.
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        updates, state = jax.jit(update)(sharded(mesh, params), sharded(mesh, grads, None))
    chex.assert_trees_all_close((updates, state), expected, rtol=1e-6)
