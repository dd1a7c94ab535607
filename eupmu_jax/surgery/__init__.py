"""Unilateral gradient surgery as optax transforms, their wrappers and their training steps."""
