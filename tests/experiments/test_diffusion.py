"""What the experiment on diffusion gives to its methods."""

import pytest

from eupmu_jax.benchmark import diffusion
from eupmu_jax.methods import METHODS, resolve_settings
from experiments.diffusion import run


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
