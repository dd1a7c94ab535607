"""The page of diffusion: figures of each model and what attacks bring back, from `rows.jsonl`; and pictures of samples."""

from pathlib import Path

import numpy as np

from eupmu_jax.benchmark import rows, tuning
from experiments import parts

ROWS, SAMPLES = (Path(__file__).with_name(name) for name in ("rows.jsonl", "samples.npz"))
REFERENCES = ("original", "retrained", "copied row")
FIGURES = {"UA": 1, "RA": 1, "FD": 2, "rise": 4, "forget_loss": 3, "share_of_retraining": 1}
# A model's samples are as those of the retrained one for the forgotten class, and the others have not suffered.
UA_POINTS, RA_POINTS = 2.0, 1.0


def blocks() -> dict[str, str]:
    """Tables of figures, of attacks, and of how often a method's trials reach what the retrained model shows."""
    found = rows.read(ROWS)
    models = list(dict.fromkeys((row["model"], row["trial"]) for row in found))
    of = {key: rows.select(found, model=key[0], trial=key[1]) for key in models}
    shown = [key for key in models if key[0] in REFERENCES or key[1] == tuning.UNTUNED]
    best = [
        (method, _best(found, method)) for method in dict.fromkeys(row["model"] for row in found if row["trial"] != "")
    ]
    shown += [key for key in best if key not in shown]
    figures = [[_name(key), *(_mean(of[key], name, digits) for name, digits in FIGURES.items())] for key in shown]
    head = ["UA", "RA", "FD", "rise", "forget loss", "% of retraining"]
    attacks = list(found[0]["attacks"])
    attacked = [
        [_name(key), *(f"{np.mean([row['attacks'][name] for row in of[key]]):.1f}" for name in attacks)]
        for key in shown
    ]
    methods = dict.fromkeys(row["model"] for row in found if row["model"] not in REFERENCES)
    shares = [[method, *_shares(found, method)] for method in methods]
    shares_head = ["runs", "UA as retrained", "and RA as original", "median rise", "most", "UA after relearning"]
    return {
        "diffusion": parts.table(["", *head], figures),
        "diffusion attacks": parts.table(["", *attacks], attacked),
        "diffusion trials": parts.table(["", *shares_head], shares),
    }
