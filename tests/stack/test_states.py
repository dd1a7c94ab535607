import jax.numpy as jnp
import optax
import pytest

from eupmu_jax._stack.states import check_same_state, nodes


def test_a_node_inside_another_of_its_kind_is_not_listed_separately():
    inner = optax.MaskedState(optax.ScaleByScheduleState(1))
    outer = optax.MaskedState((inner, optax.EmptyState()))
    assert nodes((outer, [inner]), lambda node: isinstance(node, optax.MaskedState)) == [outer, inner]


def test_a_state_may_change_its_values_but_not_its_shape():
    check_same_state("inner", {"a": jnp.ones(2)}, {"a": jnp.zeros(2)}, 3)
    with pytest.raises(ValueError, match=r"^inner: its state changes shape in an update; .* num_objectives=3"):
        check_same_state("inner", {"a": jnp.ones(2)}, {"a": jnp.ones(1)}, 3)
