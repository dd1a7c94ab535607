"""Influence unlearning: one Newton step that removes the forget set's influence."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax._stack.programs import jit_for_task
from eupmu_jax.methods._whole_set import largest_pass, mean_gradient
from eupmu_jax.methods.method import Choice, Cost, LogUniform, Method, Procedure, size_of
from eupmu_jax.tasks import Examples, Task, as_examples
from eupmu_jax.tasks.task import of_each

SAMPLE = 1_000
ITERATIONS = 15
# For a run that cannot afford as many passes. On the small ResNet this came at least as close to the direction that the
# whole retain set gives as more iterations over fewer examples.
FEWER_ITERATIONS = 5
CHUNKS = 4


def influence(task, terms, settings) -> Procedure:
    r"""One step, computed before the run starts; the run's own steps change nothing.

    .. math::
      \theta = \theta_0 + \alpha\, (C + \delta I)^{-1} v, \qquad
      v = \frac{n_f}{n_f + n_r} \big( \nabla l(\theta_0; \text{forget}) - \nabla l(\theta_0; \text{retain}) \big)

    with :math:`\alpha` = `learning_rate`, :math:`\delta` = `damping`, and C the curvature of the mean retain loss l
    over 1,000 retained examples, drawn at random, which also give its gradient: `curvature` is "gauss_newton", which is
    the Fisher matrix too, or "empirical_fisher", the mean of the outer products of the examples' gradients. v is the
    change in the mean gradient when the forget set is removed; it does not move a model merely because it was not
    trained to convergence. At the optimum of a convex problem with regularisation :math:`\tfrac\delta2 \|\theta\|^2`,
    :math:`\alpha = 1` and the whole retain set, this is Newton's step on the retain set.

    The inverse is applied by at most 15 conjugate gradient iterations, each with a product C u, which is a forward pass
    over the sample and two backward passes. If that is more than `terms.passes`, there are 5 iterations, over as many
    examples as fit the passes that the forget set leaves; fewer than 4 raise a `ValueError`. The recursion of
    WoodFisher is not used: as released for unlearning, its inverse is built from the first example's gradient alone,
    and so differs from the identity by rank one.

    Failure cases: a model that fits its training set has next to no gradient and curvature, so that damping decides;
    far from :math:`\theta_0` the quadratic model fails and a large step ruins everything. A few iterations hardly move
    along directions of small curvature, which acts like more damping. If l is a distance to the original model, such as
    a KL divergence, v is 0 but for rounding, of which a run warns.

    Source: Koh and Liang 2017, arXiv 1703.04730; for unlearning Izzo et al. 2021, arXiv 2002.10077, and Jia et al.
    2023, arXiv 2304.04934.
    """
    sample_size, iterations = _affordable(terms)

    def prepare(params, forget, retain, key):
        sample = retain[np.asarray(jax.random.permutation(key, terms.num_retain)[:sample_size])]
        share = terms.num_forget / (terms.num_forget + terms.num_retain)
        damping, curvature = settings["damping"], settings["curvature"]
        return removal_step(task, params, forget, sample, share, damping, curvature=curvature, iterations=iterations)

    def finish(params, state, direction, forget, retain):
        return jax.tree.map(lambda p, d: p + (settings["learning_rate"] * d).astype(p.dtype), params, direction), 1.0

    forward, backward = _passes_of_an_example(iterations)
    cost = Cost(
        (0, 0),
        (0, 0),
        outside_forward=terms.num_forget + sample_size * forward,
        outside_backward=terms.num_forget + sample_size * backward,
    )
    keep = lambda params, prepared, state, batches, count, key: (params, state)

    def solve(params, sample):
        chunked, settled = _chunked(sample), (settings["curvature"], iterations)
        return _solve(task, *settled, params, chunked, settings["damping"], params, params)

    outside = largest_pass(task, max(terms.num_forget, sample_size)), (solve, sample_size)
    return Procedure(lambda params, prepared: (), keep, cost, prepare, finish, outside)


def _passes_of_an_example(iterations):
    """Forward and backward passes of a retained example: its gradient, and one product more than iterations."""
    products = iterations + 1
    return 1 + products, 1 + 2 * products


def _affordable(terms):
    """How many retained examples, and how many iterations over them, fit the pass budget."""
    forgotten = 3 * terms.num_forget
    most = min(SAMPLE, terms.num_retain)
    all_iterations, few_iterations = (f + 2 * b for f, b in map(_passes_of_an_example, (ITERATIONS, FEWER_ITERATIONS)))
    if forgotten + most * all_iterations <= terms.passes:
        return most, ITERATIONS
    least = forgotten + CHUNKS * few_iterations
    if terms.passes < least:
        raise ValueError(
            f"steps: got a run of {terms.passes} passes, expected at least {least}, of which the gradient of the "
            f"{terms.num_forget} forget examples takes {forgotten}"
        )
    affordable = int(terms.passes - forgotten) // few_iterations
    return min(most, affordable // CHUNKS * CHUNKS), FEWER_ITERATIONS


def removal_step(
    task: Task,
    params: chex.ArrayTree,
    forget: Examples,
    retain: chex.ArrayTree,
    share: float,
    damping: chex.Numeric,
    *,
    curvature: str = "gauss_newton",
    iterations: int = ITERATIONS,
) -> chex.ArrayTree:
    """The step (C + damping I)^-1 v of `influence`; called outside jit.

    Args:
      task: Its outputs are reverse-mode differentiable twice; forward mode is not needed. Its retain loss is a mean
        over examples, twice differentiable with respect to the outputs.
      params: Parameters of the original model.
      forget: The forget set.
      retain: The whole retain set or a sample of it, as one batch.
      share: Share of the forget set in the training set.
      damping: Greater than 0.
      curvature: "gauss_newton" or "empirical_fisher".
      iterations: The most iterations of conjugate gradients; they stop at a residual of 1e-5 of v.

    Raises:
      ValueError: For a damping that is not positive, an unknown curvature or an empty set.

    >>> from eupmu_jax.tasks import as_examples, classification
    >>> task = classification(lambda w, inputs: inputs * w, num_classes=2)
    >>> forget, retain = ({"inputs": jnp.ones((1, 2)), "labels": jnp.array([label])} for label in (0, 1))
    >>> removal_step(task, jnp.zeros(2), as_examples("forget", forget), retain, 0.5, 1.0).round(3).tolist()
    [-0.333..., 0.333...]
    """
    if not damping > 0:
        raise ValueError(f"damping: got {damping}, expected a positive number: curvature alone may be singular")
    if curvature not in ("gauss_newton", "empirical_fisher"):
        raise ValueError(f"curvature: got {curvature!r}, expected 'gauss_newton' or 'empirical_fisher'")
    gradients = [mean_gradient(task, params, part) for part in (forget, as_examples("retain", retain))]
    change = jax.tree.map(lambda f, r: share * (f - r), *gradients)
    # An argument: with a constant zero, XLA on CPU miscomputes this product for 450 images or more in a chunk.
    start = jax.tree.map(jnp.zeros_like, change)
    return _solve(task, curvature, iterations, params, _chunked(retain), damping, change, start)


def _chunked(sample):
    chunks = CHUNKS if size_of(sample) % CHUNKS == 0 else 1
    return jax.tree.map(lambda leaf: jnp.reshape(leaf, (chunks, -1, *leaf.shape[1:])), sample)


@jit_for_task(choices=2)
def _solve(task, curvature, iterations, params, sample, damping, vector, start):
    product = lambda u: jax.tree.map(
        lambda c, d: c + damping * d, curvature_product(task, params, sample, u, curvature), u
    )
    return jax.scipy.sparse.linalg.cg(product, vector, start, maxiter=iterations)[0]


def curvature_product(
    task: Task, params: chex.ArrayTree, sample: chex.ArrayTree, vector: chex.ArrayTree, curvature: str = "gauss_newton"
) -> chex.ArrayTree:
    """C u, for the curvature C of the mean retain loss over `sample`, whose leaves have a leading axis of chunks.

    The gradient J' w of the outputs is linear in w, and its transpose gives J u: no forward-mode differentiation of the
    model. The Gauss-Newton matrix is J' H J with H the Hessian of the loss with respect to the outputs.
    """
    chunks, size = jax.tree.leaves(sample)[0].shape[:2]

    def add(total, chunk):
        def outputs(params):
            values = task.outputs(params, chunk, None)
            return values if curvature == "gauss_newton" else of_each(task.retain, values, chunk)

        values, pull = jax.vjp(outputs, params)
        (tangent,) = jax.vjp(lambda w: pull(w)[0], jax.tree.map(jnp.zeros_like, values))[1](vector)
        if curvature == "gauss_newton":
            by_outputs = jax.grad(lambda values: size * task.retain(values, chunk))
            tangent = jax.jvp(by_outputs, (values,), (tangent,))[1]
        cotangent = jax.tree.map(lambda leaf: leaf / (chunks * size), tangent)
        return jax.tree.map(jnp.add, total, pull(cotangent)[0]), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), sample)[0]


METHOD = Method(
    influence,
    paper="Koh and Liang 2017, arXiv 1703.04730",
    passes="none in a step; before the first step 1F 1B forget, {}F {}B of up to {:,} retained examples".format(
        *_passes_of_an_example(ITERATIONS), SAMPLE
    ),
    needs="forget and retain sets",
    space={
        "learning_rate": LogUniform(0.3, 10.0),
        "damping": LogUniform(1e-4, 1.0),
        "curvature": Choice(("gauss_newton", "empirical_fisher")),
    },
    optimizer_settings=(),
    slope=True,
)
