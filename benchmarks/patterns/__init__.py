"""The patterns of client code that people copy, side by side with the same calls through the gateway."""
