"""Equal tuning: for every method a space of as many dimensions, the same points in it, and the same score."""

import numpy as np
from scipy.stats.qmc import Sobol

from eupmu_jax.benchmark.rows import select
from eupmu_jax.methods import Choice, Method

# The score of a trial that diverged: worse than any other can be.
DIVERGED = 100.0
# In place of the index of a trial: a method that needs no tuning, with its default settings.
UNTUNED = "untuned"


def point(index: int, dimensions: int) -> np.ndarray:
    """Point `index` of the scrambled Sobol sequence of seed 0, each coordinate in [0, 1)."""
    return Sobol(dimensions, rng=0).random_base2(index.bit_length())[index]


def settings(method: Method, index: int | str) -> dict:
    """The settings of a trial, at the same point of the cube for every method, so that none has better luck."""
    if isinstance(index, str):
        return {}
    return settings_at(method, point(index, len(method.space)))


def settings_at(method: Method, position: np.ndarray) -> dict:
    """The settings at a point of the unit cube, with one coordinate for each dimension of the method's space, in order.

    >>> from eupmu_jax.methods import METHODS
    >>> settings_at(METHODS["EUPMU budget"], np.array([0.0, 0.5, 0.5]))
    {'learning_rate': 0.0003, 'forget_objective': 'bounded_ascent', 'allowed_rise': 0.0316}
    """
    found = {}
    for (name, dimension), share in zip(method.space.items(), position, strict=True):
        if isinstance(dimension, Choice):
            found[name] = dimension.options[int(share * len(dimension.options))]
        else:
            value = dimension.low * (dimension.high / dimension.low) ** float(share)
            found[name] = float(f"{value:.3g}")
    return found


def blind_score(figures: dict, original: dict) -> float:
    """How far a model is from the original one's behaviour on unseen data, without using a retrained model.

    The mean of the distances of RA and VA to the original model's, and of UA to its error on held-out data, or to 100
    if a class is to be forgotten (methods that forget a class know that it should not be recognised). Without VA, TA
    on the test set takes its place.
    """
    known = "VA" if "VA" in original else "TA"
    unseen = 100.0 if "test_UA" in figures else 100 - original[known]
    targets = {"UA": unseen, "RA": original["RA"], known: original[known]}
    return float(np.mean([abs(figures[name] - target) for name, target in targets.items()]))


def trials_of(rows: list[dict], key: dict) -> list[dict]:
    """The rows with the fields of `key`, ordered by trial."""
    return sorted(select(rows, **key), key=lambda row: row["trial"])


def best(trials: list[dict], score: str) -> int:
    """The index of the trial with the lowest score; of equal ones the first."""
    return min(trials, key=lambda row: (row[score], row["trial"]))["trial"]
