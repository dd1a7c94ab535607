"""The exact reference for a run: a model trained by the user's own function without the forget set."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax.service import records, user_file
from eupmu_jax.service.deletion import as_given
from eupmu_jax.service.folder import forgotten_by
from eupmu_jax.tasks import as_examples
from eupmu_jax.training import checkpoints
from eupmu_jax.training._alone import alone

RETRAINED = "retrained"


def retrain(own: Mapping[str, Any], out: Path) -> None:
    """Trains the exact reference for a finished run with the user's own `retrain(positions)`, unless already done.

    Args:
      own: The result of `user_file.load`, with `data`, `params` and `retrain`: a function of the positions that are
        still retained, `(n,)` int64, which returns parameters trained on these alone.
      out: Folder of the run.

    Raises:
      ValueError: For a folder without a finished run on these data or one that another process is using, or for
        retrained parameters that are not finite or differ from `params` in structure.
    """
    asked, data = records.read(out / "asked.json", "asked"), as_examples("data", own["data"])
    if retrained_of(out, own["params"], asked) is not None:
        return
    if asked["data"] != user_file.data_digest(data):
        raise ValueError(f"out: {out} is a run on other data than the file's, expected a run on the file's data")
    with alone(out):
        # Checked again, as another process may have been first.
        if retrained_of(out, own["params"], asked) is None:
            checkpoints.save(out / RETRAINED, _retrained(own, out), {"asked": asked})


def _retrained(own, out):
    data = as_examples("data", own["data"])
    params = own["retrain"](np.setdiff1d(np.arange(len(data)), forgotten_by(out)))
    found, wanted = (jax.tree.map(lambda leaf: np.shape(leaf), tree) for tree in (params, own["params"]))
    if str(found) != str(wanted):
        raise ValueError(f"retrain: got parameters of shapes {found}, expected those of `params`, {wanted}")
    params = jax.tree.map(as_given, jax.tree.map(np.asarray, params), own["params"])
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.inexact)):
        raise ValueError("retrain: got parameters that are not finite, expected those of a trained model")
    return params


def check(own: Mapping[str, Any]) -> None:
    """Raises `ValueError` if `retrain` cannot be called with positions."""
    try:
        inspect.signature(own["retrain"]).bind(np.arange(1))
    except TypeError as error:
        raise ValueError(
            f"retrain: cannot be called with positions ({error}), expected a function of the positions to train on"
        ) from None


def is_made(out: Path) -> bool:
    """Whether the folder of a run has retrained parameters; what a killed process left half written does not count."""
    return any(step.name.isdigit() for step in (out / RETRAINED).glob("*"))


def retrained_of(out: Path, like: chex.ArrayTree, asked: dict) -> chex.ArrayTree | None:
    """The parameters that `retrain` saved for the run; None if there are none."""
    found = checkpoints.load(out / RETRAINED, like, {"asked": asked})
    return None if found is None else found[0]
