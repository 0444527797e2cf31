"""The project's own measurements, each one command."""
