"""Writes golden.json: the directions of TorchJD for seeded problems, which `test_golden.py` compares with.

Needs `torchjd[cagrad,nash_mtl,quadprog_projector]` but not this library, and takes a minute:
`python tests/aggregators/make_golden.py`
"""

import importlib.metadata
import json
from pathlib import Path

import numpy as np

PACKAGES = ("torchjd", "torch", "numpy", "cvxpy", "clarabel", "ecos", "quadprog")


def directions(rows):
    """The direction of each of TorchJD's aggregators, in float64."""
    # Import these here, since pytest imports every module for its doctests and should not need them.
    import torch
    from torchjd import aggregation
    from torchjd.linalg import QuadprogProjector

    torch.set_default_dtype(torch.float64)
    # PCGrad projects in random order; use the order of the rows, so that results can be compared.
    torch.randperm = torch.arange
    # By default 1e-4 is added to the diagonal of the normalised Gram matrix. This is the least that works.
    least = QuadprogProjector(reg_eps=1e-12)
    methods = {
        "mean": aggregation.Mean(),
        "upgrad": aggregation.UPGrad(projector=least),
        "dualproj": aggregation.DualProj(projector=least),
        "pcgrad": aggregation.PCGrad(),
        "cagrad": aggregation.CAGrad(c=0.4),
        "mgda": aggregation.MGDA(epsilon=1e-9, max_iters=20_000),
        "imtl_g": aggregation.IMTLG(),
        "nash_mtl": aggregation.NashMTL(len(rows), max_norm=0.0, optim_niter=200),
        "aligned_mtl min": aggregation.AlignedMTL(),
        "aligned_mtl median": aggregation.AlignedMTL(scale_mode="median"),
        "aligned_mtl rmse": aggregation.AlignedMTL(scale_mode="rmse"),
        "config": aggregation.ConFIG(),
    }
    return {name: method(torch.tensor(rows)).tolist() for name, method in methods.items()}


def problem(seed, k):
    """`(K, 8)` rows, the first two of which conflict, with lengths that span two powers of ten."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(k, 8))
    rows[1] -= 1.5 * rows[0]
    return rows * 10 ** rng.uniform(-1, 1, size=(k, 1))


def solves_its_problem(rows, direction):
    """Whether weights `a` of Nash-MTL satisfy `a * (G @ a) = const`; TorchJD's solver does not always converge."""
    weights = np.linalg.lstsq(rows.T, direction, rcond=None)[0]
    products = weights * (rows @ direction)
    return np.ptp(products) < 1e-3 * products.mean()


def main():
    problems = []
    for k in (2, 3, 5):
        for seed in range(3):
            rows = problem(seed, k)
            found = directions(rows)
            if not solves_its_problem(rows, found["nash_mtl"]):
                del found["nash_mtl"]
            problems.append({"rows": rows.tolist(), "directions": found})
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    text = json.dumps({"versions": versions, "problems": problems}, separators=(",", ":"))
    (Path(__file__).parent / "golden.json").write_text(text.replace("},{", "},\n{") + "\n")


if __name__ == "__main__":
    main()
