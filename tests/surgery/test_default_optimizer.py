"""Muon for matrices, Adam for the rest: which leaves are which, how far steps go, and what is refused."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from eupmu_jax import default_optimizer, explicit_step, freeze, unilateral_surgery
from eupmu_jax.methods.method import Terms, descent
from eupmu_jax.surgery.default_optimizer import cosine_rounds, muon_dimensions

STEPS = 10
KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "conv": {"kernel": jax.random.normal(KEYS[0], (3, 3, 2, 8)), "bias": jnp.zeros(8)},
    "wide": {"kernel": jax.random.normal(KEYS[1], (4, 64))},
    "tall": {"kernel": jax.random.normal(KEYS[2], (64, 4))},
    "embed": {"embedding": jax.random.normal(KEYS[3], (16, 4))},
    "scale": jnp.ones(()),
}
# Their norm is below the one to which gradients are clipped.
GRADIENTS = jax.tree.map(lambda leaf: 1e-5 * (leaf + 1), PARAMS)
# Where Muon's iteration takes singular values above a hundredth of the Frobenius norm.
LEAST, MOST = 0.68, 1.21


def first_update(gradients, params=PARAMS, **options):
    optimizer = default_optimizer(params, STEPS, **options)
    return jax.jit(optimizer.update)(gradients, optimizer.init(params), params)[0]


def matrix(kernel):
    return np.reshape(kernel, (-1, kernel.shape[-1]))


def axes_of(tree):
    """Reduction and output axes by the leaf's place in the tree, None for Adam."""
    is_leaf = lambda x: x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)
    found = jax.tree_util.tree_leaves_with_path(muon_dimensions(tree), is_leaf=is_leaf)
    place = lambda path: jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    return {place(path): leaf if leaf is None else tuple(leaf) for path, leaf in found}


def test_it_descends_on_a_quadratic():
    target = jax.random.normal(KEYS[0], (8, 4)) / 10
    loss = lambda params: jnp.sum((params["w"] @ jnp.ones(4) + params["b"] - target @ jnp.ones(4)) ** 2)
    params = {"w": jnp.zeros((8, 4)), "b": jnp.zeros(8)}
    optimizer = default_optimizer(params, 30)

    def step(carry, _):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    _, losses = jax.jit(lambda carry: jax.lax.scan(step, carry, length=30))((params, optimizer.init(params)))
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("length", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("name", ["conv", "wide", "tall"])
def test_a_matrix_moves_by_the_learning_rate_in_every_direction(name, length):
    kernel = matrix(first_update(GRADIENTS, length=length)[name]["kernel"])
    factor = max(1, kernel.shape[1] / kernel.shape[0]) ** 0.5
    singular = np.linalg.svd(kernel, compute_uv=False) * STEPS / (length * factor)
    assert np.all((singular > LEAST) & (singular < MOST))
    # The singular vectors are those of the gradient.
    gradient = matrix(GRADIENTS[name]["kernel"])
    along = -gradient @ kernel.T if len(kernel) < kernel.shape[1] else -gradient.T @ kernel
    np.testing.assert_allclose(along, along.T, atol=1e-5 * np.abs(along).max())
    assert np.linalg.eigvalsh(along)[0] > 0


def test_everything_else_moves_as_by_adam_with_nesterovs_momentum():
    others = {"bias": PARAMS["conv"]["bias"], "embed": PARAMS["embed"]["embedding"], "scale": PARAMS["scale"]}
    adam = optax.nadam(cosine_rounds(STEPS))
    optimizer = default_optimizer(PARAMS, STEPS)
    state, of_adam = optimizer.init(PARAMS), adam.init(others)
    for power in range(3):
        gradients = jax.tree.map(lambda leaf: leaf / 2**power, GRADIENTS)  # noqa: B023
        updates, state = optimizer.update(gradients, state, PARAMS)
        mine = {
            "bias": updates["conv"]["bias"],
            "embed": updates["embed"]["embedding"],
            "scale": updates["scale"],
        }
        theirs = {
            "bias": gradients["conv"]["bias"],
            "embed": gradients["embed"]["embedding"],
            "scale": gradients["scale"],
        }
        expected, of_adam = adam.update(theirs, of_adam, others)
        chex.assert_trees_all_close(mine, expected, rtol=1e-5)


MATRICES = {"w": jnp.zeros((5, 3)), "conv": jnp.zeros((2, 2, 3, 4))}
UPDATE_MATRICES = jax.jit(lambda gradients: first_update(gradients, MATRICES))


@settings(max_examples=50, deadline=None)
@given(exponent=st.floats(-3, 3), seed=st.integers(0, 100))
def test_the_scale_of_the_gradient_does_not_change_the_first_update(exponent, seed):
    numbers = np.random.default_rng(seed)
    draw = lambda leaf: numbers.normal(size=leaf.shape).astype(np.float32)
    # Norms of 5e-4, so that no multiple of them is clipped.
    gradients = jax.tree.map(lambda leaf: 5e-4 * leaf / np.linalg.norm(leaf), jax.tree.map(draw, MATRICES))
    scaled = jax.tree.map(lambda leaf: np.float32(10**exponent) * leaf, gradients)
    plain, other = UPDATE_MATRICES(gradients), UPDATE_MATRICES(scaled)
    for name, leaf in plain.items():
        # Muon adds 1e-8 to the norm; its iteration raises a relative change tenfold at most.
        bound = 1e-3 + 10 * 1e-8 / np.linalg.norm(scaled[name])
        assert np.linalg.norm(other[name] - leaf) < bound * np.linalg.norm(leaf)


@pytest.mark.parametrize("norm", [1.0, 1e3, 1e30])
def test_a_large_gradient_makes_no_large_step(norm):
    updates = first_update({"w": norm * jnp.eye(4)}, {"w": jnp.zeros((4, 4))})
    assert 0 <= np.linalg.norm(updates["w"], 2) < MOST / STEPS


def test_jit_changes_nothing():
    optimizer = default_optimizer(PARAMS, STEPS)
    plain = fast = optimizer.init(PARAMS)
    for _ in range(2):
        updates, plain = optimizer.update(GRADIENTS, plain, PARAMS)
        jitted, fast = jax.jit(optimizer.update)(GRADIENTS, fast, PARAMS)
        chex.assert_trees_all_close(updates, jitted, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(plain, fast, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_the_rates_add_up_to_about_half_of_the_length(steps):
    rates = [float(cosine_rounds(steps, 3.0)(count)) for count in range(steps + 2)]
    np.testing.assert_allclose(rates[0], 3 / steps, rtol=1e-6)
    np.testing.assert_allclose(sum(rates), 3 * (1 + 1 / steps) / 2, rtol=1e-5)
    assert rates[-1] == 0


def test_each_round_has_a_cosine_of_its_own():
    rates = [float(cosine_rounds([3, 6])(count)) for count in range(9)]
    each = [float(cosine_rounds(steps)(count)) for steps in (3, 6) for count in range(steps)]
    np.testing.assert_allclose(rates, each, rtol=1e-6)


def test_the_matrices_of_a_linen_model():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(11, 6)(tokens) + self.param("pos_embedding", nn.initializers.zeros, (5, 6))
            x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
            x = nn.Conv(7, (3,), name="conv")(nn.LayerNorm(name="norm")(x))
            return nn.Dense(4, name="dense")(x)

    params = Block().init(jax.random.key(0), jnp.zeros((1, 5), int))["params"]
    projection = ((0,), (1, 2))
    expected = {
        "Embed_0.embedding": None,
        "pos_embedding": None,
        **{f"attention.{name}.bias": None for name in ("query", "key", "value", "out")},
        **{f"attention.{name}.kernel": projection for name in ("query", "key", "value")},
        "attention.out.kernel": ((0, 1), (2,)),
        "norm.scale": None,
        "norm.bias": None,
        "conv.kernel": ((0, 1), (2,)),
        "conv.bias": None,
        "dense.kernel": ((0,), (1,)),
        "dense.bias": None,
    }
    assert axes_of(params) == expected
    updates = first_update(jax.tree.map(jnp.ones_like, params), params)
    chex.assert_tree_all_finite(updates)


def test_the_matrices_of_haiku_parameters():
    params = {
        "net/~/wte": {"embeddings": jnp.zeros((9, 4))},
        "net/wpe": {"w": jnp.zeros((9, 4))},
        "net/attention/query": {"w": jnp.zeros((4, 6)), "b": jnp.zeros(6)},
        "net/attention/value": {"w": jnp.zeros((4, 2, 3))},
        "net/conv2_d": {"w": jnp.zeros((3, 3, 4, 8)), "b": jnp.zeros(8)},
        "net/batch_norm": {"scale": jnp.ones((1, 1, 1, 8)), "offset": jnp.zeros((1, 1, 1, 8))},
        "net/value/conv": {"w": jnp.zeros((1, 1, 4, 8))},
        "net/linear": {"w": jnp.zeros((8, 1))},
    }
    assert axes_of(params) == {
        "net/~/wte.embeddings": None,
        "net/wpe.w": None,
        "net/attention/query.w": ((0,), (1,)),
        "net/attention/query.b": None,
        "net/attention/value.w": ((0,), (1, 2)),
        "net/conv2_d.w": ((0, 1, 2), (3,)),
        "net/conv2_d.b": None,
        "net/batch_norm.scale": None,
        "net/batch_norm.offset": None,
        "net/value/conv.w": ((0, 1, 2), (3,)),
        "net/linear.w": ((0,), (1,)),
    }
    chex.assert_tree_all_finite(first_update(jax.tree.map(jnp.ones_like, params), params))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, 6, rngs=rngs)
        self.lora = nnx.LoRA(8, 2, 4, rngs=rngs)
        self.dense = nnx.Linear(8, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)


def test_the_matrices_of_an_nnx_model():
    # BUG: the path of each NNX variable ends in `value`, which was taken for the projection of an attention.
    _, params, _ = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    found = axes_of(params)
    assert {name: axes for name, axes in found.items() if axes is not None} == {
        "conv.kernel": ((0, 1, 2), (3,)),
        **{f"attention.{name}.kernel": ((0,), (1, 2)) for name in ("query", "key", "value")},
        "attention.out.kernel": ((0, 1), (2,)),
        "lora.lora_a": ((0,), (1,)),
        "lora.lora_b": ((0,), (1,)),
        "dense.kernel": ((0,), (1,)),
    }
    assert len(found) == len(jax.tree.leaves(params))


def test_steps_of_an_nnx_model_keep_its_tree():
    _, params, _ = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    optimizer = default_optimizer(params, STEPS)
    state = jax.jit(optimizer.init)(params)
    for _ in range(2):
        updates, state = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, params), state, params)
        chex.assert_tree_all_finite(updates)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    "params",
    [
        {},
        jnp.ones((3, 4)),
        jnp.ones(()),
        {"a": jnp.ones(3), "b": jnp.ones(())},
        {"a": None, "w": jnp.ones((3, 4))},
        {"rows": jnp.ones((0, 4)), "columns": jnp.ones((4, 0)), "w": jnp.ones((3, 4))},  # BUG: divided by zero
        {"one": jnp.ones((1, 1)), "row": jnp.ones((1, 4)), "column": jnp.ones((4, 1))},
        {"rank one": jnp.ones((6, 4))},
        [jnp.ones((2, 3), jnp.bfloat16), jnp.ones(2, jnp.bfloat16)],
    ],
    ids=str,
)
@pytest.mark.parametrize("fill", [0.0, 1.0, 1e-12])
def test_updates_are_finite(params, fill):
    optimizer = default_optimizer(params, STEPS)
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = jax.jit(optimizer.update)(
            jax.tree.map(lambda p: jnp.full_like(p, fill), params), state, params
        )
        chex.assert_tree_all_finite(updates)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    if fill == 0:
        assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(updates))


def test_a_zero_gradient_in_float16_moves_nothing():
    # BUG: 0 was divided by an epsilon that rounds to 0 in float16.
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), PARAMS)
    updates = first_update(jax.tree.map(jnp.zeros_like, params), params)
    chex.assert_trees_all_equal(optax.apply_updates(params, updates), params)


def test_a_matrix_moves_in_the_row_and_column_space_of_its_gradient():
    left, right = jax.random.normal(KEYS[0], (6, 1)), jax.random.normal(KEYS[1], (1, 4))
    update = first_update({"w": left @ right}, {"w": jnp.zeros((6, 4))})["w"]
    singular = np.linalg.svd(update, compute_uv=False) * STEPS
    assert LEAST < singular[0] < MOST
    assert singular[1] < 1e-3


def test_the_path_stays_within_its_bound():
    params = {"w": jnp.zeros((6, 4))}
    optimizer = default_optimizer(params, STEPS)
    state, total = optimizer.init(params), 0.0
    for key in jax.random.split(jax.random.key(1), STEPS):
        updates, state = optimizer.update({"w": jax.random.normal(key, (6, 4))}, state, params)
        total += np.linalg.norm(updates["w"], 2)
    assert total < MOST * (1 + 1 / STEPS) / 2


def test_it_works_behind_a_surgery_with_frozen_leaves():
    params = {"w": PARAMS["wide"]["kernel"], "frozen": jnp.ones((3, 4)), "b": jnp.zeros(64)}
    loss = lambda params, x: jnp.mean((x @ params["w"] + params["b"] + params["frozen"].sum()) ** 2)
    batches = jax.random.normal(KEYS[0], (5, 4)), jax.random.normal(KEYS[1], (9, 4))
    frozen = {"w": False, "frozen": True, "b": False}
    optimizer = freeze(optax.chain(unilateral_surgery(), default_optimizer(params, STEPS)), frozen)
    moved, _, _ = jax.jit(explicit_step(loss, optimizer))(params, optimizer.init(params), batches)
    chex.assert_trees_all_equal(moved["frozen"], params["frozen"])
    assert jnp.any(moved["w"] != params["w"])
    assert jnp.any(moved["b"] != params["b"])


def test_methods_descend_with_muon_at_their_own_rate():
    optimizer = descent(Terms(1, 1, STEPS, 0.0), {"optimizer": "muon", "learning_rate": 1 / STEPS})
    updates, _ = jax.jit(optimizer.update)(GRADIENTS, optimizer.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(updates, first_update(GRADIENTS), rtol=1e-4, atol=1e-6)


def test_methods_read_the_momentum_and_the_decay_of_muon():
    given = {"optimizer": "muon", "learning_rate": 0.1}
    other = jax.tree.map(lambda leaf: leaf[..., ::-1] if leaf.ndim else leaf, GRADIENTS)

    def second_update(**options):
        optimizer = descent(Terms(1, 1, STEPS, 0.0), given | options)
        _, state = optimizer.update(GRADIENTS, optimizer.init(PARAMS), PARAMS)
        return optimizer.update(other, state, PARAMS)[0]["wide"]["kernel"]

    plain, decayed = second_update(), second_update(weight_decay=0.5)
    rate = 0.1 * (1 - 1 / STEPS)
    np.testing.assert_allclose(decayed, plain - rate * 0.5 * PARAMS["wide"]["kernel"], rtol=1e-4, atol=1e-5)
    # Without momentum, only the last gradient counts.
    alone = first_update(other, length=rate * STEPS)["wide"]["kernel"]
    np.testing.assert_allclose(second_update(momentum=0.0), alone, rtol=1e-3, atol=1e-5)
    assert np.linalg.norm(plain - alone) > 0.1 * np.linalg.norm(alone)


def test_the_length_may_be_traced():
    update = jax.jit(lambda length: first_update(GRADIENTS, length=length))(2.0)
    chex.assert_trees_all_close(update, first_update(GRADIENTS, length=2.0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        (0, {}, "^steps: got 0, expected an int of at least 1"),
        (-3, {}, "^steps: got -3, expected an int of at least 1"),
        (2.0, {}, r"^steps: got 2\.0, expected an int of at least 1"),
        (None, {}, "^steps: got None, expected an int of at least 1"),
        ([4, 0], {}, "^steps: got 0, expected an int of at least 1"),
        ([], {}, "^steps: got no rounds, expected at least one"),
        (3, {"length": 0.0}, r"^length: got 0\.0, expected a finite positive number"),
        (3, {"length": -1.0}, r"^length: got -1\.0, expected a finite positive number"),
        (3, {"length": np.inf}, "^length: got inf, expected a finite positive number"),
        (3, {"length": np.nan}, "^length: got nan, expected a finite positive number"),
        (3, {"length": np.ones(2)}, r"^length: got shape \(2,\), expected one number"),
        (3, {"length": "far"}, "^length: got 'far', expected a finite positive number"),
    ],
)
def test_bad_arguments_are_refused(steps, options, message):
    with pytest.raises(ValueError, match=message):
        default_optimizer(PARAMS, steps, **options)


def test_complex_parameters_are_refused():
    with pytest.raises(ValueError, match=r"^params: leaf .* is complex, expected real numbers"):
        default_optimizer({"w": jnp.ones((2, 2), complex)}, STEPS)
