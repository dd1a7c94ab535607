"""From ids to evidence: unlearns examples of a user's data, with a durable ledger of requests, audits and reports."""

from eupmu_jax.service import ledger, user_file
from eupmu_jax.service.ids import read_ids

__all__ = ["ledger", "read_ids", "user_file"]
