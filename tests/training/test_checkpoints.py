import chex
import jax
import jax.numpy as jnp

from eupmu_jax.training import checkpoints

PARAMS = {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16)}}
META = {"data": "digits", "recipe": [150, 64, 0.001]}


def test_what_is_saved_is_loaded(tmp_path):
    checkpoints.save(tmp_path / "model", PARAMS, META | {"seconds": 1.5})
    params, meta = checkpoints.load(tmp_path / "model", jax.tree.map(jnp.zeros_like, PARAMS), META)
    chex.assert_trees_all_equal(params, PARAMS)
    assert meta == META | {"seconds": 1.5}


def test_a_second_save_replaces_the_first(tmp_path):
    checkpoints.save(tmp_path, PARAMS, META)
    checkpoints.save(tmp_path, jax.tree.map(lambda leaf: 2 * leaf, PARAMS), META | {"data": "other"})
    assert checkpoints.load(tmp_path, PARAMS, META) is None
    params, _ = checkpoints.load(tmp_path, PARAMS, {"data": "other"})
    chex.assert_trees_all_equal(params["dense"]["kernel"], 2 * PARAMS["dense"]["kernel"])


def test_nothing_is_loaded_where_nothing_fits(tmp_path):
    assert checkpoints.load(tmp_path / "absent", PARAMS, META) is None
    checkpoints.save(tmp_path / "model", PARAMS, META)
    assert checkpoints.load(tmp_path / "model", PARAMS, META | {"recipe": [1, 64, 0.001]}) is None
