"""Batches that are killed, and batches that are large: `python -m benchmarks.batches`."""
