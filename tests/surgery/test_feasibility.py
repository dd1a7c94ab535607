import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from eupmu_jax import best_feasible, furthest_feasible
from eupmu_jax._stack.jaxpr import equations


def track(checks, limit=1.0, patience=10):
    """The state after checks of (forget loss, level); each checkpoint is the index of its check, starting at `init`."""
    tracker = best_feasible(limit, patience)
    state = tracker.init(jnp.array(0), *checks[0])
    for i, check in enumerate(checks[1:], start=1):
        state = tracker.update(state, jnp.array(i), *check)
    return state


@pytest.mark.parametrize(
    ("checks", "best", "feasible"),
    [
        ([(5.0, 0.5), (4.0, 0.9)], 1, True),
        ([(5.0, 0.5), (4.0, 1.0)], 1, True),
        ([(5.0, 0.5), (6.0, 0.1)], 0, True),
        ([(5.0, 0.5), (5.0, 0.1)], 0, True),
        ([(5.0, 0.5), (0.0, 1.001)], 0, True),
        ([(5.0, 2.0), (9.0, 1.5)], 1, False),
        ([(5.0, 2.0), (0.0, 2.5)], 0, False),
        ([(5.0, 2.0), (4.0, 2.0)], 1, False),
        ([(5.0, 2.0), (9.0, 1.0)], 1, True),
        ([(5.0, 2.0), (1.0, 1.5), (9.0, 0.5), (8.0, 0.9), (0.0, 1.1)], 3, True),
    ],
    ids=[
        "forgets more",
        "at its limit",
        "forgets less",
        "a tie keeps the first",
        "above its limit",
        "a smaller violation",
        "a larger violation",
        "the same violation, forgets more",
        "repaired",
        "repaired, then forgets more",
    ],
)
def test_which_checkpoint_is_kept(checks, best, feasible):
    state = track(checks)
    assert state.params == best
    np.testing.assert_allclose((state.forget_loss, state.levels[0]), checks[best])
    assert state.feasible == feasible


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_checkpoint_that_is_not_finite_is_never_kept(bad):
    for start in (0.5, 2.0):
        state = track([(5.0, start), (bad, 0.1), (0.0, bad)])
        assert state.params == 0
        assert not state.progressed
        assert state.stalled == 2


def test_the_largest_violation_of_several_limits_counts():
    limits = np.array([1.0, 2.0])
    assert track([(5.0, jnp.array([1.0, 2.0])), (1.0, jnp.array([0.0, 2.1]))], limits).params == 0
    state = track([(5.0, jnp.array([1.5, 2.5])), (9.0, jnp.array([0.0, 2.6])), (9.0, jnp.array([1.4, 2.4]))], limits)
    assert state.params == 2
    assert not state.feasible
    np.testing.assert_allclose(state.levels, [1.4, 2.4])
    assert track([(5.0, jnp.array([1.0, 2.0])), (1.0, jnp.array([0.9, 1.1]))], limit=1.0).params == 1


def test_patience_counts_checks_without_progress():
    start, worse, above = (5.0, 0.5), (6.0, 0.5), (0.0, 1.5)
    assert not track([start, above, worse], patience=3).infeasible
    assert track([start, above, worse, above], patience=3).infeasible


def test_one_checkpoint_with_progress_disproves_infeasibility_for_good():
    state = track([(5.0, 0.5), (4.0, 0.5)] + [(0.0, 1.5)] * 5, patience=3)
    assert (state.progressed, state.stalled, state.infeasible) == (True, 5, False)
    # Late progress revokes the verdict.
    state = track([(5.0, 0.5)] + [(0.0, 1.5)] * 5 + [(4.0, 0.5)], patience=3)
    assert (state.params, state.progressed, state.stalled, state.infeasible) == (6, True, 0, False)


def test_scan_equals_a_loop_outside_jit():
    rng = np.random.default_rng(0)
    forget, levels = rng.uniform(0, 5, size=20), rng.uniform(0, 2, size=(20, 2))
    levels[:5] += 1.0
    forget[12], levels[14, 1] = np.nan, np.inf
    tracker = best_feasible(np.array([1.0, 1.5]), patience=3)

    def checkpoint(i):
        return {"w": jnp.full((2, 3), i, jnp.bfloat16), "n": jnp.asarray(i, jnp.int32)}

    start = state = tracker.init(checkpoint(0), 5.0, jnp.array([3.0, 3.0]))
    looped = []
    for i in range(20):
        state = tracker.update(state, checkpoint(i + 1), forget[i], jnp.asarray(levels[i], jnp.float32))
        looped.append(state)

    def step(state, inputs):
        state = tracker.update(state, *inputs)
        return state, state

    checkpoints = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[checkpoint(i + 1) for i in range(20)])
    inputs = (checkpoints, jnp.asarray(forget, jnp.float32), jnp.asarray(levels, jnp.float32))
    _, scanned = jax.jit(lambda state: jax.lax.scan(step, state, inputs))(start)
    chex.assert_trees_all_equal(scanned, jax.tree.map(lambda *leaves: jnp.stack(leaves), *looped))
    assert 2 < len(np.unique(scanned.params["n"])) < 20
    assert scanned.progressed[-1]


def test_the_start_survives_the_donation_of_the_parameters():
    tracker, params = best_feasible(1.0), {"w": jnp.ones(3)}
    state = jax.jit(tracker.init)(params, 5.0, 0.5)
    eager = tracker.init(params, 5.0, 0.5)
    jax.jit(lambda params: jax.tree.map(lambda leaf: leaf + 1, params), donate_argnums=0)(params)
    assert params["w"].is_deleted()
    for kept in (state, eager):
        np.testing.assert_array_equal(kept.params["w"], 1)


def test_the_first_loss_and_levels_survive_the_donation_of_the_state():
    # BUG: the state held the caller's own arrays, which donating the state deleted.
    tracker, loss, levels = best_feasible(1.0), jnp.float32(5.0), jnp.array([0.5])
    jax.jit(lambda state: state, donate_argnums=0)(tracker.init(jnp.ones(3), loss, levels))
    assert float(loss) == 5.0
    assert levels.tolist() == [0.5]


def test_a_scalar_level_is_that_of_a_single_constraint():
    tracker = best_feasible(1.0)
    state = tracker.init(jnp.zeros(2), 5.0, 0.5)
    chex.assert_shape(state.levels, (1,))
    one = tracker.update(state, jnp.ones(2), 4.0, jnp.array([0.7]))
    chex.assert_trees_all_equal(one, tracker.update(state, jnp.ones(2), jnp.array(4.0), jnp.array(0.7)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"limit": float("nan")}, "^limit: got nan"),
        ({"limit": np.array([0.1, np.nan])}, r"^limit: got \["),
        ({"limit": 1.0, "patience": 0}, "^patience: got 0"),
    ],
)
def test_the_factory_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        best_feasible(**kwargs)


def squared(params):
    return jnp.sum(params["w"] ** 2)[None]


@pytest.mark.filterwarnings("ignore:furthest_feasible")
@given(st.floats(0.01, 8.9), st.integers(3, 12))
def test_the_furthest_feasible_point_is_found_to_the_requested_resolution(limit, bisections):
    inside, outside = {"w": jnp.zeros(2)}, {"w": jnp.array([0.0, 3.0])}
    found = furthest_feasible(squared, limit, inside, outside, bisections)
    crossing = np.sqrt(limit)
    assert crossing - 3 * 2.0**-bisections - 1e-6 <= found.params["w"][1] <= crossing + 1e-6
    np.testing.assert_allclose(3 * found.t, found.params["w"][1], rtol=1e-6)
    np.testing.assert_allclose(found.levels, squared(found.params), rtol=1e-6)


def test_a_segment_within_the_limits_is_followed_to_its_end_and_one_beyond_them_not_at_all():
    inside, outside = jnp.array([0.1, 0.7]), jnp.array([0.3, 1.1])
    find = jax.jit(lambda limit: furthest_feasible(lambda p: p, limit, inside, outside))
    chex.assert_trees_all_equal(tuple(find(jnp.array([1.0, 2.0]))), (outside, jnp.float32(1), outside))
    for limit in ([0.0, 2.0], [1.0, jnp.nan]):
        chex.assert_trees_all_equal(tuple(find(jnp.array(limit))), (inside, jnp.float32(0), jnp.full(2, jnp.nan)))
    # BUG: a step that had diverged turned the checkpoint to be restored into NaN.
    diverged = jnp.array([jnp.inf, jnp.nan])
    find = jax.jit(lambda outside: furthest_feasible(lambda p: p, 1.0, inside, outside))
    chex.assert_trees_all_equal(find(diverged).params, inside)
    with pytest.warns(UserWarning, match="only 0 of the distance"):
        chex.assert_trees_all_equal(furthest_feasible(lambda p: p, 1.0, inside, diverged).params, inside)


@pytest.mark.parametrize("limit", [2.25, 3.3, 7.0, 9.0, np.array([7.0]), [7.0]])
def test_a_host_function_gives_the_result_of_a_traced_one(limit):
    # BUG: only traceable functions were accepted.
    calls = []

    def on_host(params):
        calls.append(None)
        return np.array([sum(float(w) ** 2 for w in np.asarray(params["w"]))])

    inside, outside = {"w": jnp.zeros(2)}, {"w": jnp.array([0.0, 3.0])}
    by_host = furthest_feasible(on_host, limit, inside, outside, 7)
    by_jit = jax.jit(lambda inside, outside: furthest_feasible(squared, limit, inside, outside, 7))(inside, outside)
    assert len(calls) == (1 if limit == 9.0 else 8)
    assert isinstance(by_host.levels, np.ndarray)
    chex.assert_trees_all_close(by_host, by_jit, rtol=1e-6)


def test_under_jit_the_number_of_measurements_is_as_documented():
    # Once in each iteration of the loop, and once at the end.
    measure = lambda params: jnp.arctan(params)
    search = lambda inside, outside: furthest_feasible(measure, 0.5, inside, outside, 6)
    found = equations(search, jnp.zeros(2), jnp.ones(2))
    assert sum(times for equation, times in found if equation.primitive.name == "atan") == 7


def test_a_short_way_is_warned_about_at_the_callers_line():
    inside, outside = jnp.zeros(1), jnp.ones(1)
    with pytest.warns(UserWarning, match="only 0.438 of the distance") as warned:
        found = furthest_feasible(lambda p: p, 0.49, inside, outside, 4)
    assert (float(found.t), warned[0].filename) == (0.4375, __file__)
    # Any other warning is an error in these tests.
    assert furthest_feasible(lambda p: p, 0.51, inside, outside, 4).t == 0.5


def test_random_keys_are_not_interpolated():
    # BUG: they were interpolated, which failed with a message about dtypes.
    def point(w, seed):
        return {"w": jnp.full(2, w), "key": jax.random.key(seed)}

    find = lambda limit: furthest_feasible(squared, limit, point(0.0, 0), point(3.0, 1))
    for limit, seed in ((9.0, 0), (100.0, 1)):
        chex.assert_trees_all_equal(find(limit).params["key"], jax.random.key(seed))
        chex.assert_trees_all_equal(jax.jit(find)(limit).params["key"], jax.random.key(seed))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bisections": 0}, "^bisections: got 0"),
        ({"limit": float("nan")}, "^limit: got nan"),
        ({"limit": np.ones(3)}, r"^limit: got shape \(3,\), but measure returned \(1,\)"),
        ({"outside": jnp.ones((2, 1))}, r"^outside: leaf the tree itself has shape \(2, 1\), but \(1,\) in inside"),
        ({"outside": {"w": jnp.ones(1)}}, "^outside: got structure"),
    ],
)
def test_furthest_feasible_refuses(kwargs, message):
    given = {"limit": 1.0, "inside": jnp.zeros(1), "outside": jnp.ones(1)} | kwargs
    with pytest.raises(ValueError, match=message):
        furthest_feasible(lambda p: p, **given)


def test_a_first_checkpoint_that_is_not_finite_is_replaced_by_any_other():
    tracker = best_feasible(limit=0.1)
    state = tracker.init(jnp.array(0.0), forget_loss=jnp.nan, levels=0.05)
    state = tracker.update(state, jnp.array(1.0), forget_loss=3.0, levels=0.09)
    assert (float(state.params), bool(state.feasible)) == (1.0, True)


def test_a_start_above_the_limit_is_warned_about():
    with pytest.warns(UserWarning, match=r"inside itself exceeds the limit, 4\.0 > 1\.0"):
        found = furthest_feasible(lambda w: w**2, 1.0, jnp.array(2.0), jnp.array(3.0))
    assert (float(found.params), float(found.t)) == (2.0, 0.0)


def test_counts_and_flags_are_not_interpolated():
    # BUG: halfway from 5 to 3 was 132 as an unsigned byte, and a flag could not be subtracted.
    inside = {"w": jnp.zeros(1), "steps": jnp.array(5, jnp.uint8), "flag": jnp.array(True)}
    outside = {"w": jnp.full(1, 2.0), "steps": jnp.array(3, jnp.uint8), "flag": jnp.array(False)}
    found = furthest_feasible(lambda params: jnp.sum(params["w"] ** 2), 2.25, inside, outside)
    assert (int(found.params["steps"]), bool(found.params["flag"])) == (5, True)
    found = furthest_feasible(lambda params: jnp.sum(params["w"] ** 2), 9.0, inside, outside)
    assert (int(found.params["steps"]), bool(found.params["flag"])) == (3, False)


def test_there_must_be_as_many_levels_as_limits():
    # BUG: one level was compared with each of two limits.
    tracker = best_feasible(jnp.array([0.1, 10.0]))
    with pytest.raises(ValueError, match=r"^levels: got shape \(1,\), expected \(2,\)"):
        tracker.init(jnp.zeros(1), 1.0, 5.0)
    state = tracker.init(jnp.zeros(1), 1.0, jnp.array([0.0, 5.0]))
    with pytest.raises(ValueError, match=r"^levels: got shape \(3,\), expected \(2,\)"):
        tracker.update(state, jnp.zeros(1), 1.0, jnp.zeros(3))


def test_forget_losses_are_compared_at_full_precision_like_levels():
    with jax.enable_x64(True):
        tracker = best_feasible(0.1)
        state = tracker.init(jnp.zeros(1), 1.0, 0.0)
        assert tracker.update(state, jnp.ones(1), 1 - 1e-9, 0.0).progressed


def test_approaching_the_limit_without_keeping_it_is_no_progress():
    best = best_feasible(1.0, patience=2)
    state = best.init(jnp.array(0.0), 0.0, 3.0)
    for _ in range(3):
        assert not state.infeasible
        state = best.update(state, jnp.array(1.0), 0.0, 2.0)
    assert (bool(state.progressed), bool(state.infeasible), float(state.params)) == (False, True, 1.0)


def test_the_levels_at_the_start_are_returned_where_nothing_beyond_it_keeps_the_limit():
    # BUG: the measured levels were discarded, and NaN was returned.
    with pytest.warns(UserWarning, match="only 0 of the distance"):
        found = furthest_feasible(lambda w: np.array(w**2), 0.5, 0.7, 9.0, bisections=2)
    assert (float(found.params), float(found.t), float(found.levels)) == (pytest.approx(0.7), 0, pytest.approx(0.49))


def test_a_start_at_its_limit_keeps_it():
    with pytest.warns(UserWarning, match="only 0 of the distance"):
        found = furthest_feasible(lambda w: np.array(w**2), 0.25, 0.5, 9.0, bisections=2)
    assert (float(found.params), float(found.t), float(found.levels)) == (0.5, 0.0, 0.25)


def test_under_jit_unknown_levels_are_nan_for_a_measure_that_counts_too():
    count = lambda params: jnp.sum(params > 0.3, keepdims=True)
    found = jax.jit(lambda limit: furthest_feasible(count, limit, jnp.zeros(2), jnp.ones(2)))(-1)
    assert (float(found.t), np.isnan(found.levels).all()) == (0.0, True)
