"""The budget experiments on a small scale, and the claims made about their rows."""

import jax
import numpy as np
import pytest

import eupmu_jax as eupmu
from eupmu_jax.benchmark import problems, rows
from experiments.budgets import one_run, page
from experiments.budgets.methods import OPTIMIZERS, Program, Tuning
from experiments.per_class import page as per_class
from experiments.robustness import page as robustness

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(problems.RECIPES, ("digits", "mlp"), problems.Recipe(30, 64, 1e-3))
        return one_run.problem("digits", "random:10%", 0, tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("method", "scale", "optimizer"),
    [("PI", "raw", "adam"), ("barrier", "log", "sgd"), ("guard", "raw", "muon"), ("reference", "log", "sgd")],
)
def test_the_returned_checkpoint_keeps_the_limit_on_the_whole_retain_set(problem, method, scale, optimizer):
    rate = {"sgd": 0.5, "adam": 3e-3, "muon": 1e-2}[optimizer]
    trace = []
    result = one_run.run(problem, Program(method, scale, optimizer), Tuning(rate), 0.05, epochs=5, seed=0, trace=trace)
    judged = problems.evaluate(problem.classifier, result.best.params)
    assert judged["retain_loss"] <= problem.figures["retain_loss"] + 0.05 * 1.0001
    assert judged["forget_loss"] > problem.figures["forget_loss"]
    np.testing.assert_allclose(trace[:: one_run.LOOKS], np.ravel(result.history["levels"]), rtol=1e-4, atol=1e-7)


def test_an_anchored_level_keeps_the_limit_too(problem):
    program, setting = Program("PI", "raw", "adam"), Tuning(3e-3)
    result = one_run.run(problem, program, setting, 0.05, epochs=5, seed=0, anchored=True)
    assert result.best.progressed
    assert result.best.levels[0] <= problem.figures["retain_loss"] + 0.05


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_guard_that_measures_never_lets_the_batch_exceed_its_limit(problem, optimizer):
    t, rise, rng = problem.classifier, 0.05, np.random.default_rng(0)
    # Every step uses the same batch, so the measured loss is the limited one.
    ids = rng.permutation(t.split.forget_ids)[:64], rng.permutation(t.split.retain_ids)[:576]
    pair = tuple({name: array[part] for name, array in t.tree.items()} for part in ids)
    loss = eupmu.shared_forward(
        lambda params, batch: problem.apply(params, batch["inputs"]),
        [
            lambda logits, batch: eupmu.objectives.bounded_ascent(logits, batch["labels"]),
            lambda logits, batch: eupmu.objectives.cross_entropy(logits, batch["labels"]),
        ],
    )
    limit = eupmu.tolerances.budget(rise, 0.9, relative_to_start=True)
    guard = eupmu.utility_guard(OPTIMIZERS[optimizer](lambda count: 1e-2), limit, max_halvings=12)
    step = jax.jit(eupmu.explicit_step(loss, guard))
    params, state, seen = problem.params, guard.init(problem.params), []
    for _ in range(60):
        params, state, losses = step(params, state, pair)
        seen.append(losses)
    forget, retain = np.transpose(seen)
    assert np.max(retain) <= retain[0] + rise * (1 + 1e-5)
    assert forget[-1] < forget[0] - 0.1


@pytest.mark.parametrize("data", ["digits", "fashion_mnist"])
def test_the_pages_claims_about_budgets_follow_from_the_rows(data):
    grid = rows.select(rows.read(page.ROWS), data=data, stage="grid")
    assert len({row["seed"] for row in grid}) == 5
    assert max(row["overshoot_returned"] for row in grid if row["method"] in ("barrier", "PI")) <= 0.01
    for optimizer in OPTIMIZERS:
        reference = [r["overshoot_last"] for r in grid if (r["method"], r["optimizer"]) == ("reference", optimizer)]
        assert max(reference) > 2


@pytest.mark.parametrize("data", ["digits", "fashion_mnist"])
def test_the_pages_claims_about_random_settings_follow_from_the_rows(data):
    found = rows.select(rows.read(robustness.ROWS), data=data)
    for method in ("barrier", "PI"):
        kept = [row["overshoot_returned"] <= 0.01 for row in rows.select(found, method=method)]
        assert len(kept) >= 60
        assert np.mean(kept) >= 0.95


def test_what_the_page_types_about_last_steps_is_in_the_rows():
    grid = rows.select(rows.read(page.ROWS), stage="grid")
    worst = lambda *methods, **chosen: max(
        row["overshoot_last"] for row in rows.select(grid, **chosen) if row["method"] in methods
    )
    assert worst("barrier", "guard", "PI", "I", "PHR", schedule="restarts") < 1.1
    assert 6 < worst("P", schedule="restarts") < 6.5
    assert 900 < worst("reference", schedule="restarts") < 1000
    assert round(worst("P", scale="log")) == 1362
    assert min((row["start"] + row["rise"]) / row["start"] for row in grid) > 20
    assert max(row["overshoot_returned"] for row in grid) <= 0


def test_in_two_of_four_columns_a_fixed_weight_has_the_least_gap():
    found = rows.read(robustness.ROWS)
    nearest = []
    for data in robustness.DATA:
        for end in ("last", "returned"):
            kept = [row for row in rows.select(found, data=data) if row[f"overshoot_{end}"] <= robustness.KEPT]
            nearest.append(min(kept, key=lambda row: row[f"gap_{end}"])["method"])
    assert sum(method.startswith("fixed weight") for method in nearest) == 2


def test_claims_about_limits_for_each_class_follow_from_the_rows():
    everything = rows.read(per_class.ROWS)

    def worst_at(method, forgotten):
        found = rows.select(everything, method=method)
        mean = lambda value, s: np.mean([value(row) for row in found if row["strength"] == s])
        strengths = sorted({row["strength"] for row in found})
        curve = sorted((mean(lambda r: r["UA"], s), mean(lambda r: max(r["rises"]), s)) for s in strengths)
        return np.interp(forgotten, *zip(*curve, strict=True))

    for forgotten in (12.5, 14.0, 15.5):
        assert worst_at("PI, ten", forgotten) < worst_at("PI, one", forgotten)
    for forgotten in (9.0, 10.5, 11.6, 12.5, 14.0):
        assert worst_at("owa", forgotten) < worst_at("PI, ten", forgotten)
        assert (worst_at("mean", forgotten) < worst_at("PI, ten", forgotten)) == (forgotten <= 12.5)
        assert (worst_at("owa", forgotten) < worst_at("mean", forgotten)) == (forgotten > 11)
