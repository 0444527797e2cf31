"""The page as people meet it: in headless Chromium, before a gateway under load."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy.api import ui
from proxy.config import Limits, Secret, Server
from tests.e2e.running import House
from tests.ui.browser import Page, opened
from tests.ui.house import DIGEST, LIVELY, gateway, load, mixed, serving_feed, snapshot_of

KEY = "admin-key-0123456789"
LIVE = "document.querySelector('#state')?.dataset.state === 'live'"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
FOCUS = "document.activeElement.id || document.activeElement.className || document.activeElement.textContent.trim()"
BACKGROUNDS = {"light": "rgb(243, 246, 248)", "dark": "rgb(13, 17, 23)"}
PICTURE = Path(__file__).parents[2] / "docs" / "live.png"

# Each text that can be seen, with its contrast to what is behind it, where that is below WCAG's AA.
DULL = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const rgb = (said) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = said; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
  const ratio = (one, other) => { const [a, b] = [light(one), light(other)].sort((x, y) => y - x);
    return (a + .05) / (b + .05); };
  const behind = (node) => { for (; node; node = node.parentElement) {
      const said = rgb(getComputedStyle(node).backgroundColor); if (said[3] > 250) return said; }
    return [255, 255, 255]; };
  const dull = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !node.checkVisibility() || node.closest('.skip')) continue;
    const style = getComputedStyle(node), size = parseFloat(style.fontSize);
    const wanted = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    const found = ratio(rgb(style.color), behind(node));
    if (found < wanted) dull.push(`${texts.currentNode.data.trim()}: ${found.toFixed(2)}`);
  }
  for (const node of document.querySelectorAll('.waterfall [class]:not(.whole), .bar .fill, .area, .legend li')) {
    const fill = node.matches('li') ? getComputedStyle(node, '::before').backgroundColor : getComputedStyle(node).fill;
    const found = ratio(rgb(fill), behind(node.closest('.card, .tile')));
    if (found < 3 && !node.matches('.second')) dull.push(`${node.getAttribute('class')}: ${found.toFixed(2)}`);
  }
  return [...new Set(dull)];
})()"""


@asynccontextmanager
async def looking(browser: str, house: House) -> AsyncIterator[Page]:
    async with opened(browser, f"{house.admin}/ui/") as page:
        await page.until(LIVE)
        yield page


async def inject(page: Page, said: Mapping[str, Any]) -> None:
    """Show a snapshot as if it had come from the gateway."""
    await page.run(f"import('/ui/page.js').then((page) => page.show({json.dumps(said)}))")


def figure(text: str) -> float:
    return float(text.split()[0].replace(",", ""))


# ── what it shows ──


async def test_figures_move_under_load_and_agree_with_metrics(browser: str) -> None:
    async with gateway(LIVELY, limits=Limits()) as house, looking(browser, house) as page:
        assert await page.text("#calls .empty") == "No call has ended yet."
        seen: list[float] = []
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(load(house, 25))
                await page.until(f"parseInt(document.querySelector('#facts').textContent) > {seen[-1] if seen else 0}")
                seen.append(figure(await page.text("#facts")))
        assert seen == sorted(set(seen))
        assert figure(await page.text("#requests b")) > 0
        assert figure(await page.text("#tokens b")) > 0
        metrics = await house.metrics()
        total = int(metrics("requests_total"))
        await page.until(f"document.querySelector('#facts').textContent.startsWith('{total:,} calls')")
        tokens = metrics("tokens_total")
        assert f"{tokens:,.0f} tokens" in await page.text("#facts")
        await page.until("document.querySelector('#in-flight b').textContent === '0'")
        assert await page.run("document.querySelectorAll('#calls tbody tr').length") == min(50, total)
        cells = "[...document.querySelector('#upstreams tbody tr').cells].map((cell) => cell.textContent)"
        name, flying, _, _, ok, *_ = await page.run(cells)
        assert (name, flying) == ("up", "0")
        attempts = metrics("upstream_attempts_total")
        assert float(ok.split()[0]) == pytest.approx(
            100 * metrics("upstream_attempts_total", result="ok") / attempts, abs=0.06
        )
        limits = await page.run("[...document.querySelectorAll('#limits tbody tr')].map((row) => row.textContent)")
        assert any("up/gpt-4o-mini" in limit and "1,200" in limit and "headers" in limit for limit in limits)


async def test_a_call_opens_to_its_phases_and_the_list_stands_still_meanwhile(browser: str) -> None:
    async with gateway(LIVELY) as house, looking(browser, house) as page:
        await load(house, 6)
        await page.until("document.querySelectorAll('#calls tbody tr').length === 6")
        await page.run("document.querySelector('#calls tbody button').click()")
        steps = await page.run("[...document.querySelectorAll('.steps li')].map((step) => step.textContent)")
        assert any(step.startswith("attempt") and "up · gpt-4o-mini · status" in step for step in steps)
        await load(house, 4)
        await page.until("document.querySelector('#pause').textContent === 'Resume, 4 newer'")
        assert await page.run("document.querySelectorAll('#calls tbody tr:not(.detail)').length") == 6
        await page.run("document.querySelector('#pause').click()")
        await page.until("document.querySelectorAll('#calls tbody tr').length === 10")
        assert await page.text("#pause") == "Pause"


async def test_only_trouble_can_be_shown(browser: str) -> None:
    async with gateway() as house, looking(browser, house) as page:
        await load(house, 5)
        await house.ask({"model": "gpt-4o-mini", "stream": 5})
        await page.until("document.querySelectorAll('#calls tbody tr').length === 6")
        await page.run("document.querySelector('#trouble').click()")
        assert await page.run("document.querySelectorAll('#calls tbody tr').length") == 1
        assert await page.text("#calls tbody .outcome") == "rejected 400"
        assert await page.text("#errors tbody tr") == "invalid requestclient11"


async def test_a_name_that_is_markup_is_shown_as_it_is_written(browser: str) -> None:
    name = "<img src=x onerror=document.title='hacked'>"
    async with gateway() as house, looking(browser, house) as page:
        await house.ask({"model": name, "messages": []})
        await page.until("document.querySelectorAll('#calls tbody tr').length === 1")
        await page.run("document.querySelector('#calls tbody button').click()")
        assert name in await page.text("#calls tbody")
        assert name in await page.text("#gates tbody")
        assert await page.run("document.images.length") == 0
        assert await page.run("document.title") == "Penstock"


async def test_batches_have_a_place_while_there_are_any(browser: str) -> None:
    told = {
        "id": "batch_0123456789abcdef0123456789abcdef",
        "owner": "team-a",
        "model": "gpt-4o-mini",
        "status": "in_progress",
        "items": 50_000,
        "left": 12_500,
        "running": 32,
        "age_seconds": 4000.0,
        "expires_seconds": 82_400.0,
        "waits_for": "money",
    }
    async with gateway() as house, looking(browser, house) as page:
        assert await page.run("document.querySelector('#batches').hidden")
        said = await snapshot_of(house) | {"batches": [told], "batches_left_out": 3}
        for width in (400, 1600):
            await page.resize(width)
            # Within one turn of the page, before the gateway's next snapshot, which knows of no batch.
            hidden, row, besides, beyond = await page.run(f"""import('/ui/page.js').then((page) => {{
              page.show({json.dumps(said)});
              const text = (selector) => document.querySelector(selector).textContent;
              return [document.querySelector('#batches').hidden, text('#batches tbody tr'), text('#batches-besides'),
                {OVERFLOW}];
            }})""")
            assert (hidden, besides, beyond) == (False, "and 3 more", 0)
            for said_of_it in (
                told["id"],
                "gpt-4o-mini",
                "team-a",
                "in progress",
                "37,500 / 50,000",
                "money",
                "67 min",
                "23 h",
            ):
                assert str(said_of_it) in row
        await page.until("document.querySelector('#batches').hidden")


async def test_a_pipeline_is_drawn_with_what_became_of_its_steps(browser: str) -> None:
    async with gateway(pipelines={"digest": DIGEST}) as house, looking(browser, house) as page:
        assert "has not run" in await page.text("#pipelines .pipeline")
        stages = """[...document.querySelectorAll('.pipeline ol > li')]
          .map((stage) => [...stage.querySelectorAll('b')].map((step) => step.textContent))"""
        first, *later = await page.run(stages)
        assert first == list(DIGEST["steps"])[:2]  # beside each other: neither waits for the other
        assert later == [[step] for step in list(DIGEST["steps"])[2:]]
        asked = {"model": "pipeline/digest", "messages": [{"role": "user", "content": '["a", "b"]'}]}
        assert (await house.ask(asked)).status == 200
        last = "document.querySelector('.pipeline ol > li:last-child').textContent"
        await page.until(f"{last}.includes('1 ok')")
        assert (await page.run(last)).startswith("eachgpt-4o-mini, for each itemidle1 ok, ")
        await page.run("document.querySelector('#calls tbody button').click()")
        told = await page.run("[...document.querySelectorAll('.detail .steps li')].map((item) => item.textContent)")
        assert len(told) == len(DIGEST["steps"])
        assert told[-1].startswith("step each")
        assert told[-1].endswith("ok · 2 calls")


async def test_without_a_pipeline_there_is_no_place_for_any(browser: str) -> None:
    async with gateway() as house, looking(browser, house) as page:
        assert await page.run("document.querySelector('#pipelines').hidden")


async def test_a_hold_counts_down_between_snapshots(browser: str) -> None:
    async with gateway() as house, looking(browser, house) as page:
        await load(house, 1)
        said = await snapshot_of(house)
        said["gates"][1]["hold_seconds"] = 100.0
        held = "document.querySelector('#gates .held')?.textContent"
        # Far from the gateway's next snapshot, which knows of no hold, all happens within one turn of the page.
        count = f"""import('/ui/page.js').then(async (page) => {{
          page.show({json.dumps(said)});
          const first = {held};
          await new Promise((resolve) => setTimeout(resolve, 250));
          return [first, {held}];
        }})"""
        first, then = await page.run(count)
        assert first == "100.0 s"
        assert then is None or 99.0 < figure(then) < 100.0
        await page.prefer(prefers_reduced_motion="reduce")
        first, then = await page.run(count)
        assert first == "100.0 s"
        assert then in (None, "100.0 s")


# ── for everybody ──


async def test_nothing_runs_out_of_the_page_at_any_width(browser: str) -> None:
    async with gateway(LIVELY, limits=Limits(), pipelines={"digest": DIGEST}) as house, looking(browser, house) as page:
        await load(house, 20)
        await house.ask({"model": "a-model-with-a-name-that-goes-on-and-on/" * 4, "messages": []})
        await page.until("document.querySelectorAll('#calls tbody tr').length === 21")
        await page.run("document.querySelector('#calls tbody button').click()")
        out = """[...document.querySelectorAll('body *')]
          .filter((node) => !node.closest('svg, .skip') && node.checkVisibility())
          .filter((node) => node.getBoundingClientRect().right > innerWidth + 1).map((node) => node.outerHTML)"""
        for width in (320, 400, 640, 820, 1001, 1280, 1600, 2400):
            await page.resize(width)
            assert await page.run(OVERFLOW) == 0, width
            assert await page.run(out) == [], width
            shown, spanned = await page.run("""[
              [...document.querySelectorAll('#calls th')].filter((head) => head.checkVisibility()).length - 21,
              document.querySelector('.detail td').colSpan]""")
            assert shown == spanned, width


async def test_all_text_can_be_read_in_light_and_dark(browser: str) -> None:
    async with gateway(LIVELY, limits=Limits(), pipelines={"digest": DIGEST}) as house, looking(browser, house) as page:
        await load(house, 30)
        await house.ask({"model": "gpt-4o-mini", "stream": 5})
        await page.until("document.querySelectorAll('#calls tbody tr').length === 31")
        await page.run("document.querySelector('#calls tbody button').click()")
        for theme, background in BACKGROUNDS.items():
            await page.prefer(prefers_color_scheme=theme)
            assert await page.run("getComputedStyle(document.body).backgroundColor") == background
            assert await page.run(DULL) == [], theme
            for state in ("stale", "lost", "stopped", "draining", "key"):
                await page.run(f"document.querySelector('#state').dataset.state = '{state}'")
                assert await page.run(DULL) == [], (theme, state)
        await page.run("document.documentElement.style.setProperty('--soft', '#333')")
        assert await page.run(DULL) != []  # the ruler measures


async def test_the_theme_can_be_chosen_and_is_remembered(browser: str) -> None:
    async with gateway() as house, looking(browser, house) as page:
        await page.prefer(prefers_color_scheme="light")
        for theme, background in BACKGROUNDS.items():
            await page.run("document.querySelector('#theme').click()")
            assert await page.text("#theme") == f"Theme: {theme}"
            assert await page.run("getComputedStyle(document.body).backgroundColor") == background
        await page.go(f"{house.admin}/ui/")
        await page.until(LIVE)
        assert await page.text("#theme") == "Theme: dark"


async def test_everything_can_be_done_with_the_keyboard(browser: str) -> None:
    async with gateway(LIVELY) as house, looking(browser, house) as page:
        await load(house, 4)
        await page.until("document.querySelectorAll('#calls tbody tr').length === 4")
        await page.press("Tab")
        assert await page.run(FOCUS) == "skip"
        assert await page.run("document.activeElement.getBoundingClientRect().top >= 0")
        await page.press("Enter")
        assert await page.run(FOCUS) == "main"
        await page.press("Tab")
        assert await page.run(FOCUS) == "Gate"
        assert await page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        for order in ("ascending", "descending", None):
            await page.press("Enter")
            assert await page.run("document.activeElement.closest('th').getAttribute('aria-sort')") == order
        await page.run("document.querySelector('#pause').focus()")
        while (where := await page.run(FOCUS)) != "Took":
            assert where not in ("skip", "Penstock")
            await page.press("Tab")
        await page.press("Enter")
        took = "[...document.querySelectorAll('#calls tbody tr')].map((row) => row.cells[5].textContent)"
        falling = [_milliseconds(text) for text in await page.run(took)]
        assert falling == sorted(falling, reverse=True)
        while "calls" not in await page.run(
            "document.activeElement.closest('tbody')?.parentNode.ariaLabelledByElements[0].id ?? ''"
        ):
            await page.press("Tab")
        await page.press("ArrowDown")
        await page.press("Enter")
        row = "[...document.querySelectorAll('#calls tbody tr')].indexOf(document.activeElement.closest('tr'))"
        assert await page.run(row) == 1
        assert await page.run("document.activeElement.ariaExpanded") == "true"
        assert await page.run(
            "document.getElementById(document.activeElement.getAttribute('aria-controls')).textContent"
        )
        await page.press("End")
        assert await page.run(row) == 4  # the fourth call, below the open one's details
        await page.press("Home")
        await page.press("ArrowDown")
        await page.press("Escape")
        assert await page.run("document.activeElement.ariaExpanded") == "false"


async def test_focus_stays_with_a_row_while_rows_move(browser: str) -> None:
    async with gateway() as house, looking(browser, house) as page:
        await load(house, 3)
        said = await snapshot_of(house)
        await page.run("document.querySelector('#gates th button').focus()")
        said["gates"].reverse()
        await inject(page, said)
        assert await page.run(FOCUS) == "Gate"


async def test_a_screen_reader_finds_landmarks_names_and_headings(browser: str) -> None:
    async with gateway(LIVELY) as house, looking(browser, house) as page:
        await load(house, 4)
        await page.until("document.querySelectorAll('#calls tbody tr').length === 4")
        await page.ask("Accessibility.enable")
        tree = (await page.ask("Accessibility.getFullAXTree"))["nodes"]
        found: dict[str, list[str]] = {}
        for node in tree:
            if not node.get("ignored"):
                found.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
        assert {"banner", "main", "navigation", "status"} <= found.keys()
        assert found["heading"][0] == "Penstock"
        assert {"Gates", "Limits", "Upstreams", "Last calls"} <= set(found["heading"])
        assert {"Gates", "Upstreams", "Last calls"} <= set(found["table"])
        assert {"In use", "Waiting", "Outcome", "Took"} <= set(found["columnheader"])
        assert "up" in found["rowheader"]
        assert all(found["button"])
        pictures = found["image"] if "image" in found else found["img"]
        assert any(name.startswith("Requests, the last five minutes: now ") for name in pictures)
        assert any(name.startswith("attempt ") and "stream" in name for name in pictures)
        assert (
            await page.run("document.querySelectorAll('[aria-live], [role=status], [role=alert], [role=log]').length")
            == 1
        )


# ── connections ──


async def test_the_key_is_asked_for_and_kept_for_the_tab_only(browser: str) -> None:
    server = Server(port=0, admin_port=0, admin_key=Secret(KEY))
    async with gateway(server=server) as house, opened(browser, f"{house.admin}/ui/", expected=("401",)) as page:
        await page.until("document.querySelector('#state')?.dataset.state === 'key'")
        assert await page.run(FOCUS) == "key-input"
        await page.type("not-the-key")
        await page.press("Enter")
        await page.until("document.querySelector('#state').dataset.state === 'refused'")
        assert await page.run("sessionStorage.length") == 0
        await page.type(KEY)
        await page.press("Enter")
        await page.until(LIVE)
        assert await page.run("document.querySelector('#key').hidden")
        assert await page.run("Object.values(sessionStorage)") == [KEY]
        assert KEY not in await page.run("JSON.stringify(localStorage) + document.cookie + document.body.outerHTML")


async def test_a_gateway_that_stops_is_told_and_found_again(browser: str) -> None:
    async with gateway() as house, looking(browser, house) as page:
        port = house.gateway.admin_port
        page.expected = (
            "ERR_CONNECTION_REFUSED",
            "ERR_INCOMPLETE_CHUNKED_ENCODING",
            "ERR_EMPTY_RESPONSE",
            "ERR_CONNECTION_RESET",
        )
        await house.gateway.__aexit__(None, None, None)
        await page.until("['stopped', 'lost'].includes(document.querySelector('#state').dataset.state)")
        assert await page.run("document.title") != "Penstock"
        await page.until("document.querySelector('#age').textContent.includes('old')")
        async with gateway(server=Server(port=0, admin_port=port)):
            await page.until(LIVE)
            assert await page.text("#age") == ""


async def test_figures_that_are_no_longer_fresh_are_called_stale(browser: str) -> None:
    async with gateway() as house:
        said = await snapshot_of(house)
    feed = ui.Feed(lambda: said, tick_seconds=3600)
    async with serving_feed(feed) as port, opened(browser, f"http://127.0.0.1:{port}/ui/") as page:
        await page.until(LIVE)
        await page.until("document.querySelector('#state').dataset.state === 'stale'")
        assert (await page.text("#age")).startswith("these figures are")


async def kept(page: Page) -> tuple[int, int]:
    """Bytes and nodes that are left of a page after its garbage has been collected."""
    await page.ask("HeapProfiler.collectGarbage")
    heap = (await page.ask("Runtime.getHeapUsage"))["usedSize"]
    return heap, (await page.ask("Memory.getDOMCounters"))["nodes"]


async def test_an_hour_of_snapshots_leaves_the_pages_memory_flat(browser: str) -> None:
    async with gateway(LIVELY, limits=Limits(), pipelines={"digest": DIGEST}) as house, looking(browser, house) as page:
        await load(house, 12)
        said = await snapshot_of(house)
        minutes = f"""import('/ui/page.js').then((page) => {{
          const said = (window.said ??= {json.dumps(said)});
          for (let second = 0; second < 300; second += 1) {{
            for (const call of said.calls) call.number += 1;
            said.totals.calls += 1;
            page.show(said);
          }}
        }})"""
        await page.run(minutes)
        heap, nodes = await kept(page)
        for _ in range(11):
            await page.run(minutes)
        deadline = time.monotonic() + 30
        while True:  # one collection of garbage need not find all of it
            later_heap, later_nodes = await kept(page)
            if later_heap - heap < 500_000 and later_nodes - nodes < 200:
                break
            assert time.monotonic() < deadline, (heap, later_heap, nodes, later_nodes)


if "LIVE_PNG" in os.environ:  # LIVE_PNG=300 draws docs/live.png anew, after so many seconds

    @pytest.mark.timeout(600)
    async def test_a_picture_for_the_documentation(browser: str) -> None:
        async with mixed() as house, looking(browser, house) as page:
            await page.resize(1440, 1180, scale=1.5)
            await asyncio.sleep(float(os.environ["LIVE_PNG"]))
            await page.until("parseInt(document.querySelector('#waiting b').textContent) > 30", seconds=150)
            await page.run("""[...document.querySelectorAll('#calls tbody tr')].slice(0, 8)
              .find((row) => row.querySelectorAll('.waterfall g > rect').length > 4)
              ?.querySelector('button').click()""")
            await page.run("document.activeElement.blur()")
            PICTURE.write_bytes(await page.screenshot())


def _milliseconds(text: str) -> float:
    value, unit = text.split()
    return float(value) * {"ms": 1, "s": 1000}[unit]
