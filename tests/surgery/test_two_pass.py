"""`two_pass` takes the same steps as `explicit_step` with `unilateral_surgery`, in less memory."""

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import example, given

import eupmu_jax as eupmu
from eupmu_jax import explicit_step, shared_forward, stack_objectives, tolerances, unilateral_surgery
from eupmu_jax.models import SmallCNN
from eupmu_jax.surgery.two_pass import two_pass

pytestmark = pytest.mark.slow

STEPS = 20


def make_params():
    keys = jax.random.split(jax.random.key(0))
    return {"hidden": jax.random.normal(keys[0], (6, 16)) / 2, "head": jax.random.normal(keys[1], (16, 4)) / 4}


def forward(params, batch):
    return jnp.tanh(batch["x"] @ params["hidden"]) @ params["head"]


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def loss(params, batch):
    return cross_entropy(forward(params, batch), batch)


def make_batches(*sizes):
    """Batches that share inputs but have different labels for each objective, so that the objectives conflict."""
    x = jax.random.normal(jax.random.key(1), (max(sizes), 6))
    return tuple(
        {"x": x[:size], "y": jax.random.randint(jax.random.key(k + 2), (size,), 0, 4)} for k, size in enumerate(sizes)
    )


def adam():
    # Where a gradient vanishes, Adam with a small eps would turn its rounding error into a step.
    return optax.adam(0.02, eps=1e-4)


def both(loss, tolerance=0.0, *, k=2, inner=None, retain_weight=0.0, **options):
    """`(init, step)` of explicit surgery and of `two_pass`."""
    inner = inner or adam()
    chain = optax.chain(unilateral_surgery(tolerance, num_objectives=k, retain_weight=retain_weight), inner)
    return (
        (chain.init, explicit_step(loss, chain, **options)),
        tuple(two_pass(loss, inner, tolerance, num_objectives=k, retain_weight=retain_weight, **options)),
    )


def run(init, step, params, batches, args=lambda t: (), steps=STEPS, **keywords):
    """Final parameters, and the losses, multipliers, Gram matrix and feasibility flags of each step."""
    step, state, seen = jax.jit(step), init(params), []
    for t in range(steps):
        params, state, value = step(params, state, batches, *args(t), **keywords)
        found = [optax.tree_utils.tree_get(state, name) for name in ("multipliers", "gram", "feasible")]
        seen.append((value, *found))
    return params, jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)


def assert_same_steps(pair, *args, rtol=1e-4, atol=2e-5, **keywords):
    """Asserts that both kinds of step give the same results, and returns the multipliers of all steps."""
    (params, seen), (other, others) = (run(init, step, *args, **keywords) for init, step in pair)
    chex.assert_trees_all_close(other, params, rtol=rtol, atol=atol)
    chex.assert_trees_all_close(others, seen, rtol=rtol, atol=atol)
    assert (
        max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (params, args[0])), strict=True)) > 0.05
    )
    return np.asarray(seen[1])


TOLERANCES = {
    "float": lambda k: 0.01,
    "array": lambda k: jnp.linspace(0.0, 0.02, k - 1),
    "schedule": lambda k: optax.linear_schedule(0.0, 0.05, STEPS),
    "budget": lambda k: tolerances.budget(1.6, 1.0),
    "budget from the start": lambda k: tolerances.budget(-0.2, 1.0, relative_to_start=True),
}


@pytest.mark.parametrize(
    ("sizes", "tolerance"),
    [
        ((24, 40), "float"),
        ((24, 24), "schedule"),
        ((24, 40), "budget from the start"),
        ((24, 24, 24), "array"),
        ((24, 16, 40), "budget"),
        ((8, 24, 16, 24, 40), "array"),
    ],
    ids=str,
)
def test_twenty_steps_are_those_of_explicit_surgery(sizes, tolerance):
    k = len(sizes)
    weights = assert_same_steps(both(loss, TOLERANCES[tolerance](k), k=k), make_params(), make_batches(*sizes))
    assert (weights.max(axis=0) > 0.01).sum() >= min(k - 1, 2)


@pytest.mark.parametrize("weight", [0.05, np.array([0.02, 0.2], np.float32)], ids=str)
def test_retain_weights_are_those_of_explicit_surgery(weight):
    multipliers = assert_same_steps(both(loss, k=3, retain_weight=weight), make_params(), make_batches(24, 16, 40))
    assert np.all(multipliers >= weight)
    assert np.any(multipliers > weight + 0.01)


@pytest.mark.parametrize(("mode", "sizes"), [("vmap", (24, 24)), ("unroll", (24, 24)), ("vmap", (24, 40))], ids=str)
def test_both_modes_with_aux_give_the_steps_of_explicit_surgery(mode, sizes):
    def with_aux(params, batch):
        logits = forward(params, batch)
        return cross_entropy(logits, batch), {"accuracy": (logits.argmax(-1) == batch["y"]).mean()}

    pair = both(with_aux, has_aux=True, mode=mode)
    assert assert_same_steps(pair, make_params(), make_batches(*sizes)).max() > 0.1


def test_stacked_batches_are_equivalent_to_a_tuple_of_batches():
    (_, (init, step)), params, batches = both(loss, mode="vmap"), make_params(), make_batches(24, 24)
    chex.assert_trees_all_close(
        run(init, step, params, stack_objectives(*batches)), run(init, step, params, batches), rtol=1e-6
    )


def test_a_key_among_the_arguments_gives_every_pass_the_same_noise():
    def noisy(params, batch, key):
        return loss(params, batch | {"x": batch["x"] + 0.5 * jax.random.normal(key, batch["x"].shape)})

    args = lambda t: (jax.random.fold_in(jax.random.key(7), t),)
    assert assert_same_steps(both(noisy), make_params(), make_batches(24, 40), args).max() > 0.1


def uniform(logits, batch):
    return -jax.nn.log_softmax(logits).mean()


@pytest.mark.parametrize(
    ("shared", "mode"), [(True, "vmap"), (True, "unroll"), (False, "auto")], ids=["shared", "unrolled", "sequence"]
)
def test_each_objective_may_have_a_loss_of_its_own(shared, mode):
    heads = [uniform, cross_entropy]
    separate = [lambda params, batch, head=head: head(forward(params, batch), batch) for head in heads]
    losses = shared_forward(forward, heads) if shared else separate
    _, retain = make_batches(24, 24)
    assert assert_same_steps(both(losses, mode=mode), make_params(), (retain, retain)).max() > 0.05


def test_levels_stand_in_for_the_losses_of_the_batch():
    params, batches, limit = make_params(), make_batches(24, 24), tolerances.budget(1.6, 1.0)
    pair = both(loss, limit)
    slack = assert_same_steps(pair, params, batches, levels=jnp.array([1.0]))
    tight = assert_same_steps(pair, params, batches, levels=jnp.array([1.59]))
    assert slack.max() == 0
    assert tight.max() > 0.1


def test_the_inner_optimizer_may_read_losses_and_parameters_and_hold_a_key():
    seen = []

    def update(updates, state, params=None, *, losses, levels, **extra):
        seen.append((losses.shape, levels))
        return jax.tree.map(lambda u, p: -0.1 * losses[1] * (u + 0.01 * p), updates, params), state

    reader = optax.GradientTransformationExtraArgs(lambda params: (), update)
    inner = optax.chain(optax.add_noise(1e-3, 0.5, 3), reader)
    assert assert_same_steps(both(loss, inner=inner), make_params(), make_batches(24, 40)).max() > 0.1
    assert seen == [((2,), None)] * len(seen)
    assert len(seen) >= 2


def test_other_keywords_reach_the_optimizer():
    # BUG: there was no way to pass `value` to reduce_on_plateau.
    init, step = two_pass(loss, optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()))
    params = make_params()
    _, state, _ = jax.jit(step)(params, init(params), make_batches(24, 40), value=0.25)
    assert optax.tree_utils.tree_get(state, "best_value") == 0.25


def test_donated_scanned_and_looped_steps_agree():
    (_, (init, step)), batches = both(loss, 0.01), make_batches(24, 24)

    def body(carry, _):
        params, state, losses = step(*carry, batches)
        return (params, state), losses

    scan = jax.jit(lambda carry: jax.lax.scan(body, carry, length=STEPS))
    scanned, losses = scan((make_params(), init(make_params())))
    donating = jax.jit(step, donate_argnums=(0, 1))
    params, looped = make_params(), []
    state = init(params)
    for _ in range(STEPS):
        given, moments = params, state.inner_state[0].mu
        params, state, value = donating(params, state, batches)
        assert given["hidden"].is_deleted()
        assert moments["hidden"].is_deleted()
        looped.append(value)
    chex.assert_trees_all_close((scanned, losses), ((params, state), jnp.stack(looped)), rtol=1e-5, atol=1e-6)


def test_fields_are_found_by_name():
    (init, step), params = two_pass(loss, adam()), make_params()
    _, state, _ = jax.jit(step)(params, init(params), make_batches(24, 24))
    get = optax.tree_utils.tree_get
    chex.assert_trees_all_equal(eupmu.multipliers(state), get(state, "multipliers"))
    chex.assert_shape(get(state, "gram"), (2, 2))
    chex.assert_trees_all_equal_shapes(get(state, "mu"), params)
    assert (int(state.surgery_state.count), int(get(state, "nonfinite_count"))) == (1, 0)
    assert bool(get(state, "feasible").all())


def test_the_state_keeps_its_shapes_and_the_parameters_their_types():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), make_params())
    init, step = two_pass(loss, adam(), num_objectives=3)
    state = init(params)
    new_params, new_state, _ = jax.eval_shape(step, params, state, make_batches(8, 8, 8))
    chex.assert_trees_all_equal_shapes_and_dtypes((new_params, new_state), (params, state))
    assert new_state.surgery_state.gram.dtype == jnp.float32


def test_the_number_of_objectives_need_not_be_known_from_the_start():
    params, batches = make_params(), make_batches(24, 24, 24)
    (_, fixed), open_ended = both(loss, 0.01, k=3), two_pass(loss, adam(), 0.01)
    chex.assert_trees_all_close(run(*open_ended, params, batches), run(*fixed, params, batches), rtol=1e-5, atol=1e-6)
    bad = (batches[0] | {"x": batches[0]["x"] * jnp.nan}, *batches[1:])
    kept, state, _ = jax.jit(open_ended.step)(params, open_ended.init(params), bad)
    chex.assert_trees_all_equal(kept, params)
    chex.assert_trees_all_equal(state.surgery_state.multipliers, jnp.zeros(2))


@jax.jit
def scaled_pair(scales):
    """Direction, multipliers and Gram matrix of unilateral surgery and of `two_pass` for two losses times `scales`."""
    params, batches = make_params(), make_batches(24, 24)
    scaled = tuple(batch | {"scale": scale} for batch, scale in zip(batches, scales, strict=True))
    # Keep the direction in the optimizer's state, since differences of parameters would round small ones away.
    keep = optax.GradientTransformation(
        lambda params: {"direction": params}, lambda updates, state, params=None: (updates, {"direction": updates})
    )
    found = []
    for init, step in both(lambda params, batch: batch["scale"] * loss(params, batch), inner=keep):
        _, state, _ = step(params, init(params), scaled)
        found.append({name: optax.tree_utils.tree_get(state, name) for name in ("direction", "multipliers", "gram")})
    return found


@given(st.tuples(st.floats(-6, 6), st.floats(-6, 6)))
@example((-6.0, 6.0))
@example((6.0, -6.0))
@example((-6.0, -6.0))
@example((6.0, 6.0))
def test_the_scales_of_the_losses_affect_only_rounding(exponents):
    (first, second), scales = scaled_pair(jnp.asarray(10.0) ** jnp.array(exponents)), 10.0 ** np.array(exponents)
    for name in ("direction", "multipliers"):
        a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(one[name])]) for one in (first, second))
        np.testing.assert_allclose(b / np.linalg.norm(a), a / np.linalg.norm(a), atol=2e-6)
    np.testing.assert_allclose(
        second["gram"] / np.outer(scales, scales), first["gram"] / np.outer(scales, scales), rtol=1e-4
    )
    assert float(first["multipliers"][0]) > 0


def test_a_loss_without_forward_mode_gives_the_steps_of_explicit_surgery():
    model = nnx.jit(lambda: SmallCNN(4, (4, 8), image_size=8, hidden=16, rngs=nnx.Rngs(0)))()
    graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)

    def classify(params, batch):
        return cross_entropy(nnx.merge(graph, params)(batch["x"]), batch)

    batches = tuple(
        batch | {"x": jax.random.normal(jax.random.key(1), (24, 8, 8, 1))[: len(batch["y"])]}
        for batch in make_batches(16, 24)
    )
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda params: classify(params, batches[0]), (params,), (params,))
    assert assert_same_steps(both(classify), params, batches, rtol=1e-3, atol=2e-4).max() > 0.05


@pytest.mark.parametrize("has_aux", [False, True])
def test_the_inner_optimizer_may_measure_the_retain_loss(has_aux):
    inner = optax.chain(optax.sgd(1.0), eupmu.scale_by_gen(0.1))
    of = (lambda params, batch: (loss(params, batch), {"size": len(batch["y"])})) if has_aux else loss
    pair = both(of, inner=inner, has_aux=has_aux)
    params, batches = make_params(), make_batches(24, 40)
    states = []
    for init, step in pair:
        state, w = init(params), params
        for _ in range(5):
            w, state, _ = jax.jit(step)(w, state, batches)
        states.append(state)
    rates = [float(optax.tree_utils.tree_get(state, "learning_rate")) for state in states]
    assert rates[0] != 0.1
    np.testing.assert_allclose(rates[1], rates[0], rtol=1e-3)


def test_a_small_forget_gradient_is_bent_by_several_constraints():
    losses = [lambda params, batch: -1e-8 * params[0], lambda params, batch: params[0], lambda params, batch: params[1]]
    init, step = two_pass(losses, optax.sgd(1.0), num_objectives=3)
    _, state, _ = step(jnp.zeros(2), init(jnp.zeros(2)), ({"x": jnp.ones(1)},) * 3)
    np.testing.assert_allclose(state.surgery_state.multipliers, [1e-8, 0.0], rtol=1e-5)
