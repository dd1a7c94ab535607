"""The benchmarks: every method on the same problems, tuned alike, as rows, tables and figures."""
