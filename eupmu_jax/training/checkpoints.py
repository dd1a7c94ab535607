"""Orbax checkpoints of parameters, with the JSON that says what they are and a digest that tells a damaged one."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp

from eupmu_jax.training._digest import digest
from eupmu_jax.training._faults import check_readable, is_passing
from eupmu_jax.training._inputs import check_storable

_DIGEST = "sha256"


class DamagedError(ValueError):
    """A checkpoint that cannot be read, or that is not what was written."""


def save(directory: str | Path, params: chex.ArrayTree, meta: dict[str, Any]) -> None:
    """Writes `params` and `meta` to `directory`, replacing what is there; a kill leaves the old or the new.

    Raises:
      ValueError: For a leaf without a number, which no checkpoint can hold, or a folder that could not be read again.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, {"w": np.ones(2)}, {"seed": 0})
    ...     params, meta = load(folder, {"w": np.zeros(2)}, {"seed": 0})
    >>> params["w"].tolist(), meta["seed"]
    ([1.0, 1.0], 0)
    """
    check_readable("directory", directory)
    check_storable(params)
    meta = meta | {_DIGEST: digest(params)}
    options = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
    with ocp.CheckpointManager(Path(directory).absolute(), options=options) as manager:
        step = (manager.latest_step() or 0) + 1
        saved = ocp.args.StandardSave(_tree(params))
        manager.save(step, args=ocp.args.Composite(params=saved, meta=ocp.args.JsonSave(meta)))


def load(
    directory: str | Path, like: chex.ArrayTree, meta: Mapping[str, Any] = MappingProxyType({})
) -> tuple[chex.ArrayTree, dict[str, Any]] | None:
    """Reads what `save` wrote, if its metadata agrees with every entry of `meta`; else None.

    The parameters of `eupmu unlearn --out RUN` are in `RUN/params`, so that `load("RUN/params", params)[0]` is they.

    Args:
      directory: Where the checkpoint lies, or not.
      like: Parameters of the expected structure, shapes and dtypes.
      meta: Entries that must be equal for the checkpoint to be the wanted one.

    Returns:
      The parameters and the saved metadata, or None.

    Raises:
      DamagedError: For a checkpoint that cannot be read, or whose parameters are not those that were saved; also for
        one of another model than `like`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return None
    try:
        with ocp.CheckpointManager(directory.absolute()) as manager:
            step = manager.latest_step()
            if step is None:
                return None
            saved = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            # JSON turns tuples into lists and keys into strings; compare what it would make of the wanted entries.
            if any(saved.get(key) != value for key, value in json.loads(json.dumps(dict(meta))).items()):
                return None
            args = ocp.args.Composite(params=ocp.args.StandardRestore(_tree(like)))
            restored = manager.restore(step, args=args)["params"]
    except Exception as error:
        if is_passing(error):
            raise
        # Whatever Orbax and its file formats raise for files that are cut off or changed, or of another model.
        raise DamagedError(_message(directory, "that cannot be read")) from error
    params = restored[0] if jax.tree_util.all_leaves([like]) else restored
    if saved.pop(_DIGEST, None) != digest(params):
        raise DamagedError(_message(directory, "whose parameters are not those that were saved"))
    return params, saved


def cached(
    folder: Path,
    like: chex.ArrayTree,
    meta: dict[str, Any],
    make: Callable[[], tuple[chex.ArrayTree, dict[str, Any]]],
) -> tuple[chex.ArrayTree, dict[str, Any]]:
    """What `make` returned when it was called for this metadata; it is called if that is not in the folder, or damaged.

    Args:
      folder: Has a checkpoint for each metadata.
      like: Parameters of the expected structure, shapes and dtypes.
      meta: All that decides what is made.
      make: Returns parameters, and more entries for the metadata.

    Returns:
      The parameters and the metadata with these entries.
    """
    directory = folder / hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]
    try:
        found = load(directory, like, meta)
    except DamagedError as error:
        warnings.warn(f"{error}; it is made again", stacklevel=2)
        shutil.rmtree(directory)
        found = None
    if found is None:
        params, more = make()
        found = params, meta | more
        save(directory, *found)
    return found


def _tree(params):
    """The parameters as Orbax saves them: one array in a list, and scalars of NumPy as arrays without an axis."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf, params)
    return [params] if jax.tree_util.all_leaves([params]) else params


def _message(directory, what):
    return (
        f"directory: got a checkpoint in {directory} {what}, expected a whole one, of the same model; if it is that, "
        "delete the folder"
    )
