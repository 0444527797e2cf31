"""Decisions, and nothing else.

Nothing here does I/O, awaits, logs, reads a clock or draws a random number: time arrives as `now` (seconds on one
monotonic scale) and chance as `draw` (a number in [0, 1)). That is what lets every rule of the gateway be tested as
arithmetic, over all times and all draws.
"""
