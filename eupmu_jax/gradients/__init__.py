"""Losses and gradients of several objectives from one backward pass, and their batches."""
