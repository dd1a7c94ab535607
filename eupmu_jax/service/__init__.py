"""From ids to evidence: a user's own file, and a durable ledger of what is to be deleted from its data."""

from eupmu_jax.service import ledger, user_file
from eupmu_jax.service.ids import read_ids

__all__ = ["ledger", "read_ids", "user_file"]
