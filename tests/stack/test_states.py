import jax
import jax.numpy as jnp
import optax
import pytest

import eupmu_jax as eupmu
from eupmu_jax._stack.states import check_same_state, nodes


def test_a_node_inside_another_of_its_kind_is_not_listed_separately():
    inner = optax.MaskedState(optax.ScaleByScheduleState(1))
    outer = optax.MaskedState((inner, optax.EmptyState()))
    assert nodes((outer, [inner]), lambda node: isinstance(node, optax.MaskedState)) == [outer, inner]


@jax.tree_util.register_pytree_node_class
class Weights:
    """Parameters of a class without `__eq__`."""

    def __init__(self, w):
        self.w = w

    def tree_flatten(self):
        return (self.w,), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


@pytest.mark.parametrize(
    "wrap", [eupmu.skip_nonfinite, lambda chain: eupmu.accumulate(chain, 1)], ids=["skip_nonfinite", "accumulate"]
)
def test_parameters_may_be_of_a_class_that_cannot_be_compared(wrap):
    # BUG: shapes were compared as a tree of that class, whose instances are never equal, so every step was refused.
    tx = wrap(optax.chain(eupmu.unilateral_surgery(), optax.adam(0.1)))
    params, grads = Weights(jnp.ones(3)), Weights(jnp.ones((2, 3)))
    updates = jax.eval_shape(lambda: tx.update(grads, tx.init(params), params)[0])
    assert updates.w.shape == (3,)


def test_a_state_may_change_its_values_but_not_its_shape():
    check_same_state("inner", {"a": jnp.ones(2)}, {"a": jnp.zeros(2)}, 3)
    with pytest.raises(ValueError, match=r"^inner: its state changes shape in an update; .* num_objectives=3"):
        check_same_state("inner", {"a": jnp.ones(2)}, {"a": jnp.ones(1)}, 3)
