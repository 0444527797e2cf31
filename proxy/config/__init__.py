"""YAML and environment -> frozen settings, or every mistake with its file, line and key.

`load` reads, `Settings` is what the rest of the gateway sees, `ConfigError` tells what is wrong.
"""

from proxy.config.loading import load
from proxy.config.problems import ConfigError, Problem
from proxy.config.secret import PASSTHROUGH, Secret, hashed
from proxy.config.settings import (
    Batches,
    Gate,
    Jobs,
    Limits,
    Model,
    Passthrough,
    Price,
    Retry,
    Server,
    Settings,
    State,
    Telemetry,
    Tls,
    Upstream,
    describe,
    json_schema,
)

__all__ = [
    "PASSTHROUGH",
    "Batches",
    "ConfigError",
    "Gate",
    "Jobs",
    "Limits",
    "Model",
    "Passthrough",
    "Price",
    "Problem",
    "Retry",
    "Secret",
    "Server",
    "Settings",
    "State",
    "Telemetry",
    "Tls",
    "Upstream",
    "describe",
    "hashed",
    "json_schema",
    "load",
]
