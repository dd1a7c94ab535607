"""`eupmu init`: writes a commented template for a classifier, and a TOML file of run options."""

from pathlib import Path

TEMPLATE = '''"""My task: what `eupmu unlearn`, `audit` and `verify` need to know. Change what is marked CHANGE.

    eupmu request add {name} ids.txt --reason "a letter of 3 May"
    eupmu plan {name} --request 1
    eupmu unlearn {name} --request 1 --out RUN
    eupmu audit RUN {name}
    eupmu report RUN
"""

import jax
import numpy as np

import eupmu_jax as eupmu


# CHANGE: the model, (params, inputs) -> logits; any pytree of parameters. With Flax NNX, of any kind:
#   model.eval()
#   graph, params, rest = nnx.split(model, nnx.Param, ...)
#   def apply(params, inputs):
#       return nnx.merge(graph, params, rest, copy=True)(inputs)
def apply(params, inputs):
    return jax.nn.relu(inputs @ params["hidden"]) @ params["out"]


# CHANGE: the trained parameters. With Orbax: ocp.StandardCheckpointer().restore(path, like).
with np.load("params.npz") as saved:
    params = dict(saved)

# CHANGE: the data that the model was trained on: a dict of arrays with one leading axis, in an order that never
# changes, or anything with len(data) and data[positions]. The lines of ids.txt are positions in it, from 0.
with np.load("data.npz") as saved:
    data = {{"inputs": saved["inputs"], "labels": saved["labels"]}}

# CHANGE: examples that the model never saw, a few hundred or more. Its error on them is the level at which forgetting
# stops. None if you have none: the target is then the error of chance.
# To forget all of a person, a user or an item, hold out others that the model never saw at all.
with np.load("held_out.npz") as saved:
    held_out = {{"inputs": saved["inputs"], "labels": saved["labels"]}}

# If you can afford it: `eupmu unlearn --retrain` calls this for an exact answer, which the audit compares with.
#   def retrain(positions):
#       return train(initial_params, data at these positions alone)

# For errors by group instead of by class in the audit:
#   groups = an array with the group of each example of the data

# For parameters that must not change, such as the base of LoRA adapters, quantised or not:
#   frozen = a tree like params with a bool for each leaf, or a function of params that returns one

# On many devices: examples are split along the axis `data` of the mesh, large parameters along `model`.
#   mesh = eupmu.sharding.make_mesh(data=4, model=2)

# If you have shadow models, of the same kind but trained on parts of the data, for an attack on each example:
#   shadows = [(params, positions that these were trained on), ...]

# For a language model: eupmu.tasks.language(apply), where apply(params, tokens) returns logits. Its data are
#   {{"tokens": (n, length) ints, "mask": (n, length), 1 for the tokens to predict and 0 for prompt and padding}},
# all padded to one length. A decoder of google-tunix, with adapters or without:
#   model = eupmu_jax.models.language.from_tunix(module, trainable=nnx.LoRAParam)
#   task, params = eupmu.tasks.language(model.apply), model.params
# For a diffusion model: eupmu.tasks.diffusion(denoise, schedule, num_conditions=10, original=params), where
#   denoise(params, x_t, t, labels) predicts v, or noise with prediction="epsilon". Data as above, inputs in [-1, 1].
#   schedule = eupmu_jax.objectives.diffusion.cosine_schedule(1_000), or that with which the model was trained
# For anything else, write a Task of your own.
task = eupmu.tasks.classification(apply, num_classes=10)  # CHANGE: the number of classes.
'''


NUMBERS = """# Options of a run of `eupmu unlearn {name}`; those on the command line take precedence.
# limit = 1.0       # points by which the error on the retain set may rise; if the error is not a rate:
                    # hundredths of its unit, with a default that follows from the target
steps = 300         # of the optimizer
seed = 0            # for the order of the examples
forget_batch = 64   # examples in each step
retain_batch = 192
"""


def write(path: Path) -> None:
    """Writes both files; raises `ValueError` if either exists, or if the name does not end in .py."""
    if path.suffix != ".py":
        raise ValueError(f"file: got {path}, expected the name of a Python file, such as mytask.py")
    numbers = path.with_suffix(".toml")
    for found in (path, numbers):
        if found.exists():
            raise ValueError(f"file: {found} exists already; expected a new name")
    for to, text in ((path, TEMPLATE), (numbers, NUMBERS)):
        with to.open("x") as file:
            file.write(text.format(name=path.name))
