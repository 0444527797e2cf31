// The last calls: a row each, and where its time went. It stands still while somebody reads it.

import { isBroken, isRefused, phaseName, waterfall } from "./chart.js";
import { Table, element, figure, text } from "./table.js";
import { NONE, count, dollars, seconds, timeOfDay } from "./words.js";

const SHOWN = 50;
const SHORT = 0.1; // seconds; below it the length of a bar is to scale

export class Calls {
  constructor(section) {
    this.latest = [];
    this.widest = 0;
    this.open = 0;
    this.trouble = section.querySelector("#trouble");
    this.pause = section.querySelector("#pause");
    this.linear = section.querySelector("#linear");
    this.paused = false;
    this.table = new Table(section.querySelector("table"), {
      label: "calls-title",
      key: (call) => call.number,
      empty: "No call has ended yet.",
      columns: [
        { title: "Ended", class: "time", head: true, sort: (call) => call.number, make: (cell, call, known) => this.#opener(cell, call, known) },
        text("Model", (call) => call.model, "mid"),
        text("Upstream", (call) => call.upstream || NONE, "far"),
        text("Caller", (call) => call.caller || NONE, "farther"),
        { title: "Outcome", class: "outcome", rising: true, sort: (call) => call.outcome, make: outcome },
        figure("Took", (call) => call.seconds, seconds),
        figure("First token", (call) => call.first_token, seconds, "far"),
        figure("In", (call) => call.input_tokens, count, "far"),
        figure("Out", (call) => call.output_tokens, count, "mid"),
        { title: "Where the time went", class: "phases", make: (cell, call, known) => { known.scale = waterfall(cell, call); } },
      ],
    });
    this.table.removed = (known) => { if (known.detail) this.#close(known); };
    this.scale = this.table.heads.at(-1);
    const body = this.table.body;
    this.scale.parentNode.addEventListener("click", () => this.#rove()); // sorted anew, another row is the first
    addEventListener("resize", () => {
      for (const { detail } of this.table.rows.values()) if (detail) detail.firstElementChild.colSpan = this.#columns();
    });
    body.addEventListener("focusin", () => this.#refresh());
    body.addEventListener("focusout", () => setTimeout(() => this.#refresh()));
    body.addEventListener("keydown", (event) => this.#walk(event));
    body.addEventListener("click", (event) => {
      const row = event.target.closest("tr");
      if (!event.target.closest("button") && row?.firstElementChild.matches(".time")) row.querySelector("button").click();
    });
    this.trouble.addEventListener("click", () => {
      press(this.trouble, this.trouble.ariaPressed !== "true");
      this.#draw();
    });
    this.linear.addEventListener("click", () => {
      press(this.linear, this.linear.ariaPressed !== "true");
      this.#stretch();
    });
    this.pause.addEventListener("click", () => {
      this.paused = !this.#isHeld();
      if (!this.paused) for (const known of [...this.table.rows.values()]) if (known.detail) this.#close(known);
      this.#refresh();
    });
  }

  show(calls) {
    this.latest = calls;
    this.#refresh();
  }

  #isHeld() {
    return this.paused || this.open > 0 || this.table.body.contains(document.activeElement);
  }

  #refresh() {
    const held = this.#isHeld();
    if (!held) this.#draw();
    this.pause.classList.toggle("on", held);
    const newer = held && this.latest.length ? this.latest[0].number - (this.newest ?? 0) : 0;
    const words = held ? (newer > 0 ? `Resume, ${count(newer)} newer` : "Resume") : "Pause";
    if (this.pause.textContent !== words) this.pause.textContent = words;
  }

  #draw() {
    const only = this.trouble.ariaPressed === "true";
    const calls = only ? this.latest.filter(isTroubled) : this.latest.slice(0, SHOWN);
    this.newest = this.latest[0]?.number;
    this.table.empty.textContent = only ? "No call went wrong of late, and none was tried again." : "No call has ended yet.";
    this.table.show(calls);
    const widest = calls.reduce((most, call) => Math.max(most, call.seconds), 0);
    this.widest = widest;
    this.#stretch();
    this.#rove();
  }

  // Within a bar all is to scale. Its length is to scale too, or grows with the logarithm of the time, so that calls of a
  // second can be read beside those of a minute.
  #stretch() {
    const linear = this.linear.ariaPressed === "true";
    const length = (time) => (linear ? time : Math.log1p(time / SHORT));
    const whole = length(this.widest);
    for (const known of this.table.rows.values()) known.scale(whole ? length(known.row.seconds) / whole : 1);
    this.scale.textContent = `Where the time went${linear ? `, of ${seconds(this.widest)}` : ": longer bars, logarithmic"}`;
  }

  // One row at a time is in the order of Tab; arrows move between rows.
  #rove() {
    const buttons = this.#buttons();
    const chosen = buttons.find((button) => button === document.activeElement) ?? buttons[0];
    for (const button of buttons) button.tabIndex = button === chosen ? 0 : -1;
  }

  #buttons() {
    return [...this.table.body.querySelectorAll(".time > button")];
  }

  #walk(event) {
    const buttons = this.#buttons();
    const at = buttons.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (event.key === "Escape" && at >= 0) {
      if (buttons[at].ariaExpanded === "true") buttons[at].click();
      return;
    }
    if (at < 0 || to === undefined || !buttons[to]) return;
    event.preventDefault();
    buttons[at].tabIndex = -1;
    buttons[to].tabIndex = 0;
    buttons[to].focus();
  }

  #opener(cell, call, known) {
    const button = element(cell, "button", "", timeOfDay(call.ended));
    button.type = "button";
    button.ariaExpanded = "false";
    button.tabIndex = -1;
    element(cell, "span", "sub", call.model);
    button.addEventListener("click", () => {
      if (known.detail) this.#close(known);
      else this.#open(known);
      this.#refresh();
    });
    known.button = button;
    return null;
  }

  #open(known) {
    this.open += 1;
    known.detail = document.createElement("tr");
    known.detail.className = "detail";
    const cell = element(known.detail, "td");
    cell.colSpan = this.#columns();
    cell.id = `call-${known.row.number}`;
    describe(cell, known.row);
    known.button.ariaExpanded = "true";
    known.button.setAttribute("aria-controls", cell.id);
    known.tr.after(known.detail);
  }

  // More columns than can be seen would take room from those that can.
  #columns() {
    return this.table.heads.filter((head) => head.offsetParent !== null).length;
  }

  #close(known) {
    this.open -= 1;
    known.detail.remove();
    known.detail = null;
    known.button.ariaExpanded = "false";
    known.button.removeAttribute("aria-controls");
  }
}

const isTroubled = (call) => call.outcome !== "ok" || call.phases.filter((phase) => phase.kind === "attempt").length > 1;

function press(button, on) {
  button.ariaPressed = String(on);
}

function outcome(cell, call) {
  cell.classList.add(call.outcome === "ok" ? "good" : call.source === "client" ? "odd" : "bad");
  cell.textContent = call.status === 200 ? call.outcome : `${call.outcome} ${call.status}`;
  return null;
}

function describe(cell, call) {
  const facts = element(cell, "dl", "facts");
  const say = (name, text) => {
    if (!text || text === NONE) return;
    const pair = element(facts, "div");
    element(pair, "dt", "", name);
    element(pair, "dd", "", text);
  };
  say("request", call.id);
  say("model", call.model);
  say("operation", call.operation + (call.stream ? ", streamed" : ""));
  say("upstream", call.upstream);
  say("caller", call.caller);
  say("class", call.priority);
  say("status", String(call.status));
  say("error", call.error && `${call.error}, the ${call.source}'s`);
  say("ended", [call.end_reason, call.finish_reason].filter(Boolean).join(", "));
  say("took", seconds(call.seconds));
  say("first token", seconds(call.first_token));
  say("in the gateway itself", seconds(call.overhead_seconds));
  say("longest silence", call.stream && call.max_gap_seconds ? seconds(call.max_gap_seconds) : "");
  say("tokens", call.input_tokens == null ? "" : `${count(call.input_tokens)} in, ${count(call.output_tokens)} out`);
  say("cost", call.cost_usd == null ? "" : dollars(call.cost_usd));

  waterfall(cell, call);
  const list = element(cell, "ol", "steps");
  for (const phase of call.phases) {
    const item = element(list, "li", isRefused(phase) ? "refused" : phase.kind);
    element(item, "b", "", phaseName(phase));
    element(item, "span", "number", seconds(phase.to - phase.from));
    element(item, "span", "soft", `after ${seconds(phase.from)}`);
    element(item, "span", "", note(phase));
  }
}

function note(phase) {
  const told = [];
  if (phase.gate) told.push(`for ${phase.gate}`);
  if (phase.kind === "attempt") {
    told.push(phase.upstream, phase.model, phase.status ? `status ${phase.status}` : "no answer");
    if (phase.result !== "ok" && phase.result !== String(phase.status)) told.push(phase.result);
    if (phase.retry_after != null) told.push(`come back in ${seconds(phase.retry_after)}`);
    if (phase.upstream_id) told.push(phase.upstream_id);
  } else if (phase.kind === "step") {
    told.push(phase.result, `${count(phase.calls)} ${phase.calls === 1 ? "call" : "calls"}`);
  } else {
    if (phase.reason) told.push(`after a refusal: ${phase.reason}`);
    if (phase.source) told.push(phase.source.replace("_", " "));
    if (isBroken(phase)) told.push(`broke off: ${phase.result.replace("_", " ")}`);
    else if (phase.kind === "queue" && phase.result !== "admitted") told.push(phase.result);
  }
  if (phase.bytes) told.push(`${count(phase.bytes)} bytes in ${count(phase.chunks)} writes`);
  return told.filter(Boolean).join(" · ");
}
