"""Unilateral gradient surgery as optax transforms, and what stands around them."""
