"""What the experiment on persons gives to its methods."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import eupmu_jax as eupmu
from eupmu_jax.benchmark import answers, persons, rows
from eupmu_jax.methods import METHODS, default_settings, resolve_settings
from eupmu_jax.metrics.language import forget_quality
from eupmu_jax.training.fitting import Trained
from experiments import parts
from experiments.persons import compared, over_time, page, paths, run, tune

# The first of each objective, except the one that needs hidden states, which the toy lacks.
FIRST = {objective: method for method, objective in run.CANDIDATES[::-1] if objective != "rmu"}
SOME = [(method, objective) for objective, method in FIRST.items()]


def test_rows_of_an_older_version_are_made_again():
    made = [{"model": m, "objective": o, "version": METHODS[m].version} for m, o in run.CANDIDATES]
    assert run.missing([]) == list(run.CANDIDATES)
    assert run.missing([{"model": "original", "objective": ""}, *made]) == []
    older = made[0] | {"version": METHODS["EUPMU"].version - 1}
    assert run.missing([older, *made[1:]]) == [("EUPMU", "bounded_ascent")]
    assert run.missing([older, *made]) == []


def test_figures_that_older_rows_lack_are_made_again_and_shown_for_models_that_have_them_in_every_row(monkeypatch):
    found = parts.newest(rows.read(page.ROWS), "model", "objective", "seed")
    older = [{name: row[name] for name in row if name not in ("separation", "int4")} for row in found]
    assert run.whole(older) == []
    auc = {"original": 1.0, "retrained": 0.5, "pretrained": 0.25}
    later = [row | {"separation": auc.get(row["model"], 0.5), "int4": {"forget": 0.5, "retain": 0.25}} for row in older]
    assert run.whole(later) == later
    ours = rows.select(older, model="EUPMU", objective="bounded_ascent", seed=0)
    lines = page._later([row for row in later if row["model"] in auc] + ours).splitlines()[2:]
    assert {line.split("|")[1].strip(): line.split("|")[2].strip() for line in lines} == {
        "original": "-100.0",
        "retrained": "0.0",
        "pretrained": "50.0",
    }


def test_why_eupmu_is_where_it_is_says_what_the_rows_say():
    said = " ".join(page.blocks()["persons why"].split())
    found = parts.newest(rows.read(page.ROWS), "model", "objective", "seed")
    mean = lambda get, **key: np.mean([get(row) for row in rows.select(found, **key)])
    missed = 100 * mean(lambda row: row["error"]["forget"], model="EUPMU", objective="bounded_ascent")
    level = 100 * mean(lambda row: row["held_out_error"], model="original")
    where = "beyond" if missed > level else "short of"
    assert f"EUPMU ends {where} the level that it steers to, at {missed:.1f} against {level:.1f} % of" in said
    kept = {row["seed"]: 0.99 * row["utility"] for row in rows.select(found, model="original")}
    lost = [row["utility"] < kept[row["seed"]] for row in rows.select(found, model="retrained")]
    assert f"the retrained model itself misses it under {sum(lost)} of {len(lost)} seeds." in said
    least, off = {}, {}
    for row in found:
        name = compared.name_of((row["model"], row["objective"]))
        least[name] = min(compared.quality_of(found, row), least.get(name, 0))
        off.setdefault(name, []).append(compared.distance(found, row))
    passing = {name for name in least if name not in page.REFERENCES and 10 ** least[name] >= 0.05}
    named = said.split(" under every seed: ")[1].split(". Of these ")[0]
    assert set(named.split("; ")) == passing
    nearest = min(passing, key=lambda name: np.mean(off[name]))
    assert f"Of these {nearest} is nearest to the retrained model ({np.mean(off[nearest]):.1f} points off)." in said
    # Two samples of one shape, one of them so many places further.
    count = min(len(row["truth_ratios"]) for row in found)
    assert f"with {count} questions" in said
    apart = int(said.split(" questions apart")[0].split()[-1])
    p_values = [stats.ks_2samp(np.arange(count), np.arange(count) + k).pvalue for k in (apart - 1, apart)]
    assert p_values[1] < 0.05 <= p_values[0]


def test_what_is_said_of_the_methods_is_in_their_rows():
    found = parts.newest(rows.read(page.ROWS), "model", "objective", "seed")
    said = " ".join(page.blocks()["persons said"].split())
    ours = rows.select(found, model="EUPMU", objective="bounded_ascent")
    share = np.mean([row["share_of_retraining"] for row in ours])
    assert f"EUPMU took {share:.0f} % of the time of fine-tuning again, and all runs " in said
    original = {row["seed"]: row["utility"] for row in rows.select(found, model="original")}
    kept = [row["utility"] / original[row["seed"]] for row in ours]
    assert f"EUPMU, which keeps it under {sum(share >= 0.99 for share in kept)} of {len(kept)} seeds (" in said
    assert f"(the least it keeps: {100 * min(kept):.1f} %)" in said


def test_the_table_has_the_quality_of_each_seed():
    found = parts.newest(rows.read(page.ROWS), "model", "objective", "seed")
    _, _, *lines = page.blocks()["persons"].splitlines()
    shown = {line.split("|")[1].strip(): line.split("|")[-3].strip().split(", ") for line in lines}
    shown = {name: dict(part.split(": ") for part in quality) for name, quality in shown.items()}
    of = lambda row: ", ".join(part.replace("_", " ") for part in (row["model"], row["objective"]) if part)
    assert {(name, int(seed)) for name in shown for seed in shown[name]} == {(of(row), row["seed"]) for row in found}
    retrained = {row["seed"]: row["truth_ratios"] for row in rows.select(found, model="retrained")}
    for row in found:
        quality = forget_quality(row["truth_ratios"], retrained[row["seed"]]).log10
        assert float(shown[of(row)][str(row["seed"])]) == pytest.approx(quality, abs=0.051)


def test_how_far_a_model_is_from_the_retrained_one_is_the_mean_of_five_figures():
    row = lambda model, x: {
        "model": model,
        "seed": 0,
        **dict.fromkeys(("probability", "rouge", "extraction"), x),
        "error": {"forget": 2 * x},
        "relearned": {"after": 100 * x},
    }
    found = [row("retrained", 0.5), row("EUPMU", 0.4)]
    assert compared.distance(found, found[1]) == pytest.approx((3 * 10 + 20 + 10) / 5)
    assert compared.distance(found, found[0]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["npo", "kl_minimisation", "level_of_probability"])
def test_where_a_run_begins_is_told_as_its_task_has_it(toy_persons, objective):
    original, part = persons.model()[0].params, toy_persons.retain
    task, batch = run.task_of(objective, original), answers.encoded(persons.respondent(), part)
    nll, lengths, _ = answers.told(persons.respondent(), original, batch)
    missed = answers.error(persons.respondent(), original, part)
    start = run.start_of(objective, run.Models(0, toy_persons, None, None, nll, lengths, missed))
    outputs = task.outputs(original, batch, None)
    assert start["retain_loss"] == pytest.approx(float(task.retain(outputs, batch)), rel=1e-5, abs=1e-6)
    assert start["retain_error"] == pytest.approx(float(np.mean(task.error(outputs, batch))), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "objective"), SOME, ids=[", ".join(candidate) for candidate in SOME])
def test_every_candidate_has_what_it_needs(toy_persons, method, objective):
    params = persons.model()[0].params
    task = run.task_of(objective, params)
    sets = [run.examples_of(objective, part, params) for part in toy_persons[:3]]
    given = run.settings_of(method, objective, task)
    assert given.get("forget_objective", objective) == run.FORGET_LOSSES.get(objective, objective)
    options = {"steps": 2, "forget_batch": 4, "retain_batch": 4, "probes": 0}
    result = eupmu.unlearn(method, task, params, *sets, settings=given, **options)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))


@pytest.mark.slow
def test_no_candidate_is_tuned(toy_persons):
    task, params = persons.task(), persons.model()[0].params
    for method, objective in run.CANDIDATES:
        given = run.settings_of(method, objective, task)
        if objective != "rmu":
            resolve_settings(method, METHODS[method], run.task_of(objective, params), given)
        given.pop("forget_objective", None)
        plain = default_settings(METHODS[method], task)
        plain.pop("forget_objective", None)
        assert given == plain


def test_the_trial_that_is_taken_keeps_utility_and_is_nearest_to_the_level_of_unseen_persons():
    version = METHODS["EUPMU"].version
    row = lambda utility, error, **more: (
        {
            "model": "EUPMU",
            "objective": "bounded_ascent",
            "seed": 0,
            "version": version,
            "utility": utility,
            "error": {"forget": error},
        }
        | more
    )
    original = {"model": "original", "objective": "", "seed": 0, "utility": 0.6, "held_out_error": 0.2}
    chosen = lambda middle, *trials: tune.chosen([original, middle], list(trials), ("EUPMU", "bounded_ascent"))["trial"]
    middle, near = row(0.6, 0.3), row(0.595, 0.21, trial=1)
    assert chosen(middle, near, row(0.7, 0.25, trial=2)) == 1
    assert chosen(middle, near | {"utility": 0.593}, row(0.7, 0.4, trial=2)) is None
    assert chosen(middle, near | {"version": version - 1}) is None
    assert chosen(middle | {"utility": 0.5}, near | {"utility": 0.55}, row(0.56, 0.9, trial=2)) == 2


def test_trials_that_are_there_are_not_run_again_and_other_seeds_get_the_one_that_is_taken(monkeypatch, tmp_path):
    runs = []

    def unlearned(models, method, objective, trial):
        runs.append((models, method, objective, trial))
        return {
            "model": method,
            "objective": objective,
            "seed": models,
            "version": METHODS[method].version,
            "utility": 0.6,
            "error": {"forget": 0.1 * trial},
        }

    monkeypatch.setattr(run, "models_of", lambda seed, cache: seed)
    monkeypatch.setattr(run, "unlearned", unlearned)
    monkeypatch.setattr(tune, "TUNED", (("EUPMU", "bounded_ascent"),))
    middle = {"model": "EUPMU", "objective": "bounded_ascent", "seed": 0, "utility": 0.6, "error": {"forget": 0.9}}
    found = [{"model": "original", "seed": 0, "utility": 0.6, "held_out_error": 0.2}, middle]
    for _ in range(2):
        tune.tune([0, 1], found, tmp_path / "trials.jsonl", tmp_path, {"command": "tune"})
    assert runs == [(seed, "EUPMU", "bounded_ascent", trial) for seed, trial in ((0, 1), (0, 2), (1, 2))]


def test_the_table_of_tuned_methods_has_those_of_which_all_trials_are_there():
    found, trials = rows.read(page.ROWS), rows.read(tune.TRIALS_FILE)
    _, _, *lines = page.blocks()["persons tuned"].splitlines()
    whole = {key for key in tune.TUNED if len(rows.select(trials, model=key[0], objective=key[1], seed=0)) == 2}
    assert {line.split("|")[1].strip() for line in lines} == {compared.name_of(key) for key in whole}
    taken = tune.chosen(found, trials, page.OURS)
    (ours,) = [line for line in lines if line.split("|")[1].strip() == compared.name_of(page.OURS)]
    assert float(ours.split("|")[6]) == pytest.approx(100 * taken["error"]["forget"], abs=0.051)


def test_selected_trials_are_confirmed_under_seeds_that_all_methods_have():
    found, trials = parts.newest(rows.read(page.ROWS), "model", "objective", "seed"), rows.read(tune.TRIALS_FILE)
    taken = tune.chosen(found, trials, page.OURS)["trial"]
    confirmed = rows.select(trials, model="EUPMU", objective="bounded_ascent", trial=taken)
    confirmed = [row for row in confirmed if row["seed"] > 0]
    keys = [page.OURS, ("weighted sum", "wga")]
    blocks = page._confirmed(found, trials, keys)
    _, _, *lines = blocks["persons confirmed"].splitlines()
    (ours,) = [line for line in lines if line.split("|")[1].strip() == compared.name_of(page.OURS)]
    missed = np.mean([row["error"]["forget"] for row in confirmed])
    assert float(ours.split("|")[5]) == pytest.approx(100 * missed, abs=0.051)
    without = [row for row in trials if row not in confirmed]
    assert set(page._confirmed(found, without, keys).values()) == {""}


def test_what_is_said_of_selected_trials_is_in_their_table():
    blocks = page.blocks()
    _, _, *lines = blocks["persons confirmed"].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    methods = [row for row in cells if row[0] not in page.REFERENCES]
    near, after = sorted(methods, key=lambda row: float(row[6]))[:2]
    said = " ".join(blocks["persons confirmed said"].split())
    assert f"{near[0]} is nearest to the retrained model, {near[6]} points off, before {after[0]} with " in said
    keeping = [row for row in methods if len(set(row[-1].split(" of "))) == 1]
    assert f"{len(keeping)} of {len(methods)} methods keep utility" in said
    best = max(keeping, key=lambda row: float(row[7]))
    assert f"forget quality, {best[7]}, is that of {best[0]}" in said
    (ours,) = [row for row in methods if row[0] == compared.name_of(page.OURS)]
    better = [row for row in methods if float(row[7]) > float(ours[7])]
    assert f"its forget quality, {ours[7]}, is number {1 + len(better)}." in said


@pytest.mark.slow
def test_a_run_is_judged_on_its_way(toy_persons, monkeypatch):
    original, part = persons.model()[0].params, toy_persons.retain
    nll, lengths, _ = answers.told(persons.respondent(), original, answers.encoded(persons.respondent(), part))
    models = run.Models(0, toy_persons, Trained(original, 1.0, 1.0), None, nll, lengths, 0.5)
    candidate = ("weighted sum", "simnpo")
    monkeypatch.setattr(run, "STEPS", 7)

    def path(every):
        monkeypatch.setattr(over_time, "EVERY", every)
        return over_time.path(models, *candidate)

    often, seldom = path(2), path(3)
    assert list(often) == [2, 4, 6]
    assert list(seldom) == [3, 6]
    chex.assert_trees_all_equal(often[6], seldom[6])
    last = run.unlearn(models, *candidate)[1].params
    away = [float(optax.global_norm(jax.tree.map(jnp.subtract, params, last))) for params in often.values()]
    assert away == sorted(away, reverse=True)
    assert away[-1] > 0
    row = over_time.row_of(models, *candidate, 6, often[6])
    assert row["step"] == 6
    assert len(row["truth_ratios"]) == len(toy_persons.forget.question)


def test_the_best_point_on_the_way_is_one_that_keeps_utility():
    retrained = {"model": "retrained", "objective": "", "seed": 0, "truth_ratios": list(range(40))}
    row = lambda utility, away, **more: {
        "model": "EUPMU",
        "objective": "bounded_ascent",
        "seed": 0,
        "utility": utility,
        "truth_ratios": [ratio + away for ratio in range(40)],
        **more,
    }
    original = row(0.6, 40) | {"model": "original", "objective": ""}
    first = [retrained, original, row(0.61, 20)]
    way = [row(0.595, 10, step=10), row(0.593, 0, step=20), row(0.6, 15, step=30)]
    _, _, line = paths.table(first, way).splitlines()
    quality = lambda away: forget_quality([ratio + away for ratio in range(40)], retrained["truth_ratios"]).log10
    wanted = ["0.593", "3 of 4", f"{quality(10):.1f}", "10", f"{quality(20):.1f}", "0.610"]
    assert [cell.strip() for cell in line.strip("|").split("|")][1:] == wanted
