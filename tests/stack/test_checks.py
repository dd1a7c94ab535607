import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupmu_jax._stack.checks import check_numbers, check_same_shapes, resolve_num_objectives


@pytest.mark.parametrize("value", [0, 1, True, 0.5, np.float32(2), jnp.bfloat16(1.0), jnp.ones(3), [0.0, 1.0], np.inf])
def test_numbers_of_any_kind_are_accepted(value):
    assert check_numbers("gain", value, 0) == (np.size(value) if np.ndim(value) else None)


@pytest.mark.parametrize(
    ("value", "bounds", "expected"),
    [
        (None, {}, "got None, expected a number"),
        ("1", {}, "got '1', expected a number"),
        (1j, {}, "got 1j, expected a number"),
        (float("nan"), {}, "got nan, expected a number"),
        ([1.0, np.nan], {}, r"got \[1.0, nan\], expected a number"),
        (np.inf, {"finite": True}, "got inf, expected a finite number"),
        (-1, {"least": 0}, "got -1, expected a number >= 0"),
        (0, {"above": 0}, "got 0, expected a positive number"),
        (1, {"above": -1, "below": 1}, "got 1, expected a number > -1 and < 1"),
        (jnp.array([1.0, -1.0]), {"least": 0}, "expected a number >= 0"),
        (np.ones((2, 2)), {}, r"got shape \(2, 2\), expected a number or one for each constraint"),
    ],
)
def test_values_out_of_bounds_are_named(value, bounds, expected):
    with pytest.raises(ValueError, match=f"^gain: .*{expected}"):
        check_numbers("gain", value, **bounds)


def test_only_the_shape_of_traced_numbers_is_checked():
    jax.eval_shape(lambda value: jnp.zeros(check_numbers("gain", value, above=5) or 0), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"^gain: got shape"):
        jax.eval_shape(lambda value: check_numbers("gain", value), jnp.zeros((2, 2)))


def test_another_structure_or_shape_is_named_with_its_leaf():
    check_same_shapes("a", {"w": jnp.ones(2)}, "b", {"w": np.zeros(2)})
    with pytest.raises(ValueError, match=r"^a: leaf \['w'\] has shape \(3,\), but \(2,\) in b, or so"):
        check_same_shapes("a", {"w": jnp.ones(3)}, "b", {"w": jnp.ones(2)}, ", or so")
    for one, message in (
        ({"v": jnp.ones(2)}, r"^a: got no leaf \['w'\], expected the structure of b$"),
        ({"v": 1.0, "w": 2.0}, r"^a: got a leaf \['v'\], which b lacks, expected the structure of b$"),
        (1.0, r"^a: got structure PyTreeDef\(\*\), expected that of b, "),
    ):
        with pytest.raises(ValueError, match=message):
            check_same_shapes("a", one, "b", {"w": jnp.ones(2)})


def test_the_number_of_objectives_is_an_int():
    with pytest.raises(ValueError, match="static_args"):
        resolve_num_objectives(jnp.array(3))
