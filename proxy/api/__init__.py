"""HTTP in: parse, call one thing below, answer."""
