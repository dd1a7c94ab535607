"""Bad Teacher: on the forget set the student follows a model that knows nothing, on the retain set the original one."""

from eupmu_jax._stack.checks import check_same_shapes
from eupmu_jax.gradients.value_and_grad import scalarized_value_and_grad
from eupmu_jax.methods.method import LEARNING_RATE, Cost, LogUniform, Method, Procedure, descend, descent, softened


def bad_teacher(task, terms, settings) -> Procedure:
    r"""Descent on the divergences from two fixed teachers, u for forget examples and t for retain examples.

    .. math::
      D_T(u, s; \text{forget}) + w\, D_T(t, s; \text{retain}), \qquad
      D_T(t, s) = T^2\, D(t / T, s / T)

    D is the task's divergence, for a classifier the mean of KL(softmax(t) || softmax(s)). u is the model with fresh
    parameters, t the original one, where the student s starts; T = `temperature`, w = `retain_weight`. The targets in
    the batches are never read.

    The authors mix forget examples with a share of the retain set in one loader, so that their w is the ratio of the
    two numbers; T = 1 and Adam with learning rate 0.01 or less. Their divergence is averaged over classes too, which
    makes it smaller by the number of classes, and has no T^2.

    Each step passes both batches forwards through a teacher and the student, and backwards through the student.

    Failure cases: an untrained model's answers are far from those of a retrained one, and nearly the same for all
    examples, so they give the forget set away. They only mask it: training on retained data alone brings back much of
    what was forgotten (arXiv 2505.22310). With `frozen` leaves u keeps their trained values and has fresh ones
    only in the rest: over a frozen backbone it is a trained model with an untrained head, and may know a lot.
    """

    def loss(params, taught, key):
        batch, teacher_outputs = taught
        return softened(task, task.outputs(params, batch, key), teacher_outputs, batch, settings["temperature"])

    value_and_grad = scalarized_value_and_grad(loss)

    def gradient(params, teachers, batches, count, key):
        taught = tuple(
            (batch, task.outputs(teacher, batch, key)) for teacher, batch in zip(teachers, batches, strict=True)
        )
        return value_and_grad(params, taught, settings["retain_weight"], key)[1]

    def prepare(params, forget, retain, key):
        untrained = task.fresh_params(key)
        check_same_shapes("task.fresh_params", untrained, "params", params)
        return untrained, params

    return descend(descent(terms, settings), gradient, Cost((2, 2), (1, 1)), prepare)


METHOD = Method(
    bad_teacher,
    paper="Chundawat et al. 2023, arXiv 2205.08096",
    passes="2F 1B forget and retain, including a teacher's 1F",
    needs="forget and retain sets, an untrained model",
    space={
        "learning_rate": LEARNING_RATE,
        "temperature": LogUniform(0.5, 5.0),
        "retain_weight": LogUniform(0.3, 30.0),
    },
    requires=("divergence", "fresh_params"),
)
