"""The identity of a run for its checkpoints: hashes of its model, losses and examples."""

import dataclasses
import enum
import hashlib
import re

import jax
import numpy as np

from eupmu_jax._stack.jaxpr import constants, equations
from eupmu_jax.methods.method import softened
from eupmu_jax.tasks import Examples, Task
from eupmu_jax.tasks.examples import spread
from eupmu_jax.training._digest import digest
from eupmu_jax.training._inputs import HASHED

# Equations that determine where and how something is computed, not what.
NOT_COMPUTED = ("sharding_constraint", "jit", "pjit")
# Parameters of equations that give places or names only.
NOT_PLAIN = ("name", "sharding", "out_sharding", "device", "devices", "srcs", "copy_semantics", "debug", "debug_info")


def digest_of_examples(examples) -> str:
    """SHA-256 of a set: of all of it if it is in memory, else of its length and some examples spread over it."""
    if isinstance(examples, Examples):
        return digest((examples.ids, examples.tree))
    return digest((np.array(len(examples)), examples[spread(len(examples), HASHED)]))


def digest_of_model(task: Task, params, forget) -> str:
    """SHA-256 of what a task closes over besides its parameters: a base model under adapters, a schedule, a teacher."""

    def of_batch(params, batch):
        drawn = batch if task.draw is None else task.draw(jax.random.key(0), 0, batch)
        return task.retain(task.outputs(params, batch, None), batch), drawn

    return digest(constants(of_batch, params, forget[np.zeros(2, int)]))


def digest_of_losses(task: Task, params, forget, names, has_teacher: bool, has_scores: bool = False) -> str:
    """SHA-256 of the model, its error, its retain loss and these forget losses, and of what else the method reads."""
    key, batch = jax.random.key(0), forget[np.zeros(2, int)]

    def read(params, batch):
        drawn = batch if task.draw is None else task.draw(key, 0, batch)
        return task.outputs(params, drawn, key), drawn

    found = hashlib.sha256()
    # For the model, which may be placed on a mesh, only what is computed: the mesh is not part of the identity.
    for equation, _ in equations(read, params, batch):
        if equation.primitive.name not in NOT_COMPUTED:
            results = [(result.aval.shape, result.aval.dtype) for result in equation.outvars]
            found.update(f"{equation.primitive.name} {results} {_plain(equation.params)}".encode())
    found.update(str(task.is_rate).encode())
    errors = [] if task.error is None else [task.error]
    distance = lambda outputs, batch: softened(task, outputs, outputs, batch, 1.0)
    others = [distance] * has_teacher + ([task.score] if has_scores and task.score is not None else [])
    for loss in (*errors, task.retain, *(task.forget[name] for name in names), *others):
        program = jax.make_jaxpr(loss)(*jax.eval_shape(read, params, batch))
        found.update(without_addresses(program.jaxpr.pretty_print(use_color=False)).encode())
        found.update(digest(program.consts).encode())
    return found.hexdigest()


def without_addresses(text: str) -> str:
    """The text without the memory addresses of functions, which differ between processes.

    >>> without_addresses("<function mean at 0x7fc788fd7f60>")
    '<function mean at >'
    """
    return re.sub("0x[0-9a-f]+", "", text)


def _plain(value):
    """A form of an equation's parameter that is the same in every process and on every mesh, or None."""
    if value is None or isinstance(value, bool | int | float | complex | str | np.dtype | enum.Enum):
        return repr(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items() if name not in NOT_PLAIN}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else None


def identity(name, method, settings, steps, seed, sizes, params, sets, given):
    """The identity of a run, for its checkpoints; `given` holds entries that exist only if the caller gave them."""
    return {
        "method": name,
        "version": method.version,
        "settings": {key: value if isinstance(value, str) else float(value) for key, value in settings.items()},
        "steps": steps,
        "seed": seed,
        "batches": [int(size) for size in sizes],
        "params": digest(params),
        "forget": digest_of_examples(sets.forget),
        "retain": digest_of_examples(sets.retain),
        **given,
    }
