"""Aggregators: other ways to combine the rows of a stacked tree, under the contract of `unilateral_surgery`."""

from eupmu_jax.aggregators.dualproj import dualproj
from eupmu_jax.aggregators.mean import mean
from eupmu_jax.aggregators.owa import OwaState, owa
from eupmu_jax.aggregators.upgrad import upgrad
from eupmu_jax.aggregators.weighting import WeightingState

__all__ = ["OwaState", "WeightingState", "dualproj", "mean", "owa", "upgrad"]
