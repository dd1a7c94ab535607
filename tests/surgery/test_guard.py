import functools

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from hypothesis import given, settings

from eupmu_jax import freeze, tolerances, unilateral_surgery, utility_guard

PARAMS = {"w": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.linspace(0, 1, 3), "scale": jnp.array(0.5)}
SIZE = 10

OPTIMIZERS = {
    "sgd": lambda scale: optax.sgd(0.1 * scale, momentum=0.9),
    "adam": lambda scale: optax.adam(1e-2 * scale),
    "adamw": lambda scale: optax.adamw(1e-2 * scale, weight_decay=0.1),
    "muon": lambda scale: optax.contrib.muon(1e-2 * scale),
    "schedule_free": lambda scale: optax.contrib.schedule_free_adamw(1e-2 * scale),
}

few = settings(max_examples=40)
seeds = st.integers(0, 10_000)
exponents = st.floats(-8, 8)
shares = st.sampled_from([0.0, 0.3])
kinds = st.sampled_from(["independent", "duplicated", "opposite"])


def flat(tree):
    """The leaves concatenated in float64; the leading axes are those of the scalar leaf."""
    leading = np.shape(tree["scale"])
    return np.concatenate([np.asarray(leaf, np.float64).reshape(*leading, -1) for leaf in jax.tree.leaves(tree)], -1)


def unflat(rows, dtype=jnp.float32):
    """The inverse of `flat`: a tree like `PARAMS`."""
    leaves, structure = jax.tree.flatten(PARAMS)
    parts = np.split(np.asarray(rows), np.cumsum([leaf.size for leaf in leaves])[:-1], axis=-1)
    shaped = [part.reshape((*part.shape[:-1], *leaf.shape)) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, [jnp.asarray(leaf, dtype) for leaf in shaped])


def norm(rows):
    return np.linalg.norm(rows, axis=-1)


def retain_rows(rng, k, kind, exponents):
    """K-1 retain gradients, each with its own scale."""
    rows = rng.normal(size=(k - 1, SIZE))
    if kind != "independent" and k > 2:
        rows[-1] = rows[0] if kind == "duplicated" else -rows[0]
    return rows * 10.0 ** np.resize(exponents, k - 1)[:, None]


def proposes(update):
    """An optimizer that always returns this update."""
    return optax.GradientTransformation(
        lambda params: optax.EmptyState(), lambda g, state, params=None: (update, state)
    )


@jax.jit
def guarded(proposal, retain, tolerance):
    """The guarded update of a proposal; compiled once for each K and dtype."""
    grads = jax.tree.map(lambda leaf: jnp.concatenate([jnp.zeros_like(leaf[:1]), leaf]), retain)
    tx = utility_guard(proposes(proposal), tolerance)
    return tx.update(grads, tx.init(proposal), proposal)


def assert_within(tolerance, rows, update, proposal, rounding=1e-5):
    # A proposal that cancels entirely leaves only its rounding errors, whose direction means nothing.
    size = norm(rows) * np.maximum(norm(update), 0.1 * rounding * norm(proposal))[..., None]
    assert np.all(np.einsum("...kn,...n->...k", rows, update) <= tolerance + rounding * (size + np.abs(tolerance)))


@functools.partial(jax.jit, static_argnums=0)
def run(name, scale, grads, tolerance):
    """Proposals, updates and feasibility flags of some steps."""
    inner = optax.with_extra_args_support(OPTIMIZERS[name](scale))
    k = len(tolerance) + 1
    tx = utility_guard(inner, tolerance)

    def step(state, grads):
        # Keep the parameters fixed, since weight decay at a learning rate of 1e5 would make them overflow float32.
        direction, _ = unilateral_surgery(num_objectives=k).update(grads, state.surgery_state, PARAMS)
        proposal, _ = inner.update(direction, state.inner_state, PARAMS)
        update, state = tx.update(grads, state, PARAMS)
        return state, (proposal, update, state.guard_feasible)

    return jax.lax.scan(step, tx.init(PARAMS), grads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "k"),
    [("sgd", 2), ("sgd", 3), ("sgd", 6), ("adam", 2), ("adamw", 6), ("muon", 3), ("schedule_free", 3)],
)
@few
@given(seeds, exponents, st.lists(exponents, min_size=2, max_size=2), exponents, shares, kinds)
def test_no_optimizer_raises_a_retain_loss_by_more_than_the_tolerance(
    name, k, seed, forget, retain, scale, share, kind
):
    rng = np.random.default_rng(seed)
    steps = 5
    rows = np.stack([retain_rows(rng, k, kind, retain) for _ in range(steps)])
    unit = rows / norm(rows)[..., None]
    forget_rows = 10.0**forget * (rng.normal(size=SIZE) - rng.uniform(0, 3, size=(steps, k - 1, 1)) * unit).sum(axis=1)
    grads = unflat(np.concatenate([forget_rows[:, None], rows], axis=1))
    step_size = 0.1 * norm(forget_rows).mean() if name == "sgd" else 1e-2
    tolerance = jnp.asarray(share * 10.0**scale * step_size * norm(rows).min(axis=0), jnp.float32)

    state, (proposals, updates, feasible) = run(name, 10.0**scale, grads, tolerance)
    assert state.count == steps
    assert np.all(feasible)
    assert_within(np.asarray(tolerance, np.float64), flat(grads)[:, 1:], flat(updates), flat(proposals))


# What the projection leaves of the proposal, from nothing (0) to almost everything.
remainders = st.one_of(st.just(0.0), st.floats(-8, 1).map(lambda e: 10.0**e))


@pytest.mark.parametrize("k", [2, 3, 6])
@few
@given(seeds, st.lists(exponents, min_size=2, max_size=2), exponents, remainders, shares, kinds)
def test_what_remains_after_cancellation_meets_the_constraints_too(k, seed, retain, scale, remainder, share, kind):
    rng = np.random.default_rng(seed)
    rows = retain_rows(rng, k, kind, retain)
    proposal = rng.uniform(0, 1, k - 1) @ (rows / norm(rows)[:, None]) + remainder * rng.normal(size=SIZE)
    proposal, rows = unflat(10.0**scale * proposal), unflat(rows)
    tolerance = np.float32(share * norm(flat(rows)) * norm(flat(proposal)))
    update, state = guarded(proposal, rows, tolerance)
    assert_within(tolerance.astype(np.float64), flat(rows), flat(update), flat(proposal))
    # BUG: with three or more objectives, rounding errors of the second projection counted as violations.
    assert np.all(state.guard_feasible)


@given(seeds, st.sampled_from([0.01, 0.03, 0.1]))
def test_nearly_parallel_constraints_are_met(seed, angle):
    # BUG: at an angle of 0.01, two projections left up to 5e-4 of the update violating a constraint.
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=SIZE) + angle * rng.normal(size=(5, SIZE))
    proposal = unflat(rng.uniform(0, 1, 5) @ rows + 10.0 ** rng.uniform(-6, 0) * rng.normal(size=SIZE))
    update, _ = guarded(proposal, unflat(rows), np.zeros(5, np.float32))
    assert_within(0, flat(unflat(rows)), flat(update), flat(proposal))


@pytest.mark.parametrize("k", [2, 3])
@given(seeds, exponents, remainders, kinds)
def test_bfloat16_meets_the_constraints_up_to_its_own_rounding(k, seed, scale, remainder, kind):
    rng = np.random.default_rng(seed)
    rows = retain_rows(rng, k, kind, 0.0)
    proposal = rng.uniform(0, 1, k - 1) @ rows + remainder * rng.normal(size=SIZE)
    proposal, rows = unflat(10.0**scale * proposal, jnp.bfloat16), unflat(rows, jnp.bfloat16)
    update, state = guarded(proposal, rows, np.zeros(k - 1, np.float32))
    chex.assert_trees_all_equal_dtypes(update, proposal)
    assert_within(0, flat(rows), flat(update), flat(proposal), rounding=2.0**-8)
    assert np.all(state.guard_feasible)


def projection(proposal, rows, tolerance):
    """The nearest point that meets the constraints, by least distance programming (Lawson and Hanson, 1974)."""
    size = norm(proposal)
    excess = (rows @ proposal - tolerance) / norm(rows) / size
    system = np.vstack([-(rows / norm(rows)[:, None]).T, excess])
    target = np.zeros(len(system))
    target[-1] = 1
    weights, _ = scipy.optimize.nnls(system, target)
    residual = system @ weights - target
    return proposal - size * residual[:-1] / residual[-1]


@pytest.mark.parametrize("k", [2, 3, 6])
@few
@given(seeds, st.lists(exponents, min_size=2, max_size=2), exponents, st.sampled_from([-0.2, 0.0, 0.3]), kinds)
def test_the_update_is_the_nearest_one_within_the_constraints(k, seed, retain, scale, share, kind):
    rng = np.random.default_rng(seed)
    rows = retain_rows(rng, k, kind, retain)
    proposal = 10.0**scale * (rng.uniform(-0.5, 1, k - 1) @ (rows / norm(rows)[:, None]) + rng.normal(size=SIZE))
    proposal, rows = unflat(proposal), unflat(rows)
    if kind == "opposite":
        share = abs(share)  # Demands on opposite gradients are contradictory.
    tolerance = np.float32(share * norm(flat(rows)) * norm(flat(proposal)))
    update, _ = guarded(proposal, rows, tolerance)
    expected = projection(flat(proposal), flat(rows), tolerance.astype(np.float64))
    assert_within(tolerance, flat(rows), flat(update), flat(proposal))
    # For some opposite rows the reference fails to find the nearest point.
    if norm(flat(update) - flat(proposal)) > (1 - 1e-3) * norm(expected - flat(proposal)):
        np.testing.assert_allclose(flat(update), expected, rtol=0, atol=1e-5 * norm(flat(proposal)))


def test_surgery_on_a_part_of_the_parameters_uses_the_gram_matrix_of_that_part():
    params = {"trained": jnp.zeros(2), "frozen": jnp.zeros(2)}
    grads = {"trained": jnp.array([[-1.0, 1.0], [1.0, 0.0]]), "frozen": jnp.array([[5.0, 0.0], [-9.0, 0.0]])}
    surgery = freeze(unilateral_surgery(), {"trained": False, "frozen": True})
    guard = utility_guard(optax.sgd(1.0), 10.0, surgery)
    update, state = guard.update(grads, guard.init(params), params)
    np.testing.assert_allclose(state.surgery_state.gram, [[2.0, -1.0], [-1.0, 1.0]])
    np.testing.assert_allclose(update["trained"], [0.0, -1.0], atol=1e-6)


def test_given_levels_take_precedence_over_measured_losses():
    guard = utility_guard(optax.sgd(1.0), tolerances.budget(1.0, 1.0), unilateral_surgery(jnp.inf), max_halvings=3)
    params, rows = jnp.zeros(2), jnp.array([[-1.0, 0.0], [1.0, 0.0]])
    value_fn = lambda p: jnp.array([-10.0 + p[0]])
    update, _ = guard.update(rows, guard.init(params), params, value_fn=value_fn, levels=jnp.array([1.0]))
    np.testing.assert_allclose(update, 0, atol=1e-6)
    update, _ = guard.update(rows, guard.init(params), params, value_fn=value_fn)
    np.testing.assert_allclose(update, [1, 0], atol=1e-6)


def test_a_step_undone_by_backtracking_meets_no_demand():
    guard = utility_guard(optax.sgd(1.0), tolerances.budget(0.5, 1.0), max_halvings=2)
    params, rows = jnp.zeros(2), jnp.array([[-1.0, 0.0], [1.0, 0.0]])
    # Every step increases the loss.
    value_fn = lambda p: jnp.array([1.0 + jnp.abs(p).sum()])
    update, state = guard.update(rows, guard.init(params), params, value_fn=value_fn)
    np.testing.assert_array_equal(update, 0)
    assert (float(state.step_scale), state.guard_feasible.tolist()) == (0.0, [False])


def test_losses_in_half_precision_do_not_widen_the_tolerance():
    # BUG: 2 + 0.01 was rounded to 2.0156 in bfloat16, and a loss of 2.0156 was let through.
    guard = utility_guard(optax.sgd(1.0), tolerances.budget(2.01, 1.0), max_halvings=4)
    w, grads = jnp.array(2.0), jnp.array([-0.02, 0.0])
    value_fn = lambda w: w[None].astype(jnp.bfloat16)
    update, state = guard.update(grads, guard.init(w), w, value_fn=value_fn)
    assert (value_fn(w + update)[0], state.step_scale) == (2.0, 0.25)


def test_value_fn_must_return_the_retain_losses_only():
    guard, params = utility_guard(optax.sgd(1.0), 0.0, max_halvings=1), jnp.zeros(2)
    with pytest.raises(ValueError, match=r"^value_fn: returned shape \(2,\), expected \(1,\)"):
        guard.update(jnp.ones((2, 2)), guard.init(params), params, value_fn=lambda p: jnp.ones(2))


@pytest.mark.slow
def test_a_demand_that_contradicts_the_others_does_not_undo_them():
    # BUG: later rounds demanded it again, so the update ended where the largest demand was violated most.
    demands = tolerances.stateless(lambda count, levels: jnp.array([-3.0, -1.0]), 2)
    guard = utility_guard(optax.sgd(1.0), demands)
    rows, params = jnp.array([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]), jnp.zeros(2)
    update, state = guard.update(rows, guard.init(params), params)
    np.testing.assert_allclose(update, [-3.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(state.guard_multipliers, [3.0, 0.0], atol=1e-6)
    assert state.guard_feasible.tolist() == [True, False]


def test_a_proposal_whose_length_overflows_is_refused():
    tx = utility_guard(optax.scale(-1e25), 0.1)
    grads = jnp.array([[-1.0, 1.0], [1.0, 0.0]])
    update, state = tx.update(grads, tx.init(grads[0]), grads[0])
    np.testing.assert_array_equal(update, 0)
    assert (state.count, state.nonfinite_count) == (0, 1)


def test_a_tolerance_that_is_nan_refuses_the_step():
    guard = utility_guard(optax.sgd(1.0), lambda count: jnp.nan)
    rows = jnp.array([[-1.0, 1.0], [1.0, 0.0]])
    update, state = guard.update(rows, guard.init(rows[0]), rows[0])
    np.testing.assert_array_equal(update, 0)
    assert (state.count, state.nonfinite_count) == (0, 1)


@pytest.mark.parametrize(
    ("max_halvings", "given"),
    [(0, {"losses": jnp.array([jnp.nan, 1.0])}), (1, {"value_fn": lambda params: jnp.array([jnp.nan])})],
)
def test_a_loss_that_is_nan_refuses_the_step_whether_or_not_the_tolerance_reads_it(max_halvings, given):
    guard = utility_guard(optax.sgd(1.0), 0.0, unilateral_surgery(), max_halvings=max_halvings)
    rows = jnp.array([[-1.0, 1.0], [1.0, 0.0]])
    update, state = guard.update(rows, guard.init(rows[0]), rows[0], **given)
    np.testing.assert_array_equal(update, 0)
    assert (state.count, state.nonfinite_count) == (0, 1)


def test_a_correction_that_overflows_is_refused():
    guard = utility_guard(optax.sgd(1.0), tolerances.budget(0.1, 1e4))
    rows = jnp.array([[1.0, 0.0], [0.0, 1e-18]])
    update, state = guard.update(rows, guard.init(rows[0]), rows[0], losses=jnp.array([1.0, 1e10]))
    np.testing.assert_array_equal(update, 0)
    assert (state.count, state.nonfinite_count) == (0, 1)


def test_a_step_after_which_the_loss_is_nan_is_shortened():
    guard = utility_guard(optax.sgd(1.0), 0.0, max_halvings=3)
    params, rows = jnp.zeros(2), jnp.array([[-1.0, 0.0], [0.0, 1.0]])
    value_fn = lambda p: jnp.where(p[:1] > 0.3, jnp.nan, 1.0)
    update, state = guard.update(rows, guard.init(params), params, value_fn=value_fn)
    assert (update.tolist(), float(state.step_scale)) == ([0.25, 0.0], 0.25)


def test_above_the_limit_any_measured_decrease_is_enough():
    guard = utility_guard(optax.sgd(1.0), tolerances.budget(0.5, 1.0), max_halvings=3)
    params, rows = jnp.zeros(2), jnp.array([[0.0, 0.0], [1.0, 0.0]])
    # The slope promises to bring the loss from 1 to its limit, but it falls by a tenth of that.
    update, state = guard.update(rows, guard.init(params), params, value_fn=lambda p: 1 + 0.1 * p[:1])
    np.testing.assert_allclose(update, [-0.5, 0.0], rtol=1e-6)
    assert (float(state.step_scale), state.guard_feasible.tolist()) == (1.0, [True])


def test_a_surgery_of_another_number_of_objectives_is_named():
    guard = utility_guard(optax.sgd(1.0), 0.0, unilateral_surgery(), num_objectives=3)
    with pytest.raises(ValueError, match=r"^surgery: its state changes shape in an update; pass num_objectives=3"):
        guard.update(jnp.eye(3), guard.init(jnp.zeros(3)), jnp.zeros(3))
