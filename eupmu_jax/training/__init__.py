"""Training, unlearning and relearning loops, and their checkpoints."""
