"""`scale_by_limit`: its rule by hand, what it leaves alone, and a learning rate that ruins a model without it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eupmu_jax import unlearn
from eupmu_jax.controllers import scale_by_limit
from experiments.level import run as level

NAMES = ("forget", "retain", "held_out")


def run(tx, figures):
    """The scales of the updates for given errors of the retain batch, and the last state."""
    state, scales, update = tx.init(jnp.zeros(3)), [], jax.jit(tx.update)
    for figure in figures:
        updates, state = update(jnp.ones(3), state, errors=np.array([0.9, figure], np.float32))
        scales.append(float(updates[0]))
    return scales, state


def by_hand(figures, limit, start=0.1, growth=1.3, shrink=0.5, least=1e-3):
    scale, average, scales = start, 0.0, []
    for figure in figures:
        scale = max(shrink * scale, least) if figure > max(limit, average) else min(growth * scale, 1.0)
        average = (average + figure) / 2
        scales.append(scale)
    return scales


@pytest.mark.slow
@given(st.lists(st.floats(0, 1, width=16), min_size=1, max_size=12), st.sampled_from([0.0, 0.25, 0.5]))
def test_scales_are_those_of_the_rule(figures, limit):
    scales, _ = run(scale_by_limit(limit), figures)
    np.testing.assert_allclose(scales, by_hand(figures, limit), rtol=1e-5)


def longer_by_hand(errors, limit, target, safe, most):
    """The rule with its averages as weighted sums instead of recursions."""
    scale, scales, peak = 0.5, [], 0.5
    for t in range(len(errors)):
        weights = 0.9 ** np.arange(t + 1)[::-1]
        forget, retain = np.average(np.array(errors[: t + 1]), axis=0, weights=weights)
        past = sum(2.0 ** (k - t) * errors[k][1] for k in range(t))
        bound = 1.0 if forget >= target else most if retain <= safe else max(scale, 1.0)
        bound = max(bound, peak) if retain > limit else bound
        scale = max(0.5 * scale, 1e-3) if errors[t][1] > max(limit, past) else min(1.3 * scale, bound)
        peak = max(peak, scale)
        scales.append(scale)
    return scales


# The averages of these figures stay away from the thresholds by more than their rounding errors.
FIGURES = st.tuples(st.sampled_from([0.0, 0.25, 1.0]), st.sampled_from([0.0, 0.25, 0.5, 1.0]))


@pytest.mark.slow
@given(st.lists(FIGURES, min_size=1, max_size=16))
def test_steps_are_longer_where_the_forget_set_is_short_of_its_target_and_the_retain_set_safe(errors):
    options = {"target": 0.4003, "safe": 0.1007, "most": 3.0}
    tx = scale_by_limit(0.3, start=0.5, **options)
    step = lambda state, figures: tx.update(jnp.ones(()), state, errors=figures)[::-1]
    _, scales = jax.lax.scan(step, tx.init(jnp.ones(())), jnp.array(errors))
    np.testing.assert_allclose(scales, longer_by_hand(errors, 0.3, **options), rtol=1e-5)


def test_with_a_target_a_forget_figure_that_is_not_finite_changes_no_state():
    tx = scale_by_limit(0.1, target=0.5, safe=0.05, most=30.0)
    _, state = run(tx, [0.0])
    _, after = tx.update(jnp.ones(3), state, errors=jnp.array([np.nan, 0.0]))
    chex.assert_trees_all_equal(after, state)
    # Without a target the forget figure is ignored.
    _, after = scale_by_limit(0.1).update(jnp.ones(3), state, errors=jnp.array([np.nan, 0.0]))
    chex.assert_tree_all_finite(after)
    assert after.scale > state.scale


@pytest.mark.parametrize("name", ["limit", "margin", "growth", "shrink", "least", "start", "target", "safe", "most"])
def test_each_argument_is_one_number(name):
    # BUG: an array of limits scaled the parameters column by column.
    values = np.full(2, {"growth": 1.5, "most": 2.0}.get(name, 0.1))
    with pytest.raises(ValueError, match=rf"^{name}: got shape \(2,\), expected one number"):
        scale_by_limit(**{"limit": 0.1, name: values})


def test_the_least_scale_may_not_exceed_the_first():
    # BUG: exceeding the limit made the steps ten times longer.
    with pytest.raises(ValueError, match=r"^least: got 1.0, expected at most `start`, 0.1"):
        scale_by_limit(0.1, start=0.1, least=1.0)


def test_steps_grow_up_to_the_optimizers_own_length():
    scales, _ = run(scale_by_limit(0.1), [0.0] * 20)
    assert scales[0] == pytest.approx(0.13)
    assert scales[-1] == 1.0
    assert np.all(np.diff(scales) >= 0)


def test_an_error_within_the_margin_does_not_shorten_the_step():
    assert run(scale_by_limit(0.1, 0.05), [0.14])[0] == pytest.approx([0.13])
    assert run(scale_by_limit(0.1, 0.05), [0.16])[0] == pytest.approx([0.05])


def test_a_repair_is_not_slowed_down():
    scales, _ = run(scale_by_limit(0.1), [0.8, 0.5, 0.3, 0.2])
    assert scales[0] < 0.1
    # The second figure is still above the average of those before it, which starts from 0.
    assert np.all(np.diff(scales[1:]) > 0)


def test_a_constant_error_does_not_shorten_the_steps():
    # BUG: very short steps leave the error constant up to batch noise, and this noise made them shorter still.
    n, rate, limit = 192, 0.05, 0.01
    noise = lambda figure: 2 * jnp.sqrt(figure * (1 - figure) / n)
    figures = np.random.default_rng(0).binomial(n, rate, size=200) / n
    scales, _ = run(scale_by_limit(limit, noise, start=0.01), figures)
    assert np.mean(np.array(scales[50:]) > 0.5) > 0.8
    # An error that rises by more than noise still shortens them.
    rising, _ = run(scale_by_limit(limit, noise), [0.1, 0.2, 0.4, 0.8])
    assert np.all(np.diff(rising) < 0)


def test_the_damage_of_a_long_step_may_be_repaired_by_steps_as_long():
    tx = scale_by_limit(0.01, start=1.0, target=0.5, safe=0.005, most=30.0)
    errors = [[0.1, 0.0]] * 10 + [[1.0, 0.4]] + [[1.0, 0.3 - 0.001 * n] for n in range(40)]
    state, scales = tx.init(jnp.ones(())), []
    for figures in errors:
        scale, state = tx.update(jnp.ones(()), state, errors=jnp.array(figures))
        scales.append(float(scale))
    peak = max(scales[:10])
    assert peak > 10
    assert scales[10] == pytest.approx(peak / 2)
    assert scales[-1] == pytest.approx(peak)


def test_the_largest_of_several_retain_figures_counts_and_the_forget_figure_does_not():
    tx = scale_by_limit(0.1)
    one = lambda errors: float(tx.update(jnp.ones(1), tx.init(jnp.ones(1)), errors=jnp.array(errors))[0][0])
    assert one([1.0, 0.0, 0.0]) == pytest.approx(0.13)
    assert one([0.0, 0.0, 0.2]) == pytest.approx(0.05)


@pytest.mark.parametrize("figure", [np.nan, np.inf])
def test_a_figure_that_is_not_finite_changes_no_state(figure):
    _, state = run(scale_by_limit(0.1), [0.3])
    _, after = scale_by_limit(0.1).update(jnp.ones(3), state, errors=jnp.array([0.0, figure]))
    chex.assert_trees_all_equal(after, state)


def test_a_state_with_injected_settings_can_be_donated():
    # BUG: several of its fields were one array.
    tx = optax.inject_hyperparams(scale_by_limit)(0.02, start=0.2)
    state = jax.jit(lambda state: state, donate_argnums=0)(tx.init(jnp.zeros(3)))
    assert round(float(state.inner_state.scale), 4) == 0.2


def test_updates_keep_their_dtypes():
    updates = {"w": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}
    tx = scale_by_limit(0.1)
    scaled, _ = jax.jit(tx.update)(updates, tx.init(updates), errors=jnp.zeros(2))
    chex.assert_trees_all_equal_dtypes(scaled, updates)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scale_by_limit(-0.1), "limit: got -0.1, expected a finite number >= 0"),
        (lambda: scale_by_limit(0.1, np.nan), "margin: got nan, expected a finite number >= 0"),
        (lambda: scale_by_limit(0.1, growth=0.9), "growth: got 0.9, expected a finite number >= 1"),
        (lambda: scale_by_limit(0.1, shrink=1.0), "shrink: got 1.0, expected a positive number < 1"),
        (lambda: scale_by_limit(0.1, start=0.0), "start: got 0.0, expected a finite positive number <= 1"),
        (lambda: scale_by_limit(0.1, start=1.5), "start: got 1.5, expected a finite positive number <= 1"),
        (lambda: scale_by_limit(0.1, least=2.0), "least: got 2.0, expected a finite positive number <= 1"),
        (lambda: scale_by_limit(0.1, target=np.inf), "target: got inf, expected a finite number >= 0"),
        (lambda: scale_by_limit(0.1, target=0.5, most=0.5), "most: got 0.5, expected a finite number >= 1"),
        (lambda: scale_by_limit(0.1, safe=-1.0), "safe: got -1.0, expected a finite number >= 0"),
        (lambda: scale_by_limit(0.1, safe=0.2), "safe: got 0.2, expected at most `limit`, 0.1"),
        (lambda: scale_by_limit(0.1).update(jnp.ones(1), None), "errors: got None, expected (K,): one error for"),
        (
            lambda: scale_by_limit(0.1).update(jnp.ones(1), None, errors=jnp.ones(1)),
            "errors: got shape (1,), expected (K,): one error for",
        ),
    ],
)
def test_bad_numbers_are_named(make, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(").replace(")", r"\)")):
        make()


@pytest.mark.slow
def test_a_learning_rate_that_ruins_a_trained_model_does_no_harm_with_it():
    """The model has memorised its digits, and the rate is ten times the largest in the search space."""
    parts, before = level.split("random:10%", 0), level.original(0)

    def worst(method, **settings):
        sizes = {"steps": 30, "forget_batch": 16, "retain_batch": 48, "probes": 30}
        settings = {"learning_rate": 0.1, "forget_objective": "random_labels", **settings}
        found = unlearn(method, level.TASK, before, *(parts[name] for name in NAMES), settings=settings, **sizes)
        return max(found.history["retain_error"])

    assert worst("weighted sum", retain_weight=3.0) > 0.5
    assert worst("EUPMU") < 0.25


def test_between_safe_and_the_limit_long_steps_keep_their_length():
    tx = scale_by_limit(0.3, start=1.0, target=0.9, safe=0.1, most=4.0)
    state, scales = tx.init(jnp.zeros(1)), []
    for retain in [0.0] * 8 + [0.2] * 16:
        _, state = tx.update(jnp.ones(1), state, errors=jnp.array([0.0, retain]))
        scales.append(float(state.scale))
    np.testing.assert_allclose(scales[6:], 4.0)
