"""How fully limits that nobody told are used, and at how many refusals: `python -m benchmarks.limits`."""
