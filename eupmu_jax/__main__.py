"""`python -m eupmu_jax` is the command `eupmu`."""

from eupmu_jax.commands.cli import main

if __name__ == "__main__":
    main()
