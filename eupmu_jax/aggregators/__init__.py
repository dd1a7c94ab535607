"""Aggregators: other ways to combine the rows of a stacked tree, under the contract of `unilateral_surgery`."""

from eupmu_jax.aggregators.owa import OwaState, owa

__all__ = ["OwaState", "owa"]
