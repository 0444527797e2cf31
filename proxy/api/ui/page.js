// The page: tiles, tables and its own state, drawn anew from each snapshot. Words from outside are text, never markup.

import { Calls } from "./calls.js";
import { History, bar, shares } from "./chart.js";
import { follow } from "./feed.js";
import { Pipelines } from "./pipelines.js";
import { Table, element, figure, name, text, write } from "./table.js";
import { NONE, brief, count, dollars, large, long, rate, seconds, share } from "./words.js";

const STALE = 3; // seconds without a snapshot
const SMOOTH = 5; // seconds over which a history of rates is averaged
const DOING = [["queued", "not sent"], ["backoff", "pausing"], ["waiting", "sent"], ["streaming", "answering"]];
const CLASSES = ["interactive", "default", "batch"];
const byId = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)");

// ── tiles ──

class Tile {
  constructor(id, layers, chart) {
    this.node = byId(id);
    this.big = this.node.querySelector("b");
    this.sub = this.node.querySelector(".sub");
    this.name = this.node.querySelector("h2").firstChild.textContent.trim();
    this.chart = new History(this.node, layers, chart);
  }

  show(big, sub, series, step) {
    write(this.big, big);
    write(this.sub, sub);
    this.chart.show(series, step, `${this.name}, the last five minutes: now ${big}. ${sub}`);
  }
}

const sum = (values) => values.reduce((all, value) => all + (value ?? 0), 0);
const perSecond = (values) => `${rate(sum(values))} /s`;
const percentiles = ([p50, p95]) => (p95 === undefined ? seconds(p50) : `p50 ${seconds(p50)}, p95 ${seconds(p95)}`);
const tiles = {
  requests: new Tile("requests", ["flow", "bad"], { say: perSecond }),
  tokens: new Tile("tokens", ["second", "flow"], { say: perSecond }),
  first: new Tile("first-token", ["second", "flow"], { lines: true, say: percentiles }),
  duration: new Tile("duration", ["second", "flow"], { lines: true, say: percentiles }),
  flight: new Tile("in-flight", ["flow"], { say: (values) => count(sum(values)) }),
  waiting: new Tile("waiting", ["queue"], { say: (values) => count(sum(values)) }),
};
const seen = { flight: [], waiting: [] }; // levels since the page was opened; the gateway keeps no history of them

function remember(list, value) {
  list.push(value);
  if (list.length > 300) list.shift();
}

// The mean of each entry and those before it, `SMOOTH` in all.
function smooth(values) {
  let total = 0;
  return values.map((value, index) => {
    total += value - (index >= SMOOTH ? values[index - SMOOTH] : 0);
    return total / Math.min(SMOOTH, index + 1);
  });
}

function showTiles(said) {
  const { rates, minute, history, in_flight: flight, queue } = said;
  const good = history.calls.map((calls, index) => calls - history.failed[index]);
  const failed = `${rate(rates.failed)} /s failed, ${count(minute.calls)} calls in the last minute`;
  tiles.requests.show(rate(rates.calls), failed, [smooth(good), smooth(history.failed)], history.seconds);
  const both = `${rate(rates.input_tokens)} in, ${rate(rates.output_tokens)} out`;
  const tokens = [smooth(history.input_tokens), smooth(history.output_tokens)];
  tiles.tokens.show(rate(rates.input_tokens + rates.output_tokens), both, tokens, history.seconds);
  for (const [tile, name] of [[tiles.first, "first_token"], [tiles.duration, "duration"]]) {
    const [p50, p95, p99] = minute[name];
    const lines = [0, 1].map((index) => history[name].map((each) => each[index]));
    tile.show(seconds(p95), `p50 ${seconds(p50)}, p99 ${seconds(p99)}, last minute`, lines, history.span_seconds);
  }
  remember(seen.flight, flight.calls);
  const words = DOING.filter(([phase]) => flight[phase]).map(([phase, what]) => `${count(flight[phase])} ${what}`);
  if (flight.calls) words.push(`oldest ${seconds(flight.oldest_seconds)}`);
  tiles.flight.show(count(flight.calls), words.join(", ") || "nothing under way", [seen.flight], 1);
  const waiting = sum(Object.values(queue.waiting));
  remember(seen.waiting, waiting);
  const who = CLASSES.filter((name) => queue.waiting[name]).map((name) => `${count(queue.waiting[name])} ${name}`);
  tiles.waiting.show(count(waiting), `${who.join(", ") || "nobody"}, of at most ${count(queue.limit)}`, [seen.waiting], 1);
}

// ── tables ──

// A share of a whole, with its figures; `say(row)` is [text, part of 1 or null].
const level = (title, say, sort, more) => ({
  title,
  sort,
  make: (cell) => {
    const words = element(cell, "span", "number");
    const fill = bar(cell);
    return (row) => {
      const [text, part] = say(row);
      write(words, text);
      words.classList.toggle("none", text === NONE);
      cell.classList.toggle("no-bar", part === null);
      fill(part);
    };
  },
  ...more,
});

const holds = new Map(); // cell -> when its hold is over, on the page's own clock

const hold = {
  title: "Hold",
  class: "number hold",
  sort: (row) => row.hold_seconds,
  make: (cell) => (row) => {
    if (row.hold_seconds > 0) holds.set(cell, performance.now() + 1000 * row.hold_seconds);
    else holds.delete(cell);
    countDown(cell);
  },
};

function countDown(cell) {
  const left = ((holds.get(cell) ?? 0) - performance.now()) / 1000;
  if (left <= 0 || !cell.isConnected) holds.delete(cell);
  cell.classList.toggle("held", left > 0);
  cell.classList.toggle("none", left <= 0);
  write(cell, left > 0 ? `${left.toFixed(1)} s` : NONE);
}

const capital = (word) => word[0].toUpperCase() + word.slice(1);
const waits = (row) => sum(Object.values(row.waiting));
const few = (value) => (value ? count(value) : NONE);
const spaced = (word) => word.replaceAll("_", " ");

function places({ in_use: used, concurrency: limit }) {
  return limit == null ? [count(used), null] : [`${count(used)} / ${count(limit)}`, limit ? used / limit : 1];
}

const gates = new Table(byId("gates").querySelector("table"), {
  label: "gates-title",
  key: (row) => row.pool,
  empty: "No gate yet.",
  columns: [
    name("Gate", (row) => row.pool),
    level("In use", places, (row) => row.in_use, { class: "level" }),
    figure("Waiting", waits, few, "strong"),
    ...CLASSES.map((each) => figure(capital(each), (row) => row.waiting[each] ?? 0, few, "mid")),
    hold,
  ],
});

const left = ({ level: now, burst }) => (burst ? [`${large(now)} / ${large(burst)}`, now / burst] : [large(now), null]);

const limits = new Table(byId("limits").querySelector("table"), {
  label: "limits-title",
  key: (row) => `${row.pool}\n${row.limit}\n${row.source}`,
  empty: "No limit is known yet.",
  columns: [
    name("Account", (row) => row.pool),
    text("Limit", (row) => row.limit, "what"),
    figure("Per minute", (row) => row.per_minute, large),
    level("Left now", left, (row) => row.level, { class: "level left" }),
    text("Source", (row) => row.source, "mid"),
    figure("Known for", (row) => row.known_seconds, brief, "mid"),
    hold,
  ],
});

// Each limit a row; a pool of which nothing is known yet says how many calls it takes meanwhile.
function limitRows(pools) {
  return pools.flatMap((pool) => {
    if (pool.limits.length) return pool.limits.map((limit) => ({ ...limit, pool: pool.pool }));
    if (pool.cold_calls == null) return [];
    const calls = Math.floor(pool.cold_calls);
    return [{ pool: pool.pool, limit: `${calls} at once`, source: "cold start", hold_seconds: pool.hold_seconds }];
  });
}

const CLOSED = { state: "closed", reason: "none", shut_seconds: 0 };
const refused = (row) => row.throttled + row.overloaded;
const broken = (row) => row.failed + row.truncated;

const upstreams = new Table(byId("upstreams").querySelector("table"), {
  label: "upstreams-title",
  key: (row) => row.name,
  empty: "No upstream is configured.",
  columns: [
    name("Upstream", (row) => row.name),
    figure("In flight", (row) => row.in_flight, count, "mid"),
    figure("Per second", (row) => row.per_second, rate),
    {
      title: "Outcomes",
      class: "far shares",
      make: (cell) => {
        const parts = shares(cell, ["ok", "queue", "refused", "rejected"]);
        return (row) => parts([row.ok, refused(row), broken(row), row.rejected + row.cancelled]);
      },
    },
    figure("OK", (row) => (row.attempts ? row.ok / row.attempts : null), share, "mid"),
    figure("Refused", refused, few),
    figure("Errors", broken, few),
    figure("Rejected", (row) => row.rejected, few, "far"),
    {
      title: "Circuit",
      class: "text circuit",
      rising: true,
      sort: (row) => row.circuit.state,
      make: (cell) => ({ circuit }) => {
        const left = circuit.shut_seconds > 0 ? `, ${long(circuit.shut_seconds)}` : "";
        cell.classList.toggle("held", circuit.state !== "closed");
        write(cell, circuit.state === "shut" ? `shut: ${circuit.reason}${left}` : circuit.state);
      },
    },
  ],
});

const errors = new Table(byId("errors").querySelector("table"), {
  label: "errors-title",
  key: (row) => `${row.source} ${row.type}`,
  empty: "None in the last five minutes.",
  columns: [
    name("Error", (row) => spaced(row.type)),
    text("Whose", (row) => row.source),
    figure("Last minute", (row) => row.minute, few),
    figure("Five minutes", (row) => row.five_minutes, count),
  ],
});

const done = (row) => row.items - row.left;

const batches = new Table(byId("batches").querySelector("table"), {
  label: "batches-title",
  key: (row) => row.id,
  empty: "None is open.",
  columns: [
    name("Batch", (row) => row.id),
    text("Model", (row) => row.model || NONE),
    text("Caller", (row) => row.owner || NONE, "far"),
    text("State", (row) => spaced(row.status), "mid"),
    level("Items ended", (row) => [`${count(done(row))} / ${count(row.items)}`, row.items ? done(row) / row.items : null], done, { class: "level" }),
    figure("Under way", (row) => row.running, few, "mid"),
    text("Waits for", (row) => spaced(row.waits_for) || NONE),
    figure("Age", (row) => row.age_seconds, brief, "mid"),
    figure("Expires in", (row) => row.expires_seconds, brief, "far"),
  ],
});

function showBatches({ batches: open, batches_left_out: besides }) {
  byId("batches").hidden = !open.length;
  batches.show(open);
  write(byId("batches-besides"), besides ? `and ${count(besides)} more` : "");
}

const pipelines = new Pipelines(byId("pipelines"));
const calls = new Calls(byId("calls"));

// ── a snapshot ──

let latest = null;
let arrived = 0;

export function show(said) {
  latest = said;
  arrived = performance.now();
  if (!document.hidden) render();
}

function render() {
  const said = latest;
  showTiles(said);
  gates.show(said.gates);
  limits.show(limitRows(said.gates));
  const circuits = new Map(said.circuits.map((each) => [each.upstream, each]));
  upstreams.show(Object.entries(said.upstreams).map(([name, told]) => ({ name, ...told, circuit: circuits.get(name) ?? CLOSED })));
  errors.show(said.errors);
  showBatches(said);
  pipelines.show(said.pipelines);
  calls.show(said.calls);
  const { totals } = said;
  const facts = [`${count(totals.calls)} calls`, `${large(totals.input_tokens + totals.output_tokens)} tokens`];
  if (totals.cost_usd) facts.push(dollars(totals.cost_usd));
  write(byId("facts"), `${facts.join(", ")} in ${long(said.uptime_seconds)} · version ${said.version}`);
  state();
}

// ── the page's own state ──

const WORDS = {
  connecting: "Connecting",
  live: "Live",
  stale: "Stale",
  lost: "Connection lost",
  stopped: "Gateway stopped",
  key: "Key needed",
  refused: "Key refused",
  draining: "Draining: takes no new calls",
};
let connection = "connecting";
let nextTry = 0;

function state() {
  const age = latest ? (performance.now() - arrived) / 1000 : 0;
  let now = connection;
  if (now === "live" && age > STALE) now = "stale";
  if (now === "live" && latest?.draining) now = "draining";
  if (now === "connecting" && latest) now = "lost"; // it stays lost until figures come
  const pill = byId("state");
  if (pill.dataset.state !== now) {
    pill.dataset.state = now;
    pill.textContent = WORDS[now]; // a live region: written when the state changes, not every second
    document.body.dataset.state = now;
    document.title = now === "live" ? "Penstock" : `Penstock: ${WORDS[now]}`;
  }
  const left = Math.ceil((nextTry - performance.now()) / 1000);
  const words = [];
  if (now !== "live" && now !== "draining" && latest) words.push(`these figures are ${long(age)} old`);
  if ((now === "lost" || now === "stopped") && left > 0) words.push(`next try in ${left} s`);
  write(byId("age"), words.join(", "));
  const asks = now === "key" || now === "refused";
  if (byId("key").hidden === asks) {
    byId("key").hidden = !asks;
    if (asks) byId("key-input").focus();
  }
}

const enter = follow("live", show, (told, wait = 0) => {
  connection = told;
  nextTry = performance.now() + 1000 * wait;
  state();
});

byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  const input = byId("key-input");
  enter(input.value.trim());
  input.value = "";
});

setInterval(state, 1000);
setInterval(() => { if (!still.matches) for (const cell of holds.keys()) countDown(cell); }, 100);
document.addEventListener("visibilitychange", () => { if (!document.hidden && latest) render(); });

// ── light and dark ──

const THEMES = ["auto", "light", "dark"];
const chosen = localStorage.getItem("penstock-theme");
let theme = THEMES.includes(chosen) ? chosen : "auto";

function paint() {
  document.documentElement.dataset.theme = theme;
  write(byId("theme"), `Theme: ${theme}`);
}

byId("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  localStorage.setItem("penstock-theme", theme);
  paint();
});
paint();
