"""`python -m eupmu_jax`, the command `eupmu`."""

from eupmu_jax.cli import main

if __name__ == "__main__":
    main()
