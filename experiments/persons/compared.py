"""How saved rows of persons compare with those of the original and the retrained model of their seed."""

import numpy as np

from eupmu_jax.benchmark import rows
from eupmu_jax.metrics.language import forget_quality
from experiments.persons.tune import KEPT


def first_seed(found: list[dict]) -> list[dict]:
    """The rows of the first seed."""
    return rows.select(found, seed=min(row["seed"] for row in found))


def rows_of(found: list[dict], key: tuple[str, str]) -> list[dict]:
    """The rows of a model with an objective."""
    return rows.select(found, model=key[0], objective=key[1])


def name_of(key: tuple[str, str]) -> str:
    """What tables and figures call a model with an objective."""
    return ", ".join(part.replace("_", " ") for part in key if part)


def reference(found: list[dict], row: dict, model: str) -> dict:
    """The row of a reference model under the seed of `row`."""
    return rows.select(found, model=model, seed=row["seed"])[0]


def quality_of(found: list[dict], row: dict) -> float:
    """log10 of the p-value of the hypothesis that its truth ratios are distributed as the retrained model's."""
    return forget_quality(row["truth_ratios"], reference(found, row, "retrained")["truth_ratios"]).log10


def utility_kept(found: list[dict], row: dict) -> float:
    """The share of the original model's utility that a model has."""
    return row["utility"] / reference(found, row, "original")["utility"]


def keeps_utility(found: list[dict], row: dict) -> bool:
    """Whether a model keeps utility within 1 % of the original model's."""
    return utility_kept(found, row) >= 1 - KEPT


def distance(found: list[dict], row: dict) -> float:
    """Mean distance from the retrained model of the five figures on forgotten persons, in points."""
    figures = lambda row: np.array(
        [*(row[name] for name in ("probability", "rouge", "extraction")), row["error"]["forget"]]
    )
    again = lambda row: row["relearned"]["after"]
    other = reference(found, row, "retrained")
    return np.mean([*100 * np.abs(figures(row) - figures(other)), abs(again(row) - again(other))])
