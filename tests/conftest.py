import jax
import pytest
from hypothesis import settings

settings.register_profile("reproducible", deadline=None, derandomize=True, max_examples=30, database=None)
settings.load_profile("reproducible")


@pytest.fixture(scope="module")
def quick_compilation():
    """XLA's optimizations take longer than they save in many programs of models so small."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
