"""Builds the API pages from the docstrings, mathematics rendered.

Command:  uv run --extra docs python experiments/reference.py
Time:     ten seconds.
Result:   build/reference/index.html.
"""

from pathlib import Path

import pdoc

MODULES = (
    "eupmu_jax",
    "eupmu_jax.surgery",
    "eupmu_jax.gradients",
    "eupmu_jax.methods",
    "eupmu_jax.models",
    "eupmu_jax.data",
    "eupmu_jax.metrics",
    "eupmu_jax.training",
    "eupmu_jax.benchmark",
)


def main():
    pdoc.render.configure(docformat="google", math=True, show_source=False, footer_text="eupmu_jax")
    pdoc.pdoc(*MODULES, output_directory=Path("build/reference"))


if __name__ == "__main__":
    main()
