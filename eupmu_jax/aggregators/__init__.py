"""Aggregators: other ways to combine the rows of a stacked tree, under the contract of `unilateral_surgery`."""

from eupmu_jax.aggregators._weighting import LossWeightingState, WeightingState
from eupmu_jax.aggregators.aligned_mtl import aligned_mtl
from eupmu_jax.aggregators.cagrad import cagrad
from eupmu_jax.aggregators.chebyshev import chebyshev
from eupmu_jax.aggregators.config import config
from eupmu_jax.aggregators.dualproj import dualproj
from eupmu_jax.aggregators.famo import FamoMemory, famo
from eupmu_jax.aggregators.gdr_gma import gdr_gma
from eupmu_jax.aggregators.imtl_g import imtl_g
from eupmu_jax.aggregators.mean import mean
from eupmu_jax.aggregators.mgda import mgda
from eupmu_jax.aggregators.nash_mtl import nash_mtl
from eupmu_jax.aggregators.ngdiff import ngdiff
from eupmu_jax.aggregators.omd_tch import OmdTchMemory, omd_tch
from eupmu_jax.aggregators.owa import OwaState, owa
from eupmu_jax.aggregators.pcgrad import pcgrad
from eupmu_jax.aggregators.upgrad import upgrad

__all__ = [
    "FamoMemory",
    "LossWeightingState",
    "OmdTchMemory",
    "OwaState",
    "WeightingState",
    "aligned_mtl",
    "cagrad",
    "chebyshev",
    "config",
    "dualproj",
    "famo",
    "gdr_gma",
    "imtl_g",
    "mean",
    "mgda",
    "nash_mtl",
    "ngdiff",
    "omd_tch",
    "owa",
    "pcgrad",
    "upgrad",
]
