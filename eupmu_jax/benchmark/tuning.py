"""Equal tuning: for every method the same points of a cube, in as many dimensions, judged by the same score."""

from pathlib import Path

import numpy as np
from scipy.stats.qmc import Sobol

from eupmu_jax.methods import Choice, LogUniform, Method

# The score of a trial whose parameters are not finite: worse than any other can be.
DIVERGED = 100.0


def distributions(method: Method) -> dict:
    """The method's space for Optuna."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    def convert(dimension: LogUniform | Choice):
        if isinstance(dimension, Choice):
            return CategoricalDistribution(dimension.options)
        return FloatDistribution(*dimension, log=True)

    return {name: convert(dimension) for name, dimension in method.space.items()}


def point(index: int, dimensions: int) -> np.ndarray:
    """That point of the scrambled Sobol sequence of seed 0, each coordinate in [0, 1)."""
    return Sobol(dimensions, rng=0).random_base2(index.bit_length())[index]


def settings_at(method: Method, position: np.ndarray) -> dict:
    """Settings at a point of the unit cube, one coordinate for each dimension of the method's space in its order.

    >>> from eupmu_jax.methods import METHODS
    >>> settings_at(METHODS["EUPMU budget"], np.array([0.0, 0.5, 0.5]))
    {'learning_rate': 0.0003, 'forget_objective': 'bounded_ascent', 'allowed_rise': 0.0316}
    """
    settings = {}
    for (name, dimension), share in zip(method.space.items(), position, strict=True):
        if isinstance(dimension, Choice):
            settings[name] = dimension.options[int(share * len(dimension.options))]
        else:
            value = dimension.low * (dimension.high / dimension.low) ** float(share)
            settings[name] = float(f"{value:.3g}")
    return settings


def blind_score(figures: dict, original: dict) -> float:
    """How far a model is from what the original one shows on data it never saw; no retrained model is asked.

    The mean of the distances of RA and TA to the original model's, and of UA to its test error, or to 100 if a class
    is to go (methods that are told to forget a class know that it should not be recognised).
    """
    unseen = 100.0 if "test_UA" in figures else 100 - original["TA"]
    targets = {"UA": unseen, "RA": original["RA"], "TA": original["TA"]}
    return float(np.mean([abs(figures[name] - target) for name, target in targets.items()]))


def create(storage: Path) -> None:
    """Makes the file of the studies, which two processes cannot do at once."""
    import optuna

    optuna.storages.RDBStorage(_address(storage))


def _address(storage):
    return f"sqlite:///{storage.absolute()}?timeout=60"


class Study:
    """The trials of one method on one problem, in an SQLite file that a kill cannot spoil.

    Its settings are `settings_at` the points of a scrambled Sobol sequence, the same for every method, so that none
    has more luck than another, and a study which was stopped goes on as if it had not been.
    """

    def __init__(self, storage: Path, name: str, method: Method):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna, self._method, self._space = optuna, method, distributions(method)
        self._study = optuna.create_study(study_name=name, storage=_address(storage), load_if_exists=True)
        self._told = {trial.user_attrs["index"] for trial in self._study.get_trials(deepcopy=False)}

    def settings(self, index: int) -> dict:
        """The settings of a trial, the same whenever it is asked for."""
        return settings_at(self._method, point(index, len(self._space)))

    def tell(self, index: int, settings: dict, score: float) -> None:
        """Records a trial, unless it is recorded."""
        if index in self._told:
            return
        self._study.add_trial(
            self._optuna.trial.create_trial(
                params=settings, distributions=self._space, value=score, user_attrs={"index": index}
            )
        )
        self._told.add(index)


def trials_of(rows: list[dict], key: dict) -> list[dict]:
    """The rows with the fields of `key`, by their number."""
    found = [row for row in rows if all(row.get(name) == value for name, value in key.items())]
    return sorted(found, key=lambda row: row["trial"])


def best(trials: list[dict], score: str) -> int:
    """Number of the trial with the lowest score; of equal ones the first."""
    return min(trials, key=lambda row: (row[score], row["trial"]))["trial"]
