"""The experiments: a folder each, see README.md. Run them from the root of the repository with `uv run`."""
