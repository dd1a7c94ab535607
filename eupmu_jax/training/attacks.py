"""Attacks that try to recover a class or a word that a diffusion model is claimed to have forgotten."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax._stack.checks import check_int, check_same_shapes
from eupmu_jax.tasks import Examples, Task
from eupmu_jax.training._inputs import check_examples, in_memory
from eupmu_jax.training.relearning import relearn_part

# Learning rates of Adam, for the embedding row alone and for the whole model.
ROW_RATE, RATE = 1e-2, 1e-4


def diffusion_attacks(
    task: Task,
    params: chex.ArrayTree,
    row: chex.ArrayTree,
    forget: Examples | chex.ArrayTree,
    retain: Examples | chex.ArrayTree,
    draw: Callable,
    *,
    count: int,
    row_steps: int = 200,
    steps: int = 20,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, chex.Array]:
    """Returns samples for a forgotten condition after each attack that may recover it.

    Judge them with a classifier that was never trained on samples, next to the samples of a retrained model. The more
    samples show what was forgotten, the more of it was only hidden; a retrained model shows some of it too.

    Args:
      task: A task of `tasks.diffusion`, without `original`; one object for all models that are compared.
      params: Parameters of the model; not modified.
      row: Tree of bools like `params`, True for the numbers that represent this condition only: its embedding row.
      forget, retain: Examples as in `relearn`, with images as `inputs`.
      draw: `draw(params, **options) -> images`: `models.sampling.sample` for the forgotten condition, with `options`
        passed on.
      count: Number of images that `draw` returns.
      row_steps, steps: Steps of training the row, and of training the whole model.
      batch_size: Examples in each step.
      seed: Seed of the examples drawn and of all keys.

    Returns:
      Images by the name of the attack. `embedding`: the row alone is trained again on forgotten images (textual
      inversion, Gal et al. 2022, arXiv 2208.01618). `forgotten data` and `retained data`: the whole model is trained on
      those images. `no guidance` and `ancestral`: another sampler setting. `noised images`: sampling starts halfway,
      from noised forgotten images (SDEdit, Meng et al. 2022, arXiv 2108.01073).

    Raises:
      ValueError: As in `relearn_part` and `sample`; for a number below 1, an empty set, a `row` without any True,
        examples that the task refuses, or if `draw` does not return `count` images. It is raised before any training.

    >>> from eupmu_jax import tasks
    >>> from eupmu_jax.models.sampling import sample
    >>> from eupmu_jax.objectives.diffusion import cosine_schedule
    >>> def denoise(params, x_t, t, labels):
    ...     return x_t * params["scale"] + params["rows"][labels][:, None]
    >>> schedule, params = cosine_schedule(60), {"scale": jnp.ones(()), "rows": jnp.zeros(3)}
    >>> task = tasks.diffusion(denoise, schedule, num_conditions=2)
    >>> tree = {"inputs": np.zeros((6, 4), np.float32), "labels": np.arange(6) % 2}
    >>> forget, retain = (tasks.Examples(tree, np.arange(first, 6, 2)) for first in (1, 0))
    >>> fixed = {"labels": jnp.ones(5, int), "shape": (4,), "key": jax.random.key(0), "nothing": 2, "steps": 9}
    >>> draw = lambda params, **options: sample(denoise, params, schedule, **fixed, **options)
    >>> row = {"scale": np.array(False), "rows": np.array([False, True, False])}
    >>> found = diffusion_attacks(task, params, row, forget, retain, draw, count=5, row_steps=2, steps=2, batch_size=2)
    >>> [(name, images.shape) for name, images in found.items()][:2]
    [('embedding', (5, 4)), ('forgotten data', (5, 4))]
    """
    whole = jax.tree.map(lambda leaf: jnp.ones(np.shape(leaf), bool), params)

    def trained(part, examples, steps, rate):
        options = {"steps": steps, "batch_size": batch_size, "learning_rate": rate, "seed": seed}
        return relearn_part(task, params, part, examples, **options)

    counts = {"count": count, "row_steps": row_steps, "steps": steps, "batch_size": batch_size}
    for name, value in counts.items():
        check_int(name, value, 1, static=True)
    forget, retain = in_memory("forget", forget), in_memory("retain", retain)
    for name, part in (("forget", forget), ("retain", retain)):
        if not len(part):
            raise ValueError(f"{name}: got no examples, expected at least one")
        check_examples(name, part, task, params)
    check_same_shapes("row", row, "params", params)
    images = forget[np.arange(count) % len(forget)]["inputs"]
    # Attacks without training come first, so that wrong images or options fail before any training.
    sampled = {"no guidance": draw(params, guidance=0.0)}
    if len(sampled["no guidance"]) != count:
        raise ValueError(
            f"count: got {count}, but draw returned {len(sampled['no guidance'])} images, expected as many"
        )
    sampled |= {"ancestral": draw(params, eta=1.0), "noised images": draw(params, start=images, share=0.5)}
    return {
        "embedding": draw(trained(row, forget, row_steps, ROW_RATE)),
        "forgotten data": draw(trained(whole, forget, steps, RATE)),
        "retained data": draw(trained(whole, retain, steps, RATE)),
        **sampled,
    }
