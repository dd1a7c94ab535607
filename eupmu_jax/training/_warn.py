"""Warnings about the arguments of a run and about its result."""

import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax._stack.algebra import is_finite
from eupmu_jax._stack.frozen import mask_of
from eupmu_jax.methods.eupmu_level import UNLIMITED
from eupmu_jax.surgery.feasibility import LITTLE
from eupmu_jax.tasks._constants import of_large
from eupmu_jax.training._inputs import Sets
from eupmu_jax.training._overlap import shared
from eupmu_jax.training._reached import within
from eupmu_jax.training._way import LIMITS, halfway
from eupmu_jax.training.classes import are_labelled

logger = logging.getLogger("eupmu_jax")
# A loss that is smaller is that of a model compared with itself, up to rounding.
FLAT = 1e-4


def of_overlap(sets: Sets, held_out=None) -> None:
    """Warns of examples that are in two of the sets, or equal; for sets in memory only."""
    if both := shared(sets.forget, sets.retain):
        logger.warning(
            "retain: %d of the %d examples to forget are in the retain set, or equal some in it, and are learned again",
            both,
            len(sets.forget),
        )
    for name, part in (("forget", sets.forget), ("retain", sets.retain)):
        if held_out is not None and (both := shared(held_out, part)):
            logger.warning(
                "held_out: %d of the %d examples are in the %s set, or equal some in it; leave them out, or the level "
                "is not that of unseen data",
                both,
                len(held_out),
                name,
            )


def of_lost(name, figures):
    """Warns of figures of the original model that are not finite, such as an infinite loss."""
    if lost := {key: value for key, value in figures.items() if not np.isfinite(value)}:
        logger.warning(
            "%s: the original model has %s, which is not finite; steps with such examples are refused or, by methods "
            "without surgery, aggregator or multiplier, taken, which ruins the model",
            name,
            lost,
        )


def of_flat(name, method, task, loss):
    """Warns of a method that reads a gradient of the retain loss where that is at its minimum for every example."""
    if method.slope and task.nll is not None and abs(loss) < FLAT:
        logger.warning(
            "task.retain: is %.3g at the original model, as a distance to that model is, so its gradient there, which "
            "%s reads, is 0 but for rounding; take cross-entropy as the retain loss, or another method",
            loss,
            name,
        )


def of_narrow(params, frozen):
    """Warns of 16-bit trainable parameters, which lose updates below 1/256 of their value."""
    narrow = {
        str(jnp.result_type(leaf))
        for leaf, is_frozen in _leaves(params, frozen)
        if not is_frozen and jnp.finfo(jnp.result_type(leaf)).bits < 32
    }
    if narrow:
        logger.warning(
            "params: %s loses updates below a few thousandths of a parameter, which float32 keeps",
            " and ".join(sorted(narrow)),
        )


def of_large_frozen(params, frozen):
    """Warns of large frozen parameters if JAX copies closed-over arrays into every compiled program."""
    if frozen is not None:
        of_large("frozen", [leaf for leaf, is_frozen in _leaves(params, frozen) if is_frozen])


def _leaves(params, frozen):
    """Pairs of a leaf and whether it is frozen."""
    return zip(jax.tree.leaves(params), jax.tree.leaves(mask_of(params, frozen)), strict=True)


def of_reached(error, target):
    """Warns of a forget set whose error is already at the target before the run."""
    if error >= target:
        logger.warning(
            "forget: the original model's error is %.3g, already at or above the target of %.3g, so there is nothing "
            "to forget; use unseen data that are like the forget set, or a higher settings['target']",
            error,
            target,
        )


def of_unlabelled(task, forget):
    """Warns of a classifier whose examples have no labels that tell which classes are to be forgotten."""
    if task.num_classes is not None and not are_labelled(task, forget):
        logger.warning(
            "forget: got no `labels` of shape (n,) for task.num_classes of %d, so a class that the retain set lacks "
            "is not forgotten entirely, but to the level of unseen data; give the class of each example as `labels`, "
            "or, if it has several or none, leave out num_classes and set rate=True",
            task.num_classes,
        )


def of_unit(aim, settings):
    """Warns of a default limit on an error that is not a rate and whose unit is unknown."""
    if aim.source == "chance" and not LIMITS & set(settings):
        logger.warning(
            "settings: got no %s, and without held-out data the unit of task.error is not known; the limit is that of "
            "a rate, which may be no limit at all in that unit",
            " or ".join(sorted(LIMITS)),
        )


def of_wide(settings, asked, error):
    """Warns of a default limit that lets the retain error rise by more than half, if the error is not a rate."""
    allowed = settings.get("allowed_error", 0.0)
    if not LIMITS & set(asked) and allowed > error / 2:
        logger.warning(
            "settings: got no %s, so the retain error may rise by %.3g, a tenth of the distance from the forget error "
            "to its target; it is %.3g now",
            " or ".join(sorted(LIMITS)),
            allowed,
            error,
        )


def of_share(share, aim, level, start):
    """Warns of an end far from the last parameters, unless the run is at least halfway to its target, if any."""
    if share is None or share >= LITTLE:
        return
    # Going back to a target that was passed costs nothing.
    if aim is None or (level is not None and level.forget_error < halfway(level.target, start)):
        warnings.warn(
            f"the run ends at {share:.2f} of the way to the parameters after the last step: no point beyond kept the "
            "limit and forgot more; a higher limit, more steps or another forget loss may help",
            stacklevel=3,
        )


def of_end(carry, returned, steps, level, start):
    """Warns of refused steps, of parameters that are not finite, of an exceeded limit and of a missed level."""
    counts = [int(count) for _, count in optax.tree_utils.tree_get_all_with_path(carry.state, "nonfinite_count")]
    if refused := max(counts, default=0):
        logger.warning("%d of %d steps were refused, because a loss or a gradient was not finite", refused, steps)
    if not all(bool(is_finite(leaf)) for leaf in jax.tree.leaves(returned)):
        logger.warning("the parameters after the last step are not finite; a lower learning rate may help")
    if level is not None and not level.kept:
        if within(level.retain_error, level.limit):
            logger.warning("retain: the loss rose by more than settings['allowed_rise'] on the whole retain set")
        else:
            logger.warning(
                "retain: the limit of %.3g is not kept on the whole retain set, whose error went from %.3g to %.3g",
                level.limit,
                level.start,
                level.retain_error,
            )
    if level is not None and level.forget_error < halfway(level.target, start) and level.target < UNLIMITED:
        logger.warning(
            "forget: the error is %.3g, far from the target of %.3g; more steps, a higher limit or another forget loss "
            "may bring it nearer",
            level.forget_error,
            level.target,
        )
