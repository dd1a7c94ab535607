"""Writes golden.json: what TorchJD makes of seeded problems, for `test_golden.py` to compare with.

Run where `torchjd[cagrad,nash_mtl,quadprog_projector]` is installed; this library need not be. Takes a minute:
`python tests/aggregators/make_golden.py`
"""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import torch
from torchjd import aggregation
from torchjd.linalg import QuadprogProjector

PACKAGES = ("torchjd", "torch", "numpy", "cvxpy", "clarabel", "ecos", "quadprog")

# Their projections add 1e-4 to the diagonal of the normalised Gram matrix by default; this is as little as works.
LEAST = QuadprogProjector(reg_eps=1e-12)

METHODS = {
    "mean": lambda k: aggregation.Mean(),
    "upgrad": lambda k: aggregation.UPGrad(projector=LEAST),
    "dualproj": lambda k: aggregation.DualProj(projector=LEAST),
    "pcgrad": lambda k: aggregation.PCGrad(),
    "cagrad": lambda k: aggregation.CAGrad(c=0.4),
    "mgda": lambda k: aggregation.MGDA(epsilon=1e-9, max_iters=20_000),
    "imtl_g": lambda k: aggregation.IMTLG(),
    "nash_mtl": lambda k: aggregation.NashMTL(k, max_norm=0.0, optim_niter=200),
    "aligned_mtl min": lambda k: aggregation.AlignedMTL(),
    "aligned_mtl median": lambda k: aggregation.AlignedMTL(scale_mode="median"),
    "aligned_mtl rmse": lambda k: aggregation.AlignedMTL(scale_mode="rmse"),
    "config": lambda k: aggregation.ConFIG(),
}


def problem(seed, k):
    """`(K, 8)` rows of lengths over two powers of ten, of which the first two conflict."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(k, 8))
    rows[1] -= 1.5 * rows[0]
    return rows * 10 ** rng.uniform(-1, 1, size=(k, 1))


def solves_its_problem(rows, direction):
    """Whether weights `a` of Nash-MTL obey `a * (G @ a) = const`; its linearised problems can stop short of it."""
    weights = np.linalg.lstsq(rows.T, direction, rcond=None)[0]
    products = weights * (rows @ direction)
    return np.ptp(products) < 1e-3 * products.mean()


def main():
    torch.set_default_dtype(torch.float64)
    # PCGrad draws the order of its projections; in the order of the rows they can be compared.
    torch.randperm = torch.arange
    problems = []
    for k in (2, 3, 5):
        for seed in range(3):
            rows = problem(seed, k)
            directions = {name: make(k)(torch.tensor(rows)).tolist() for name, make in METHODS.items()}
            if not solves_its_problem(rows, directions["nash_mtl"]):
                del directions["nash_mtl"]
            problems.append({"rows": rows.tolist(), "directions": directions})
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    text = json.dumps({"versions": versions, "problems": problems}, indent=None, separators=(",", ":"))
    (Path(__file__).parent / "golden.json").write_text(text.replace("},{", "},\n{") + "\n")


if __name__ == "__main__":
    main()
