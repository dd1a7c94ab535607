"""Orbax checkpoints of parameters, with JSON metadata that identifies them and a digest that reveals damage."""

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
from eupmu_jax.training._faults import check_local, check_readable, is_passing, located
from eupmu_jax.training._inputs import check_storable

_DIGEST = "sha256"


class DamagedError(ValueError):
    """A checkpoint that cannot be read, or whose content differs from what was written."""


def save(directory: str | Path, params: chex.ArrayTree, meta: dict[str, Any]) -> None:
    """Writes `params` and `meta` to `directory`, replacing what is there; a killed process leaves the old or the new.

    `directory` is a path, or a string with a URL, such as gs://bucket/params.

    Raises:
      ValueError: For an empty leaf, which no checkpoint can hold, or a path that could not be read back.
      OSError: If it cannot be written, as on a full disk.

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
    try:
        with ocp.CheckpointManager(located(directory), options=options) as manager:
            step = (manager.latest_step() or 0) + 1
            saved = ocp.args.StandardSave(_tree(params))
            manager.save(step, args=ocp.args.Composite(params=saved, meta=ocp.args.JsonSave(meta)))
    except (OSError, ValueError) as error:
        # On a full disk Orbax raises either, and may not say where.
        reason = str(error).partition("\n")[0]
        raise OSError(f"directory: a checkpoint could not be written to {directory}: {reason}") from error


def load(
    directory: str | Path, like: chex.ArrayTree, meta: Mapping[str, Any] = MappingProxyType({})
) -> tuple[chex.ArrayTree, dict[str, Any]] | None:
    """Reads what `save` wrote if its metadata agrees with every entry of `meta`; else returns None.

    `eupmu unlearn --out RUN` writes its parameters to `RUN/params`; `load("RUN/params", params)[0]` reads them.

    Args:
      directory: Folder of the checkpoint, as for `save`; it need not exist.
      like: Parameters of the expected structure, shapes and dtypes.
      meta: Entries that the saved metadata must match.

    Returns:
      The parameters and the saved metadata, or None.

    Raises:
      ValueError: For a path from which no checkpoint can be read.
      DamagedError: For a checkpoint that cannot be read, whose parameters are not those that were saved, or that
        belongs to another model than `like`.
    """
    check_readable("directory", directory)
    if not (path := located(directory)).is_dir():
        return None
    try:
        with ocp.CheckpointManager(path) as manager:
            step = manager.latest_step()
            if step is None:
                return None
            saved = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            # JSON turns tuples into lists and keys into strings, so the expected entries take the same round trip.
            if any(saved.get(key) != value for key, value in json.loads(json.dumps(dict(meta))).items()):
                return None
            args = ocp.args.Composite(params=ocp.args.StandardRestore(_tree(like)))
            restored = manager.restore(step, args=args)["params"]
    except Exception as error:
        if is_passing(error):
            raise
        # Orbax and its file formats raise many kinds of error for truncated or changed files and for other models.
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
    """The checkpoint for this metadata; if it is missing or damaged, `make` is called and its result saved.

    Args:
      folder: Folder with a checkpoint for each metadata.
      like: Parameters of the expected structure, shapes and dtypes.
      meta: Everything that determines the result of `make`.
      make: Returns parameters, and further entries for the metadata.

    Returns:
      The parameters, and the metadata with these entries.
    """
    check_local("folder", folder)
    directory = folder / hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]
    try:
        found = load(directory, like, meta)
    except DamagedError as error:
        warnings.warn(f"{error}; it is computed again", stacklevel=2)
        shutil.rmtree(directory)
        found = None
    if found is None:
        params, more = make()
        found = params, meta | more
        save(directory, *found)
    return found


def _tree(params):
    """The parameters as Orbax saves them: a single array in a list, and NumPy scalars as arrays without an axis."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf, params)
    return [params] if jax.tree_util.all_leaves([params]) else params


def _message(directory, what):
    return (
        f"directory: got a checkpoint in {directory} {what}, expected an intact one of the same model; if it is of "
        "that model, delete the folder"
    )
