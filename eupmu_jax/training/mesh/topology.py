"""Devices to compile for, whether or not they are present: named TPU slices, and a number of CPU devices."""

import contextlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from eupmu_jax.sharding import make_mesh


class Chip(NamedTuple):
    """Peak figures of one chip.

    Attributes:
      flops: bfloat16 operations per second.
      memory: Bytes.
      memory_bandwidth: Bytes per second.
      network_bandwidth: Bytes per second received over all links to other chips of the slice together.
      axes: Dimensions of the torus that a slice forms.
      largest: Chips in the largest slice.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    network_bandwidth: float
    axes: int
    largest: int


# The most devices, sequences or tokens; far above it, sizes overflow in the compiler.
LARGEST = 1_000_000
# Each CPU device has its own threads.
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
      topology: A TPU slice such as `"v5e:16x16"`, `"v5p:8x8x8"` or `"v6e:4x4"`, which libtpu can describe and compile
        for on any machine; or `"cpu:8"` for that many CPU devices on this machine, if JAX has not started yet.

    Returns:
      Devices for `sharding.make_mesh`, and a `Chip`, or None for a CPU. If JAX has not started yet, it runs only on the
      CPU in this process from then on.

    Raises:
      ValueError: For an unknown kind, a shape that this kind does not have, missing libtpu, or CPU devices that JAX can
        no longer add.

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
    # For slices far larger than any that exist, libtpu crashes instead of raising an error.
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


def mesh_of(topology: str, data: int = 0, tensor: int = 1) -> tuple[Mesh, Chip | None]:
    """A mesh on the devices of a topology, and the figures of its chips.

    Args:
      topology: See `devices`.
      data, tensor: Devices along the mesh axes `data` and `model`; a `data` of 0 uses all that `tensor` leaves.

    Raises:
      ValueError: As `devices`, or for a mesh that does not fit.

    >>> dict(mesh_of("cpu:1")[0].shape)
    {'objective': 1, 'data': 1, 'model': 1}
    """
    if not 1 <= tensor <= LARGEST:
        raise ValueError(f"tensor: got {tensor}, expected a number from 1 to {LARGEST:,}")
    if not 0 <= data <= LARGEST:
        raise ValueError(f"data: got {data}, expected a number from 1 to {LARGEST:,}, or 0 for all devices")
    found, chip = devices(topology)
    if tensor > len(found):
        raise ValueError(f"tensor: got {tensor}, expected at most the {len(found)} devices of {topology}")
    data = data or len(found) // tensor
    if data * tensor > len(found):
        raise ValueError(
            f"data: got {data}, expected at most {len(found) // tensor} with tensor {tensor} on {topology}"
        )
    return make_mesh(data, tensor, devices=found), chip


@contextlib.contextmanager
def fitting(advice: str) -> Iterator[None]:
    """Raises `ValueError` if a step that is compiled in this context needs more memory than a device has.

    >>> with fitting("use more devices"):
    ...     raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")
    Traceback (most recent call last):
    ValueError: the step does not fit a device: RESOURCE_EXHAUSTED: no room; use more devices
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # Some versions put a code and a name before the sentence, and the module and advice after it.
        sentence = re.search(r"Ran out of memory.*?\([\d.]+\w?\).*?\([\d.]+\w?\)", str(error), re.DOTALL)
        reason = " ".join(sentence[0].split()) if sentence else str(error).splitlines()[0]
        raise ValueError(f"the step does not fit a device: {reason}; {advice}") from None


def _hold_no_accelerator():
    """Keeps JAX off accelerators, as a process that compiles for absent devices runs nothing on those present."""
    jax.config.update("jax_platforms", "cpu")


def _cpu_devices(count):
    if count > MOST_CPU_DEVICES:
        raise ValueError(f"topology: got cpu:{count}, expected at most cpu:{MOST_CPU_DEVICES}")
    # JAX may have started already, with enough devices.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices("cpu")
    if len(found) < count:
        raise ValueError(f"topology: got cpu:{count}, but JAX has started with {len(found)} CPU devices")
    return found[:count]
