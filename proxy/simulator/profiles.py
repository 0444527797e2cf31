"""Ready profiles: the providers that the demo, the tests and the benchmarks meet most."""

from __future__ import annotations

from math import inf

from proxy.simulator.profile import Profile, Style

TIGHT = Profile(requests_per_minute=500, requests_burst=50, tokens_per_minute=200_000)
ROOMY = Profile(requests_per_minute=30_000, tokens_per_minute=150_000_000)
SILENT = Profile(requests_per_minute=500, requests_burst=50, tokens_per_minute=200_000, style=Style.NONE)
ANTHROPIC = Profile(requests_per_minute=50, tokens_per_minute=50_000, style=Style.ANTHROPIC)
SELF_HOSTED = Profile(style=Style.NONE, concurrency=256, knee=32, prompt_tokens_per_second=8000.0, keys=None)
INSTANT = Profile(
    first_token_seconds=0.0, first_token_sigma=0.0, tokens_per_second=inf, output_tokens=16, output_sigma=0.0
)

BY_NAME = {
    "tight": TIGHT,
    "roomy": ROOMY,
    "silent": SILENT,
    "anthropic": ANTHROPIC,
    "self-hosted": SELF_HOSTED,
    "instant": INSTANT,
}
