"""Tasks: a model and its losses as pure functions, for every method alike."""

from eupmu_jax.tasks.classification import classification
from eupmu_jax.tasks.diffusion import diffusion
from eupmu_jax.tasks.examples import Examples, as_examples
from eupmu_jax.tasks.language import language, with_reference
from eupmu_jax.tasks.task import Task, check_task

__all__ = ["Examples", "Task", "as_examples", "check_task", "classification", "diffusion", "language", "with_reference"]
