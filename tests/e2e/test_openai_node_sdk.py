"""OpenAI's Node SDK through the gateway. Its cases are those of tests/node/openai.test.mjs."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from proxy.config import Model, Secret, State
from proxy.simulator import ALWAYS, profiles
from proxy.simulator import serving as simulating
from tests.e2e import programs
from tests.e2e.running import at, serving, settings
from tests.e2e.simulated import FOUR_TOKENS

CASES = Path(__file__).parents[1] / "node" / "openai.test.mjs"
KEY = "sk-team-0123456789abcdef"
PROFILES = {
    "up": FOUR_TOKENS,
    "slow": replace(profiles.INSTANT, tokens_per_second=10.0),
    "poor": replace(FOUR_TOKENS, out_of_money=ALWAYS),
    "down": replace(FOUR_TOKENS, outage=ALWAYS),
    "breaking": replace(profiles.INSTANT, output_tokens=40, tokens_per_second=4000.0, abort_rate=1.0),
}


async def test_whatever_the_node_sdk_does_with_the_provider_it_does_here(tmp_path: Path) -> None:
    has_sdk = (CASES.parent / "node_modules").is_dir()
    node = programs.found("node", as_well="" if has_sdk else "OpenAI's Node SDK")
    async with AsyncExitStack() as stack:
        simulated = {name: await stack.enter_async_context(simulating(profile)) for name, profile in PROFILES.items()}
        upstreams = {name: at(simulator.base_url) for name, simulator in simulated.items()}
        models = dict.fromkeys(("gpt-4o-mini", "omni-moderation-latest"), Model(upstreams=("up",)))
        models |= {name: Model(upstreams=(name,)) for name in upstreams if name != "up"}
        said = settings(upstreams, models=models, callers={"team": Secret(KEY)}, state=State(path=str(tmp_path)))
        house = await stack.enter_async_context(serving(said))
        sides = {"GATEWAY": house.base_url, "PROVIDER": simulated["up"].base_url, "KEY": KEY}
        ran = await programs.run(node, str(CASES), env=sides)
        await house.until_idle()
        metrics = await house.metrics()
    assert ran.code == 0, ran.out.decode() + ran.err
    assert metrics("requests_total", outcome="cancelled") == 1  # the one who left
    assert metrics("requests_total", outcome="truncated") == 1
