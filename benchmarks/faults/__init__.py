"""Every fault of a peer, many times over, and what is left of the gateway after it."""
