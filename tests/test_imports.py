import subprocess
import sys

import pytest

OUTER_LAYERS = ("flax", "orbax", "sklearn", "tensorflow_datasets", "matplotlib", "rich")


@pytest.fixture(scope="module")
def imported():
    """The modules that `import eupmu_jax` loads into a fresh interpreter."""
    program = "import sys, eupmu_jax; print(*sys.modules)"
    return set(
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    )


@pytest.mark.parametrize("name", OUTER_LAYERS)
def test_the_transforms_need_jax_and_optax_alone(imported, name):
    assert "eupmu_jax.surgery.explicit" in imported
    assert name not in imported


def test_every_public_name_exists():
    import eupmu_jax

    assert [name for name in eupmu_jax.__all__ if not hasattr(eupmu_jax, name)] == []
