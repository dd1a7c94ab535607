import os
import subprocess
import sys

import jax
import pytest

from eupmu_jax.training.mesh import topology


@pytest.mark.parametrize(
    "name", ["", "cpu", "cpu:0", "cpu:-1", "cpu:2x2", "v5e", "v5e:4", "v5e:axb", "gpu:8", "v4:2x2", "v5e:2x2 "]
)
def test_an_invalid_name_is_refused_with_examples(name):
    with pytest.raises(ValueError, match=r"^topology: got '.*', expected a slice such as v5e:16x16 of one of v5e, v5p"):
        topology.devices(name)


@pytest.mark.slow
def test_a_refused_name_leaves_the_accelerator_available_to_the_process():
    # BUG: from then on JAX saw only the CPU.
    code = (
        "import jax\nfrom eupmu_jax.training.mesh.topology import devices\n"
        "try: devices('v5e:typo')\nexcept ValueError: print(repr(jax.config.jax_platforms))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    finished = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert finished.stdout.strip() in ("None", "''"), finished.stderr[-2000:]


def test_one_cpu_device_is_always_available():
    devices, chip = topology.devices("cpu:1")
    assert list(devices) == jax.devices("cpu")[:1]
    assert chip is None


def test_cpu_devices_cannot_be_added_once_jax_has_started():
    with pytest.raises(
        ValueError, match=rf"^topology: got cpu:1000, but JAX has started with {jax.device_count()} CPU"
    ):
        topology.devices("cpu:1000")


@pytest.mark.slow
def test_the_number_of_cpu_devices_can_be_set_before_jax_starts():
    sizes = "len(devices('cpu:6')[0]), len(devices('cpu:4')[0])"
    code = f"from eupmu_jax.training.mesh.topology import devices; print({sizes})"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.split() == ["6", "4"]


def test_a_chip_computes_faster_than_it_reads_memory_and_reads_faster_than_it_communicates():
    for chip in topology.CHIPS.values():
        assert chip.flops > chip.memory_bandwidth > chip.network_bandwidth > chip.memory > 0


@pytest.fixture
def libtpu():
    return pytest.importorskip("libtpu")


@pytest.mark.tpu
@pytest.mark.parametrize(("name", "count"), [("v5e:2x2", 4), ("v5p:2x2x1", 4), ("v6e:4x4", 16)])
def test_slices_can_be_described_without_being_attached(libtpu, name, count):
    devices, chip = topology.devices(name)
    assert len(devices) == count
    assert {device.platform for device in devices} == {"tpu"}
    assert chip is topology.CHIPS[name[:3]]
    assert jax.default_backend() == "cpu"


@pytest.mark.tpu
@pytest.mark.parametrize("name", ["v5e:3x5", "v6e:1x1"])
def test_a_shape_that_the_chip_kind_is_not_available_in_is_refused(libtpu, name):
    with pytest.raises(ValueError, match=rf"^topology: libtpu does not describe {name}: \S"):
        topology.devices(name)


@pytest.mark.parametrize("name", ["v5e:2x2x2", "v5p:4x4", "v5e:32x32", "v5p:1000x1000x1000", "v6e:0x4"])
def test_axes_and_sizes_beyond_those_of_the_kind_do_not_reach_the_compiler(name):
    with pytest.raises(ValueError, match=rf"^topology: got '{name}', expected [23] axes and at most \d+ chips"):
        topology.devices(name)


def test_without_libtpu_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ValueError, match=r"v5e:2x2 needs libtpu to compile with: pip install"):
        topology.devices("v5e:2x2")
