"""Estimates what it would take to unlearn some of a user's data, before anything is done."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eupmu_jax.service import deletion, folder, ledger, user_file
from eupmu_jax.service.ids import NAMED
from eupmu_jax.tasks import as_examples, check_task
from eupmu_jax.training.footprint import footprint

# Usable fraction of a device's memory; the rest is left for whatever else runs there.
SHARE = 0.9


def make(
    own: Mapping[str, Any],
    ids: np.ndarray,
    asked: deletion.Asked,
    *,
    requests: Path | None = None,
    number: int = 0,
    epochs: int = 0,
    after: Path | None = None,
    device_bytes: int | None = None,
) -> dict[str, Any]:
    """Plans a run of `deletion.run`; only reads, and writes nothing.

    Args:
      own: The result of `user_file.load`.
      ids: Positions in its data.
      asked: See `deletion.Asked`.
      requests: Ledger in which to look for earlier requests of the same examples; a missing ledger has none.
      number: Number of the request that these positions belong to, if any.
      epochs: Passes over the data that training took; 0 if unknown.
      after: Folder of the run that this one would continue.
      device_bytes: Memory of a device; None queries the device.

    Returns:
      A dict with `examples` of each set; `mesh`: the axes of the file's mesh and their sizes, or None; `bytes` on a
      device: `arguments`, plus the larger of `temporary`, of a compiled step, and `outside`, for the passes before and
      after the steps; the device's `device_bytes`; `forward` and `backward`; `epochs`: the cost of the run in epochs of
      training on the retain set, a backward pass counted as two forward passes, and `share`: its cost in % of
      retraining; `overlap`: how many of these examples earlier requests have; `unlearned`: other unlearned requests on
      these data; `elsewhere`: unlearned requests on other data; `retrain`: whether the file can retrain the exact
      reference; `smaller`: batch sizes that fit if these do not; `groups`: how many of the user's groups would be
      forgotten entirely, if they are compared with unseen examples.
    """
    check_task(own["task"])
    if epochs < 0:
        raise ValueError(f"epochs: got {epochs}, expected a number of passes over the data, or 0 if it is not known")
    data = as_examples("data", own["data"])
    params, earlier = deletion.beginning(own, user_file.data_digest(data), len(data), ids, after)
    gone = folder.positions_of(earlier)
    forget, retain = deletion.parts(data, ids, gone)
    groups = user_file.groups_to_go(own, data, ids, gone) if deletion.is_compared(own, (forget, retain)) else 0
    held_out = None if own.get("held_out") is None else as_examples("held_out", own["held_out"])
    mesh = own.get("mesh")

    def of_batches(forget_batch, retain_batch):
        sizes: dict[str, Any] = {"steps": asked.steps, "forget_batch": forget_batch, "retain_batch": retain_batch}
        settings = deletion.settings_of(deletion.limited(asked, own["task"]).limit)
        sizes |= {"settings": settings, "frozen": own.get("frozen"), "mesh": mesh}
        return footprint(deletion.METHOD, own["task"], params, forget, retain, held_out, **sizes)

    found = of_batches(asked.forget_batch, asked.retain_batch)
    # Only now is the mesh known to be one.
    available = device_bytes or memory_of_device(1 if mesh is None else len(mesh.local_devices))
    smaller, sizes = None, (asked.forget_batch, asked.retain_batch)
    # Smaller batches do not reduce the passes outside the steps.
    helps = found.arguments + found.outside <= SHARE * available
    least = 1 if mesh is None else mesh.shape["data"]
    while smaller is None and helps and found.bytes > SHARE * available and max(sizes) > least:
        # A mesh only takes batches that it can split evenly.
        sizes = max(least, sizes[0] // 2 // least * least), max(least, sizes[1] // 2 // least * least)
        if (less := of_batches(*sizes).bytes) <= SHARE * available:
            smaller = {"forget_batch": sizes[0], "retain_batch": sizes[1], "bytes": less}
    overlap, done, elsewhere = _earlier(requests, own["data"], ids, number)
    cost = (found.forward + 2 * found.backward) / (3 * len(retain))
    return {
        "examples": {
            "forget": len(ids),
            "retain": len(retain),
            "held_out": 0 if held_out is None else len(held_out),
        },
        "mesh": None if mesh is None else dict(mesh.shape),
        **found._asdict(),
        "bytes": found.bytes,
        "device_bytes": available,
        "epochs": cost,
        "share": 100 * cost / epochs if epochs else None,
        "overlap": overlap,
        "unlearned": done,
        "elsewhere": elsewhere,
        "retrain": "retrain" in own,
        "smaller": smaller,
        "groups": groups,
    }


def memory_of_device(count: int = 1) -> int:
    """Bytes of memory of the first device; for a CPU, of the machine, shared by the `count` devices that are used."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count


def _earlier(path, data, ids, number):
    # Opening an empty file would turn it into a ledger.
    if path is None or not path.is_file() or not path.stat().st_size:
        return {}, [], []
    digest = user_file.data_digest(data)
    with ledger.opened(path) as connection:
        done = ledger.unlearned(connection, digest, number), ledger.unlearned_elsewhere(connection, digest)
        return ledger.overlaps(connection, digest, ids, number), *done


def of_other_data(numbers: Sequence[int]) -> str:
    """A sentence that requests were unlearned on data other than those of the file."""
    some = ", ".join(map(str, numbers[:NAMED])) + (", ..." if len(numbers) > NAMED else "")
    return (
        f"Requests unlearned on other data than the file has: {some}. Positions apply to one data set alone, so "
        "nothing keeps their examples from being learned again; leave them out of the data if they are in it."
    )


def said(plan: Mapping[str, Any]) -> str:
    """The plan as a few lines of text."""
    examples, lines = plan["examples"], []
    size = lambda count: f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
    lines.append(
        f"Examples: {examples['forget']:,} to forget, {examples['retain']:,} to retain, {examples['held_out']:,} held "
        "out."
    )
    axes = ", ".join(f"{name} {parts}" for name, parts in (plan["mesh"] or {}).items())
    where = f"each device of the mesh ({axes})" if axes else "one device"
    lines.append(
        f"Memory, compiled for {where}: {size(plan['bytes'])} of {size(plan['device_bytes'])} "
        f"({size(plan['arguments'])} for parameters, optimizer and data; {size(plan['temporary'])} to compute a step, "
        f"{size(plan['outside'])} to measure {deletion.METHOD}'s target and result; "
        f"{'measuring' if plan['outside'] > plan['temporary'] else 'a step'} takes more)."
    )
    if smaller := plan["smaller"]:
        lines.append(
            f"That is too much. `eupmu unlearn --forget-batch {smaller['forget_batch']} --retain-batch "
            f"{smaller['retain_batch']}` takes {size(smaller['bytes'])}."
        )
    elif plan["bytes"] > SHARE * plan["device_bytes"]:
        measured = plan["arguments"] + plan["outside"] > SHARE * plan["device_bytes"]
        why = ", as the batch size does not affect measuring" if measured else ""
        lines.append(f"That is too much, even with the smallest batches{why}.")
    share = f", {plan['share']:.1f} % of retraining" if plan["share"] is not None else ""
    lines.append(
        f"Passes: {plan['forward']:,} forward and {plan['backward']:,} backward, the cost of {plan['epochs']:.1f} "
        f"epochs on the retain set{share}."
    )
    for number, count in list(plan["overlap"].items())[:NAMED]:
        lines.append(f"Request {number} already has {count:,} of these examples.")
    if len(plan["overlap"]) > NAMED:
        lines.append(f"So do {len(plan['overlap']) - NAMED:,} more requests.")
    if done := plan["unlearned"]:
        lines.append(
            f"Unlearned on these data so far: {len(done):,} (the latest is request {done[-1]}). `eupmu unlearn --after "
            "RUN` continues from the latest run."
        )
    if plan["elsewhere"]:
        lines.append(of_other_data(plan["elsewhere"]))
    if plan["groups"]:
        lines.append(user_file.of_groups_to_go(plan["groups"]))
    if not examples["held_out"]:
        lines.append("Without held-out data the target is the error of chance or of an uninformed model, if known.")
    reference = "held-out data" * bool(examples["held_out"]), "a retrained model (--retrain)" * plan["retrain"]
    judged = " and ".join(filter(None, reference)) or "nothing, so it will be inconclusive"
    lines.append(f"The audit can compare with {judged}.")
    return "\n".join(lines)
