"""Devices to compile for, whether or not they are here: named TPU slices, and CPU devices by number."""

import contextlib
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax


class Chip(NamedTuple):
    """What one chip can do at best.

    Attributes:
      flops: bfloat16 operations a second.
      memory: Bytes.
      memory_bandwidth: Bytes a second.
      network_bandwidth: Bytes a second that the links to other chips of the slice bring in, all together.
      axes: Dimensions of the torus that its slices are.
      largest: Chips of the largest slice.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    network_bandwidth: float
    axes: int
    largest: int


# Each CPU device has threads of its own.
MOST_CPU_DEVICES = 1_024
# cloud.google.com/tpu/docs/v5e, v5p and v6e; interconnect figures there count both directions.
CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, 2, 256),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, 3, 8960),
    "v6e": Chip(918e12, 32e9, 1640e9, 400e9, 2, 256),
}


def devices(topology: str) -> tuple[Sequence[Any], Chip | None]:
    """The devices of a topology, and the figures of its chips.

    Args:
      topology: `"v5e:16x16"`, `"v5p:8x8x8"`, `"v6e:4x4"`: a TPU slice, which libtpu describes and compiles for on any
        machine; or `"cpu:8"`, that many devices of this machine's CPU, if JAX has not started yet.

    Returns:
      Devices for `sharding.make_mesh`, and a `Chip`, or None for a CPU. From then on JAX runs on the CPU alone in this
      process, if it has not started yet.

    Raises:
      ValueError: For another kind, a shape that the kind does not come in, missing libtpu, or CPU devices that JAX
        cannot add any more.

    >>> len(devices("cpu:1")[0])
    1
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
        _hold_no_accelerator()
        return _cpu_devices(int(shape)), None
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise ValueError(
            f"topology: got {topology!r}, expected a slice such as v5e:16x16 of one of {', '.join(CHIPS)}, or cpu:8"
        )
    chip, sizes = CHIPS[kind], [int(size) for size in shape.split("x")]
    # On slices far larger than any that exist, libtpu crashes instead of saying so.
    if len(sizes) != chip.axes or not 0 < math.prod(sizes) <= chip.largest:
        raise ValueError(
            f"topology: got {topology!r}, expected {chip.axes} axes and at most {chip.largest} chips: a {kind} slice"
        )
    _hold_no_accelerator()
    try:
        import libtpu  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError(
            f"topology: {topology} needs libtpu to compile with: pip install 'eupmu-jax[tpu]'; cpu:8 does not"
        ) from None
    from jax.experimental import topologies

    # Outside a TPU machine there is no metadata server that libtpu could ask, and no device to guard against a second
    # process. The topology's name overrides the type.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices, chip
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology: libtpu does not describe {topology}: {error}") from None


def _hold_no_accelerator():
    """Whoever compiles for devices that are not here runs nothing on those that are."""
    jax.config.update("jax_platforms", "cpu")


def _cpu_devices(count):
    if count > MOST_CPU_DEVICES:
        raise ValueError(f"topology: got cpu:{count}, expected at most cpu:{MOST_CPU_DEVICES}")
    # JAX may have started, and may have enough devices all the same.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices("cpu")
    if len(found) < count:
        raise ValueError(f"topology: got cpu:{count}, but JAX has started with {len(found)} CPU devices")
    return found[:count]
