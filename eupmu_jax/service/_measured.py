"""What an audit measures of each model: errors, attacks, relearning, and the errors of classes and groups."""

from typing import Any

import numpy as np

from eupmu_jax.service import attacks
from eupmu_jax.service.attacks import attack
from eupmu_jax.tasks import Examples, Task
from eupmu_jax.tasks.examples import part_of, spread
from eupmu_jax.training import levels, relearning
from eupmu_jax.training.classes import FEW, alike, labels_of

GONE = "classes to go"
# Settings of the relearning curves.
STEPS, EVERY, BATCH = 40, 10, 64


def of_model(task: Task, params, sides: dict, unseen, gone, frozen=None) -> dict:
    """Measures one model on `sides`, the "forgotten" and possibly the "retained" examples, against unseen ones.

    Returns:
      `errors` of each side and of unseen data; with unseen data also `attacks` by the loss on each side and on classes
      to be forgotten, and `canaries`, None if the forgotten examples cannot be compared; and `relearning` of what is
      not frozen, if it can be tried.
    """
    losses = lambda part: _losses(task, params, part)
    found: dict[str, Any] = {"errors": errors_of(task, params, sides)}
    if unseen is not None:
        pairs = {name: alike(task, part, unseen, gone) for name, part in sides.items()}
        pairs[GONE] = _to_go(task, sides["forgotten"], unseen, gone)
        told = {name: [losses(part) for part in pair] for name, pair in pairs.items() if pair}
        found["attacks"] = {name: attack(*of_pair)._asdict() for name, of_pair in told.items()}
        privacy = attacks.canaries(*told["forgotten"]) if "forgotten" in told else None
        found["canaries"] = privacy and privacy._asdict()
        found["errors"]["unseen"] = levels.measured_level(task, params, unseen, levels.MOST)._asdict()
    if "retained" in sides and task.error is not None and isinstance(sides["retained"], Examples):
        found["relearning"] = _relearning(task, params, sides["forgotten"], sides["retained"], frozen)
    return found


def _to_go(task, forgotten, unseen, gone):
    """Forgotten and unseen examples of classes to be forgotten, with the same mix; None if there are too few."""
    found = []
    for part in (forgotten, unseen):
        labels = labels_of(task, part) if gone else None
        if labels is None or np.sum(to_go := np.isin(labels, list(gone))) < FEW:
            return None
        found.append(part_of(part, np.flatnonzero(to_go)))
    return alike(task, *found)


def beside(task: Task, params, retrained, forgotten, unseen, gone) -> dict:
    """`beside`, the attack on the forgotten examples relative to a retrained model; empty if none can be compared."""
    if unseen is None or not (pair := alike(task, forgotten, unseen, gone)):
        return {}
    # Scored together, as whether any loss is below 0 decides how all are read.
    losses = [[_losses(task, model, part) for part in pair] for model in (params, retrained)]
    scores = np.split(attacks.scores_beside(*map(np.concatenate, losses)), [len(losses[0][0])])
    return {"beside": attack(*scores)._asdict()}


class Shadows:
    """Shadow models of a user's file, and their scores of forgotten and unseen examples."""

    def __init__(self, task, shadows, params, data, ids, unseen, gone):
        models = attacks.checked_shadows(shadows, len(data), params)
        self.seen, self.parts = [seen for _, seen in models], None
        ids = ids[spread(len(ids), levels.MOST)]
        if self.seen and unseen is not None:
            self.parts = alike(task, part_of(data, ids), unseen, gone)
        if self.parts is None:
            return
        positions = data.ids[ids] if isinstance(data, Examples) else ids
        ids = ids[np.isin(positions, self.parts[0].ids)]
        self.losses = [np.stack([_losses(task, params, part) for params, _ in models]) for part in self.parts]
        self.masks = np.stack(self.seen)[:, ids], np.zeros(self.losses[1].shape, bool)

    def figures(self, task, params):
        """The attack on the forgotten examples under one model; empty without shadow models or held-out data."""
        if self.parts is None:
            return {}
        # Scored together: if each side had a variance of its own, the ratio of the two could tell them apart.
        losses = [_losses(task, params, part) for part in self.parts]
        shadows, seen = (np.concatenate(both, axis=1) for both in (self.losses, self.masks))
        scores = np.split(attacks.shadow_scores(np.concatenate(losses), shadows, seen), [len(losses[0])])
        known, unseen = (part[np.isfinite(part)] for part in scores)
        return {"lira": attack(known, unseen)._asdict()} if len(known) and len(unseen) else {}


def _losses(task, params, part):
    return levels.figures_of(task.attacked, params, part, levels.MOST)[1]


def errors_of(task: Task, params, sides: dict) -> dict:
    """The error on at most 2,000 examples of each side, with its interval."""
    return {name: levels.measured_level(task, params, part, levels.MOST)._asdict() for name, part in sides.items()}


def _relearning(task, params, forget, retain, frozen):
    half = max(1, len(forget) // 2)
    # Shuffled: in sorted data one half would say nothing about the other.
    ids = np.random.default_rng(0).permutation(forget.ids)
    watched = Examples(forget.tree, ids[half:] if len(ids) > 1 else ids)
    curves = {}
    for name, train in (("on half of them", Examples(forget.tree, ids[:half])), ("on retained", retain)):
        sizes = {"steps": STEPS, "every": EVERY, "batch_size": BATCH}
        curve = relearning.relearn(task.attacked, params, train, watched, frozen=frozen, **sizes)
        curves[name] = {"step": curve.step.tolist(), "accuracy": curve.accuracy.tolist()}
    return curves


def of_classes(task, models, retain, groups):
    """The retain error of each group, or of each class if there are labels but no groups, under each model."""
    if groups is None and task.num_classes is not None and isinstance(retain, Examples):
        groups = labels_of(task, retain)
    if groups is None:
        return None
    found = {name: levels.unseen_levels(task, params, retain, groups) for name, params in models.items()}
    return {name: {str(c): level.error for c, level in errors.items()} for name, errors in found.items()}
