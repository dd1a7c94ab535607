"""What the experiment on diffusion gives to its methods."""

import numpy as np
import pytest
from flax import nnx

from eupmu_jax.benchmark import diffusion, rows
from eupmu_jax.methods import METHODS, resolve_settings
from eupmu_jax.models.unet import UNet
from experiments.diffusion import page, run


@pytest.fixture(scope="module")
def found():
    return rows.read(page.ROWS)


def test_every_method_has_the_same_number_of_trials():
    tuned = [(method, trial) for method, trial in run.trials() if trial != "untuned"]
    assert sorted(tuned) == sorted((method, trial) for method in run.METHODS for trial in range(run.DIGITS.trials))
    assert set(run.trials()) - set(tuned) == {("EUPMU", "untuned")}


@pytest.mark.slow
def test_settings_of_all_trials_are_settings_that_the_task_can_take():
    task = diffusion.plain_task()
    for method, trial in run.trials():
        chosen = METHODS[method]
        given = run.settings(method, trial)
        assert set(given) == (set() if trial == "untuned" else set(chosen.space))
        resolve_settings(method, chosen, task, given or None)


def test_the_forget_objective_goes_with_the_trial_as_the_page_says(found):
    objectives = {(row["trial"], row["settings"].get("forget_objective")) for row in found if "settings" in row}
    told = {(0, "negative_guidance"), (1, "random_condition"), ("untuned", "negative_guidance")}
    # Fine-tuning and SCRUB have none.
    assert objectives == told | {(0, None), (1, None)}


def test_what_the_page_says_of_the_row_trained_again_is_in_the_rows(found):
    lacking = set(run.METHODS) - {row["model"] for row in found}
    assert not lacking, f"no rows of {', '.join(lacking)}; the first lines of {run.__file__} say how to make them"
    median = lambda method, of: np.median(
        [of(row) for row in found if row["model"] == method and row["trial"] in (0, 1)]
    )
    again = lambda method: median(method, lambda row: row["attacks"]["embedding"])
    loss, rise = (lambda method, name=name: median(method, lambda row: row[name]) for name in ("forget_loss", "rise"))
    assert loss("PCGrad") > loss("weighted sum")
    assert again("PCGrad") < again("weighted sum")
    assert sum(rise(method) > rise("EUPMU explicit") for method in run.METHODS) < 0.2 * len(run.METHODS)
    assert again("EUPMU explicit") < again("EUPMU")
    assert max(run.METHODS, key=again) == "SCRUB"
    own = {key: page._of(found, ("EUPMU", key)) for key in (0, "untuned")}
    pairs = list(zip(*own.values(), strict=True))
    assert all(one["seed"] == other["seed"] for one, other in pairs)
    assert all(abs(one["forget_loss"] - other["forget_loss"]) < 0.015 for one, other in pairs)
    assert 10 < max(abs(one["attacks"]["embedding"] - other["attacks"]["embedding"]) for one, other in pairs) <= 14.5
    retrained = {row["seed"]: row for row in rows.select(found, model="retrained")}
    assert all(row["target"] < retrained[row["seed"]]["forget_loss"] for pair in pairs for row in pair)
    # The last column of the table of attacks.
    off = {line[0]: float(line[-1]) for line in table(page.blocks()["diffusion attacks"])}
    drawn = {page._name((row["model"], row["trial"])): row for row in found if row["trial"] in (0, "untuned")}
    forgetting = {name for name in off if name in drawn and drawn[name]["UA"] > 50 < drawn[name]["RA"]}
    assert max(forgetting, key=off.get) == "SCRUB, trial 0"


def test_what_the_page_says_of_clothes_is_in_the_rows():
    found = rows.read(page.CLOTHES)
    median = lambda method, of: np.median([of(row) for row in rows.select(found, model=method, trial=0)])
    again = {method: median(method, lambda row: row["attacks"]["embedding"]) for method in run.FEW}
    loss = {method: median(method, lambda row: row["forget_loss"]) for method in run.FEW}
    more = {method for method in run.FEW if again[method] > again["EUPMU"]}
    assert len(more) == 4
    assert all(loss[method] > loss["EUPMU"] for method in more | {"NGDiff", "EUPMU explicit"})
    assert max(again["NGDiff"], again["EUPMU explicit"]) < again["EUPMU"]
    runs = [(row["model"], row["seed"]) for row in found if row.get("trial") == 0]
    assert sorted(runs) == sorted((method, seed) for method in run.FEW for seed in (0, 1, 2))


def test_the_page_counts_methods_and_differences_by_seed(found):
    blocks = {name: " ".join(text.split()) for name, text in page.blocks().items()}
    trials = [row for row in found if row["trial"] in (0, 1)]
    of = lambda method: [row["attacks"]["embedding"] for row in trials if row["model"] == method]
    less = sum(np.median(of(method)) > np.median(of("EUPMU")) for method in run.METHODS)
    assert f"Of {len(run.METHODS) - 1} other methods, {less} give back less" in blocks["diffusion relearned"]
    # With EUPMU's row as good as the best one there is nothing left to tell of.
    best = [row | {"attacks": {"embedding": 100.0}} if row["model"] == "EUPMU" else row for row in found]
    assert f"Of {len(run.METHODS) - 1} other methods, 0 give back less" in page._relearned(best)
    by_seed = lambda key: sorted(rows.select(found, model=key[0], trial=key[1]), key=lambda row: row["seed"])
    ours, theirs = map(by_seed, (("EUPMU", "untuned"), ("weighted sum", 0)))
    differences = ", ".join(f"{one['FD'] - other['FD']:+.1f}" for one, other in zip(ours, theirs, strict=True))
    assert f"differs from it by {differences}." in blocks["diffusion said"]


def test_the_runs_nearest_to_the_retrained_model_under_attack_are_named(found):
    blocks = {name: " ".join(text.split()) for name, text in page.blocks().items()}
    retrained = {row["seed"]: row for row in rows.select(found, model="retrained")}
    figures = lambda row: np.array([row["UA"], *(row["attacks"][name] for name in retrained[0]["attacks"])])
    attacked = sorted((row for row in found if row["trial"] in (0, "untuned")), key=lambda row: row["seed"])
    off = {}
    for row in attacked:
        distance = np.abs(figures(row) - figures(retrained[row["seed"]])).mean()
        off.setdefault((row["model"], row["trial"]), []).append(distance)
    order = sorted(off, key=lambda key: np.mean(off[key]))
    assert f"Of {len(off)} runs that undergo all attacks" in blocks["diffusion nearest"]
    assert f"figures are {page._name(order[0])} ({np.mean(off[order[0]]):.1f})," in blocks["diffusion nearest"]
    place = order.index(("EUPMU", "untuned")) + 1
    ours = off["EUPMU", "untuned"]
    by_seed = ", ".join(str(1 + sum(its[k] < ours[k] for its in off.values())) for k in range(len(ours)))
    attacks = f"{len(figures(attacked[0])) - 1} attacks included"
    told = f"{attacks}, it is number {place} of {len(off)} runs on digits, none selected (by seed: {by_seed})."
    assert told in blocks["diffusion in short"]
    assert f"untuned EUPMU is number {by_seed}." in blocks["diffusion nearest"]


def table(block):
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()[2:]]


def test_trials_of_an_older_version_or_of_other_ranges_are_made_again():
    made = [
        {"model": m, "trial": t, "version": METHODS[m].version, "settings": run.settings(m, t)} for m, t in run.trials()
    ]
    assert run.missing([]) == run.trials()
    assert run.missing([{"model": "original", "trial": ""}, *made]) == []
    assert run.missing([made[0] | {"version": METHODS["EUPMU"].version - 1}, *made[1:]]) == run.trials()[:1]
    elsewhere = made[-1] | {"settings": made[-1]["settings"] | {"learning_rate": 1.0}}
    assert run.missing([*made[:-1], elsewhere]) == run.trials()[-1:]


def test_models_of_clothes_are_those_of_the_plan_and_attacked_as_it_says():
    plan = run.CLOTHES
    found = [row for row in rows.read(page.CLOTHES) if row["model"] != run.REAL]
    found = {(row["model"], row["trial"]): set(row["attacks"]) for row in found}
    models = {(model, "") for model in page.REFERENCES if model != run.REAL}
    assert models < set(found) <= models | set(run.trials(plan))
    row = {"embedding"}
    assert all(attacks > row if trial in plan.attacked else attacks == row for (_, trial), attacks in found.items())


@pytest.mark.long
def test_another_case_has_its_own_images_network_and_files(tmp_path, monkeypatch):
    labels = np.arange(160) % 10
    tree = {"inputs": np.random.default_rng(0).uniform(-1, 1, (160, 4, 4, 1)).astype(np.float32), "labels": labels}
    make = lambda seed: UNet(10, widths=(8,), blocks=1, rngs=nnx.Rngs(seed))
    subject = diffusion.Subject("noise", "small unet", lambda: tree, make, (4, 4, 1), 1, (8,), 1)
    for name, value in {"FORGOTTEN": 10, "RETAINED": 2, "ATTACKED": 4, "RELEARNING": 2}.items():
        monkeypatch.setattr(diffusion, name, value)
    monkeypatch.setattr(run, "STEPS", 2)
    plan = run.Plan(subject, methods=(), trials=0, attacked=())
    out = tmp_path / "noise.jsonl"
    run.run(0, out, tmp_path / "models", {}, plan)
    found = rows.read(out)
    assert [(row["model"], row["trial"]) for row in found] == [
        (run.REAL, ""),
        ("original", ""),
        ("retrained", ""),
        ("copied row", ""),
        ("EUPMU", "untuned"),
    ]
    assert all(np.isfinite([row["UA"], row["FD"], row["attacks"]["embedding"]]).all() for row in found[1:])
    assert np.load(tmp_path / "noise.npz")["EUPMU, untuned"].shape == (10, run.SHOWN, 4, 4)
    run.run(0, out, tmp_path / "models", {}, plan)
    assert len(rows.read(out)) == len(found)
