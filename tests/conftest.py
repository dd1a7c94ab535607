import os

# XLA's optimizations take longer than they save in programs as small as those of the tests, and in the processes that
# they start. Before JAX is imported, which reads it then.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

from hypothesis import settings

settings.register_profile("reproducible", deadline=None, derandomize=True, max_examples=30, database=None)
settings.load_profile("reproducible")
