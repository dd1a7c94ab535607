"""A wrapper that leaves a whole chain unchanged when its surgery refuses a step."""

import jax
import jax.numpy as jnp
import optax

from eupmu_jax._stack import refusal
from eupmu_jax._stack.checks import as_transform
from eupmu_jax._stack.states import check_same_state, nodes


def skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Undoes a step of `inner` that its surgery refused: zero updates, every other state as before.

    Surgery refuses a step with a non-finite loss or gradient and counts it, but cannot keep its neighbours in a chain
    from decaying moments or weights with a zero gradient. This wrapper can, at no cost beyond a select.
    `optax.apply_if_finite` cannot be used here, because it expects updates of the same shape before and after. If
    `inner` has an `accumulate`, a sum that its surgery refused is dropped, since it would be refused again in every
    later step.

    Args:
      inner: A chain that holds one or more surgeries of this library.

    Returns:
      A transform with the state of `inner`. `tree_get(state, "nonfinite_count")` reads how many steps were refused; if
      several members count them (a `utility_guard` around its surgery), name the one you mean: `tree_get(state,
      "UtilityGuardState").nonfinite_count`.

    Raises:
      ValueError: At `init`, if `inner` holds no surgery.

    >>> from eupmu_jax.surgery.explicit import unilateral_surgery
    >>> tx = skip_nonfinite(optax.chain(unilateral_surgery(), optax.adamw(0.1)))
    >>> state = tx.init(jnp.ones(3))
    >>> updates, state = tx.update(jnp.full((2, 3), jnp.nan), state, jnp.ones(3))
    >>> updates.tolist(), optax.tree_utils.tree_get(state, "nonfinite_count").tolist()
    ([0.0, 0.0, 0.0], 1)
    """
    inner = as_transform("inner", inner)

    def init_fn(params):
        state = inner.init(params)
        if not _surgeries(state):
            raise ValueError(
                "inner: its state has no field named 'nonfinite_count', so it holds no surgery that could refuse a "
                "step; wrap the chain that contains the surgery, or use optax.apply_if_finite"
            )
        return state

    def update_fn(updates, state, params=None, **extra_args):
        given, losses = updates, extra_args.get("losses")
        updates, new_state = inner.update(updates, state, params, **extra_args)
        stacked = [losses] if losses is not None else jax.tree.leaves(given)
        check_same_state("inner", new_state, state, next((len(leaf) for leaf in stacked if jnp.ndim(leaf)), 2))
        refused = _refused(new_state, state)

        def restore(new, old):
            if _is_sum(new):
                inner_state = jax.tree.map(restore, new.inner_state, old.inner_state, is_leaf=_is_whole)
                taken = ~refused | _refused(new.inner_state, old.inner_state)
                sums = refusal.choose(taken, new._replace(inner_state=()), old._replace(inner_state=()))
                return sums._replace(inner_state=inner_state)
            kept = refusal.choose(~refused, new, old)
            return kept._replace(nonfinite_count=new.nonfinite_count) if _is_surgery(new) else kept

        return refusal.zero_unless(~refused, updates), jax.tree.map(restore, new_state, state, is_leaf=_is_whole)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_surgery(node):
    return hasattr(node, "nonfinite_count")


def _is_sum(node):
    """Whether it is the state of `accumulate`."""
    return hasattr(node, "refused_microbatches")


def _is_whole(node):
    return _is_surgery(node) or _is_sum(node)


def _refused(new_state, state):
    pairs = zip(_surgeries(new_state), _surgeries(state), strict=True)
    return jnp.array([new.nonfinite_count != old.nonfinite_count for new, old in pairs], bool).any()


def _surgeries(state):
    return nodes(state, _is_surgery)
