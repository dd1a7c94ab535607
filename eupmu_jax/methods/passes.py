"""Passes through the model: what a run may make, what a method's steps take, how many steps fit."""

import bisect

from eupmu_jax import methods
from eupmu_jax.methods.method import Cost, Settings, Terms
from eupmu_jax.tasks import Task


def terms_of(counts: tuple[int, int], steps: int, batches: tuple[int, int]) -> tuple[Terms, tuple[int, int]]:
    """The terms of a run without its retain loss, and the sizes of its batches.

    A run may pass as many examples as that many plain steps would: both batches once forward and once backward, where a
    backward pass counts as two forward.

    >>> terms_of((100, 900), 10, (64, 1000))
    (Terms(num_forget=100, num_retain=900, steps=10, retain_loss=0.0, passes=28920, retain_error=0.0, retain_batch=900,
           forget_error=0.0, at_least=False, rounds=None), (64, 900))
    """
    sizes = min(batches[0], counts[0]), min(batches[1], counts[1])
    passes = 3 * steps * sum(sizes)
    return Terms(*counts, steps, retain_loss=0.0, passes=passes, retain_batch=sizes[1]), sizes


def examples_passed(cost: Cost, steps: int, sizes: tuple[int, int]) -> tuple[int, int]:
    """Examples that a run passes forward and backward, in all.

    >>> examples_passed(Cost((1, 2), (1, 1), outside_forward=5), 10, (4, 8))
    (205, 120)
    """
    total = lambda passes, outside: round(steps * (passes[0] * sizes[0] + passes[1] * sizes[1]) + outside)
    return total(cost.forward, cost.outside_forward), total(cost.backward, cost.outside_backward)


def affordable_steps(
    name: str,
    settings: Settings,
    task: Task,
    counts: tuple[int, int],
    steps: int,
    batches: tuple[int, int],
    held_out: int = 0,
) -> int:
    """The most steps of a method, up to `steps`, that fit the pass budget of `steps` plain ones.

    Passes before the first and after the last step count too, and so do those that find targets: over the held-out
    examples, and over the forget set for a method that transports.

    Raises:
      ValueError: For an unknown method, settings that are missing, or a budget too small for one step.
    """
    terms, sizes = terms_of(counts, steps, batches)
    method = methods.method(name)
    # No number of passes depends on the target.
    settings = methods.complete(({"target": 0.0} if method.steers else {}) | dict(settings))

    def passes(steps):
        cost = method.make(task, terms._replace(steps=steps), settings).cost
        parts = zip(cost.forward, cost.backward, sizes, strict=True)
        each = sum((forward + 2 * backward) * size for forward, backward, size in parts)
        # A method that transports also takes the scores of the forget set and of the held-out examples.
        measured = held_out * method.steers + (counts[0] + held_out) * method.transports
        return steps * each + cost.outside_forward + 2 * cost.outside_backward + measured

    found = bisect.bisect_right(range(1, steps + 1), terms.passes, key=passes)
    if not found:
        raise ValueError(
            f"steps: got {steps} of {sizes[0]} + {sizes[1]} examples, a budget of {terms.passes} passes, expected "
            f"at least {passes(1):g}, which a single step of {name} takes"
        )
    return found
