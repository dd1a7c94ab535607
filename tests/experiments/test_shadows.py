"""The experiment with shadow models on a small scale, and the claims made about its rows."""

import numpy as np
import pytest

from eupmu_jax import data
from eupmu_jax.benchmark import problems, rows
from eupmu_jax.methods import METHODS
from experiments.shadows import page
from experiments.shadows import run as shadows
from experiments.shadows.models import Setup, Variant, draw, halves

pytestmark = pytest.mark.slow

TINY = Setup(
    data="digits",
    model="mlp",
    size=300,
    recipe=problems.Recipe(30, 32, 3e-3),
    tested=200,
    pairs=3,
    forget="20%",
    steps=20,
    batches=(16, 48),
    variants=(Variant("weighted sum", "random_labels"), Variant("EUPMU")),
    trials=2,
    seeds=(0,),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The rows of a tiny experiment that was run twice."""
    folder = tmp_path_factory.mktemp("shadows")
    path = folder / "rows.jsonl"
    shadows.run(TINY, path, {"command": "a test"}, folder / "models")
    once = path.read_text()
    shadows.run(TINY, path, {}, folder / "models")
    assert path.read_text() == once
    return rows.read(path)


def test_halves_are_complementary_and_share_the_targets_equally():
    split = data.split(np.zeros(40), "random:20%", num_classes=2, seed=0)
    first, second = halves(split, 3)
    assert sorted([*first, *second]) == list(range(40))
    assert len(np.intersect1d(first, split.forget_ids)) == len(np.intersect1d(second, split.forget_ids)) == 4
    assert not np.array_equal(first, halves(split, 4)[0])


def test_worlds_compare_the_model_that_had_an_example_with_the_other_of_the_pair():
    members = np.array([[True, False], [False, True], [False, False], [True, True]])
    unlearned, out = shadows.worlds(np.arange(8).reshape(4, 2), -np.arange(8).reshape(4, 2), members)
    assert unlearned.tolist() == [[0, 3], [6, 7]]
    assert out.tolist() == [[-2, -1], [-4, -5]]


def test_settings_lie_in_the_search_space_and_objectives_share_their_numbers():
    space = METHODS["weighted sum"].space
    one, other = (draw(Variant("weighted sum", name), 1) for name in ("bounded_ascent", "random_labels"))
    assert one.keys() == space.keys()
    assert space["retain_weight"].low <= one["retain_weight"] <= space["retain_weight"].high
    assert one | {"forget_objective": "random_labels"} == other
    assert draw(Variant("weighted sum", "bounded_ascent"), 2) != one


def test_the_attack_detects_members_and_not_unseen_examples(made):
    original, control, unlearned, untuned = rows.select(made, stage="membership")
    assert (original["method"], control["method"]) == ("original", "control")
    assert original["AUC"] > control["AUC"] + 0.1
    assert control["AUC"] == pytest.approx(0.5, abs=0.1)
    assert max(unlearned["shift"], untuned["shift"]) < original["shift"]
    assert untuned["settings"] == {}
    assert not rows.select(made, stage="trial", method="EUPMU")
    assert original["shadows"] == len(original["AUC_of_pairs"]) * 2 == 6
    assert original["UA"] == 0


def test_memorised_forget_sets_are_harder_than_random_ones(made):
    mean = lambda kind, field, method: np.mean(
        [row[field] for row in rows.select(made, stage="forget set", forget=kind, method=method)]
    )
    assert mean("memorised", "UA", "retrained") > mean("random", "UA", "retrained") + 5
    assert mean("memorised", "gap", "original") > mean("random", "gap", "original")
    assert mean("memorised", "gap", "retrained") == 0
    assert len({row["split"] for row in rows.select(made, stage="forget set")}) == 2


def test_tables_have_a_row_for_every_method(made):
    for table in (page.attack_table(made), page.forget_sets_table(made)):
        lines = table.splitlines()
        names = ["original", "control" if "AUC" in lines[0] else "retrained", "weighted sum, random labels"]
        assert [line.split("|")[1].strip() for line in lines[2:]] == [*names, "EUPMU, untuned"]


def test_the_pages_claims_about_the_attack_follow_from_the_rows():
    attacks = rows.select(rows.read(page.ROWS), stage="membership")
    found = {(row["method"], row["objective"]): row for row in attacks}
    auc = {name: row["AUC"] for name, row in found.items()}
    relabelled = {name for name in auc if "random_labels" in name or name[0] == "random labels"}
    control = auc.pop(("control", None))
    assert control == pytest.approx(0.5, abs=0.02)
    assert len(relabelled) == 4
    assert all(auc[name] > 0.9 and found[name]["shift"] < -4 for name in relabelled)
    assert all(auc[name] <= auc["original", None] for name in auc.keys() - relabelled)
    assert min(auc.values()) > 0.6
    nearest = sorted(auc, key=auc.get)[:5]
    assert (nearest[0], *nearest[3:]) == (("weighted sum", "bounded_ascent"), ("EUPMU", None), ("SCRUB", None))
    assert set(nearest[1:3]) == {("EUPMU budget", "bounded_ascent"), ("EUPMU explicit", "bounded_ascent")}
    untuned = found["EUPMU", None]
    assert 0.5 < untuned["UA"] / found["control", None]["UA"] < 0.6
    assert untuned["shift"] > 0
    for little in (found[name] for name in nearest[1:3]):
        assert little["UA"] < 0.8 * found["control", None]["UA"]
        assert little["shift"] > 0


def test_the_pages_claims_about_memorised_examples_follow_from_the_rows():
    judged = rows.select(rows.read(page.ROWS), stage="forget set")

    def mean(field, kind, method, objective=None):
        found = rows.select(judged, forget=kind, method=method, objective=objective)
        assert len(found) == 5
        return np.mean([row[field] for row in found])

    assert mean("UA", "memorised", "retrained") > 90
    assert mean("UA", "memorised", "original") == 0
    assert mean("UA", "memorised", "EUPMU") == pytest.approx(19, abs=2)
    names = {(row["method"], row["objective"]) for row in judged} - {("original", None), ("retrained", None)}
    ratios = {name: mean("gap", "memorised", *name) / mean("gap", "random", *name) for name in names}
    assert min(ratios, key=ratios.get) == ("random labels", None)
    assert max(ratios, key=ratios.get) == ("EUPMU", None)
    assert max(ratios["random labels", None], ratios["weighted sum", "random_labels"]) < 1
    assert sum(ratio > 1.75 for ratio in ratios.values()) > len(ratios) / 2
    least = sorted(names, key=lambda name: mean("gap", "random", *name))[:3]
    assert ("EUPMU explicit", "random_labels") in least
