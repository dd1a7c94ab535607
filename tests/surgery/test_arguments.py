"""Arguments that factories refuse at once, and parameters that are Python numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eupmu_jax as eupmu
from eupmu_jax import aggregators, controllers
from eupmu_jax.surgery.generalized_newton import scale_by_gen
from eupmu_jax.tolerances import relative

SEVERAL = np.array([0.1, 0.4])
LOSSES = [lambda params, batch: params, lambda params, batch: params]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: aggregators.cagrad(c=SEVERAL), r"^c: got shape \(2,\), expected one number"),
        (lambda: aggregators.gdr_gma(gamma=SEVERAL), r"^gamma: got shape"),
        (lambda: aggregators.omd_tch(eta=SEVERAL), r"^eta: got shape"),
        (lambda: aggregators.chebyshev(ideal=np.nan), r"^ideal: got nan"),
        (lambda: aggregators.chebyshev(weights=np.ones(4), num_objectives=3), r"^weights: got 4 values, expected 3"),
        (lambda: aggregators.famo(min_losses=np.ones(4), num_objectives=3), r"^min_losses: got 4 values"),
        (lambda: scale_by_gen(SEVERAL), r"^learning_rate: got shape"),
        (lambda: eupmu.eupmu(SEVERAL), r"^learning_rate: got shape"),
        (lambda: eupmu.eupmu(0.1, max_norm=SEVERAL), r"^max_norm: got shape"),
        (lambda: controllers.quadratic_penalty(np.inf), r"^penalty: got inf, expected a finite positive number"),
        (lambda: controllers.quadratic_penalty(1.0, violation_tolerance=np.nan), r"^violation_tolerance: got nan"),
        (lambda: eupmu.best_feasible(0.1, patience="a"), r"^patience: got a, expected an int"),
        (lambda: eupmu.accumulate(optax.identity(), lambda count: 2), r"^every_k_steps: got <function"),
        (lambda: eupmu.unilateral_surgery(np.zeros(0)), r"got no values, expected one or more"),
        # BUG: an AttributeError on `init`, some of them only in the first step.
        (lambda: eupmu.implicit_surgery(0.0, 0.5), r"^controller: got 0.5, expected an optax transform such as"),
        (lambda: eupmu.utility_guard(optax.adam, 0.0), r"^inner: got <function adam"),
        (lambda: eupmu.utility_guard(optax.adam(0.1), 0.0, surgery=0.5), r"^surgery: got 0.5"),
        (lambda: eupmu.skip_nonfinite(0.5), r"^inner: got 0.5"),
        (lambda: eupmu.accumulate(0.5, 2), r"^inner: got 0.5"),
        (lambda: eupmu.freeze(0.5, {"w": True}), r"^inner: got 0.5"),
        (lambda: eupmu.two_pass(LOSSES, 0.5), r"^inner: got 0.5"),
        (lambda: eupmu.explicit_step(LOSSES, 0.5), r"^optimizer: got 0.5"),
        (lambda: eupmu.implicit_step(LOSSES, 0.5), r"^optimizer: got 0.5"),
    ],
)
def test_invalid_settings_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [aggregators.chebyshev, aggregators.omd_tch])
def test_weights_fix_the_number_of_objectives_of_the_state(make):
    # BUG: the state began with two, and `lax.scan` refused the change of its shape.
    tx, grads = make(weights=np.ones(4)), jnp.eye(4)

    def step(state, losses):
        direction, state = tx.update(grads, state, losses=losses)
        return state, direction

    directions = jax.lax.scan(step, tx.init(jnp.zeros(4)), jnp.ones((3, 4)))[1]
    assert directions.shape == (3, 4)


def test_parameters_may_be_python_numbers():
    # BUG: they have no dtype, which caused an AttributeError.
    loss = lambda w, batch: jnp.mean((w - batch) ** 2)
    tx = optax.chain(eupmu.unilateral_surgery(), optax.sgd(0.1))
    step = eupmu.explicit_step([loss, loss], tx)
    params, *_ = step(1.0, tx.init(1.0), (jnp.zeros(2), jnp.zeros(3)))
    assert float(params) == pytest.approx(0.8)
    assert float(eupmu.furthest_feasible(lambda w: w**2, 2.25, 0.0, 2.0, bisections=8).params) == 1.5
    # BUG: the same error in an update of these two.
    tx, grads = eupmu.accumulate(eupmu.unilateral_surgery(), 1), jnp.array([1.0, 1.0])
    assert jax.eval_shape(lambda: tx.update(grads, tx.init(1.0), 1.0)[0]).shape == ()
    tx = scale_by_gen(0.1)
    assert jax.eval_shape(lambda: tx.update(grads[0], tx.init(1.0), 1.0, value_fn=lambda w: w**2)[0]).shape == ()


def test_a_relative_tolerance_of_a_negative_loss_demands_no_decrease():
    # BUG: the tolerance was negative, so surgery demanded a decrease though nothing conflicts.
    surgery, rows = eupmu.unilateral_surgery(relative(0.1)), jnp.eye(2)
    direction, _ = surgery.update(rows, surgery.init(jnp.zeros(2)), jnp.zeros(2), losses=jnp.array([1.0, -2.0]))
    assert direction.tolist() == [1.0, 0.0]
