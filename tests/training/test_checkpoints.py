import errno
import os
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from eupmu_jax.benchmark import problems
from eupmu_jax.training import checkpoints

PARAMS = {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16)}}
META = {"data": "digits", "recipe": [150, 64, 0.001]}


@pytest.mark.parametrize("saved", [PARAMS, jnp.arange(3.0), (jnp.ones(2), jnp.zeros(1))])
def test_what_is_saved_can_be_loaded(saved, tmp_path):
    checkpoints.save(tmp_path / "model", saved, META | {"seconds": 1.5})
    params, meta = checkpoints.load(tmp_path / "model", jax.tree.map(jnp.zeros_like, saved), META)
    chex.assert_trees_all_equal(params, saved)
    assert meta == META | {"seconds": 1.5}


def test_a_second_save_replaces_the_first(tmp_path):
    checkpoints.save(tmp_path, PARAMS, META)
    checkpoints.save(tmp_path, jax.tree.map(lambda leaf: 2 * leaf, PARAMS), META | {"data": "other"})
    assert checkpoints.load(tmp_path, PARAMS, META) is None
    params, _ = checkpoints.load(tmp_path, PARAMS, {"data": "other"})
    chex.assert_trees_all_equal(params["dense"]["kernel"], 2 * PARAMS["dense"]["kernel"])


def test_the_remains_of_a_killed_save_are_removed_silently(tmp_path, caplog):
    half = tmp_path / "model" / "1.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    assert checkpoints.load(tmp_path / "model", PARAMS, META) is None
    checkpoints.save(tmp_path / "model", PARAMS, META)
    chex.assert_trees_all_equal(checkpoints.load(tmp_path / "model", PARAMS, META)[0], PARAMS)
    assert not half.exists()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_nothing_is_loaded_where_no_checkpoint_matches(tmp_path):
    assert checkpoints.load(tmp_path / "absent", PARAMS, META) is None
    checkpoints.save(tmp_path / "model", PARAMS, META)
    assert checkpoints.load(tmp_path / "model", PARAMS, META | {"recipe": [1, 64, 0.001]}) is None


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def test_a_flipped_bit_never_changes_the_parameters_undetected(tmp_path):
    checkpoints.save(tmp_path / "model", PARAMS, META)
    rng, noticed = np.random.default_rng(0), 0
    for index in range(12):
        copy = tmp_path / f"copy{index}"
        shutil.copytree(tmp_path / "model", copy)
        found = files(copy)
        path = found[rng.integers(len(found))]
        content = bytearray(path.read_bytes())
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            loaded = checkpoints.load(copy, PARAMS, META)
        except checkpoints.DamagedError:
            loaded = None
        noticed += loaded is None
        if loaded is not None:
            chex.assert_trees_all_equal(loaded[0], PARAMS)
    assert noticed > 0


@pytest.mark.parametrize("keep", [0, 10])
def test_the_error_for_a_truncated_checkpoint_names_its_folder(keep, tmp_path):
    checkpoints.save(tmp_path / "model", PARAMS, META)
    largest = max(files(tmp_path / "model"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:keep])
    with pytest.raises(checkpoints.DamagedError, match=r"directory: got a checkpoint in .*model .* delete the folder"):
        checkpoints.load(tmp_path / "model", PARAMS, META)


def test_a_damaged_model_in_the_cache_is_trained_again(tmp_path):
    prepared = problems.make("digits", "random:10%", 0, recipe=problems.Recipe(1, 64, 1e-3))
    train = lambda: problems.train(prepared, np.arange(200), init_seed=0, cache=tmp_path, on_step=lambda: None)
    whole = train()
    largest = max(files(tmp_path), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.warns(UserWarning, match="it is computed again"):
        again = train()
    chex.assert_trees_all_equal(again.params, whole.params)


def test_a_folder_that_could_not_be_read_back_is_refused(tmp_path):
    # BUG: Orbax took the brackets for a pattern and silently wrote parameters that could not be read back.
    with pytest.raises(ValueError, match=r"^directory: got .*req\[17\], expected a path without any of"):
        checkpoints.save(tmp_path / "req[17]", {"w": np.ones(2)}, {})
    assert not (tmp_path / "req[17]").exists()


def test_a_full_disk_names_the_folder_and_keeps_what_was_there(tmp_path, monkeypatch):
    # BUG: the error was only "[Errno 28] No space left on device".
    checkpoints.save(tmp_path / "run", PARAMS, META)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(OSError, match=r"^directory: a checkpoint could not be written to .*/run: .*No space left"):
        checkpoints.save(tmp_path / "run", PARAMS, META)
    assert checkpoints.load(tmp_path / "run", PARAMS) is not None


def test_a_folder_that_is_no_path_is_refused():
    with pytest.raises(ValueError, match=r"^directory: got 3, expected a path"):
        checkpoints.save(3, {"w": np.ones(2)}, {})


def test_scalars_are_restored_and_leaves_that_no_checkpoint_can_hold_are_named(tmp_path):
    # BUG: a NumPy scalar was written, and the checkpoint then reported as damaged.
    params = {"w": np.ones(2, np.float32), "s": np.float32(1.5)}
    checkpoints.save(tmp_path / "run", params, {})
    assert float(checkpoints.load(tmp_path / "run", params)[0]["s"]) == 1.5
    with pytest.raises(ValueError, match=r"which no checkpoint can hold"):
        checkpoints.save(tmp_path / "empty", {"w": np.ones((0, 2))}, {})


def test_the_order_of_the_metadata_does_not_matter(tmp_path):
    made = []
    make = lambda: (made.append(1) or PARAMS, {})
    for meta in ({"a": 1, "b": 2}, {"b": 2, "a": 1}):
        checkpoints.cached(tmp_path, PARAMS, meta, make)
    assert len(made) == 1


def test_too_many_open_files_do_not_delete_a_cached_model(tmp_path, monkeypatch):
    checkpoints.cached(tmp_path, PARAMS, META, lambda: (PARAMS, {}))
    (folder,) = tmp_path.iterdir()

    def full(*args, **kwargs):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "restore", full)
    with pytest.raises(OSError, match="Too many open files"):
        checkpoints.cached(tmp_path, PARAMS, META, lambda: (PARAMS, {}))
    assert folder.exists()
