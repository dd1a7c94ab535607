"""What the experiment on diffusion gives to its methods."""

import pytest

from eupmu_jax.benchmark import diffusion, rows
from eupmu_jax.methods import METHODS, resolve_settings
from experiments.diffusion import page, run


@pytest.fixture(scope="module")
def found():
    return rows.read(page.ROWS)


def test_every_method_has_the_same_number_of_trials():
    tuned = [(method, trial) for method, trial in run.trials() if trial != "untuned"]
    assert sorted(tuned) == sorted((method, trial) for method in run.METHODS for trial in range(run.TRIALS))
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
