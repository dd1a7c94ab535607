"""Private: algebra of stacked gradients, the exact dual solver, and the checks that all transforms share."""
