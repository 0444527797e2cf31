"""YAML and environment -> frozen settings, or every mistake with its file, line and key.

`load` reads, `Settings` is what the rest of the gateway sees, `ConfigError` tells what is wrong.
"""

from proxy.config.loading import load
from proxy.config.pipelines import PIPELINE
from proxy.config.problems import ConfigError, Problem
from proxy.config.secret import PASSTHROUGH, Secret, hashed
from proxy.config.settings import (
    Batches,
    Gate,
    Jobs,
    Limits,
    Map,
    Message,
    Model,
    OnError,
    Passthrough,
    Pipeline,
    Price,
    Retry,
    Server,
    Settings,
    State,
    Step,
    Telemetry,
    Tls,
    Upstream,
    Webhook,
    When,
    describe,
    json_schema,
)

__all__ = [
    "PASSTHROUGH",
    "PIPELINE",
    "Batches",
    "ConfigError",
    "Gate",
    "Jobs",
    "Limits",
    "Map",
    "Message",
    "Model",
    "OnError",
    "Passthrough",
    "Pipeline",
    "Price",
    "Problem",
    "Retry",
    "Secret",
    "Server",
    "Settings",
    "State",
    "Step",
    "Telemetry",
    "Tls",
    "Upstream",
    "Webhook",
    "When",
    "describe",
    "hashed",
    "json_schema",
    "load",
]
