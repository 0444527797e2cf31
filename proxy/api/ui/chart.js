// Small pictures in SVG: a history, a bar, a waterfall. Each says in words what it shows.

import { seconds } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300; // of a history's own coordinates; one for each second
const HEIGHT = 44;
const MARK = 14; // of the thousand units of a waterfall

export function draw(parent, name, attributes = {}) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent?.append(node);
  return node;
}

const within = (value) => Math.max(0, Math.min(1, value));

const picture = (parent, kind, width, height) =>
  draw(parent, "svg", { class: kind, viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img" });

// Five minutes of one figure or of several on top of each other.
//
// layers: class names, the lowest first; `lines` draws them beside each other instead of stacking them.
export class History {
  constructor(parent, layers, { lines = false, say }) {
    const frame = parent.appendChild(document.createElement("div"));
    frame.className = "history";
    this.svg = picture(frame, "chart", WIDTH, HEIGHT);
    for (let minute = 1; minute < 5; minute += 1) draw(this.svg, "path", { class: "grid", d: `M${60 * minute} 0V${HEIGHT}` });
    this.paths = layers.map((layer) => draw(this.svg, "path", { class: `${lines ? "line" : "area"} ${layer}` }));
    this.cursor = draw(this.svg, "path", { class: "cursor", d: "" });
    this.most = frame.appendChild(document.createElement("span"));
    this.most.className = "most";
    this.most.ariaHidden = "true";
    this.lines = lines;
    this.say = say;
    this.at = null;
    frame.addEventListener("pointermove", (event) => {
      const box = frame.getBoundingClientRect();
      this.at = within((event.clientX - box.left) / box.width);
      this.#read();
    });
    frame.addEventListener("pointerleave", () => { this.at = null; this.#read(); });
  }

  // series: one array for each layer, oldest first, null where nothing is known; step: seconds an entry stands for.
  show(series, step, words) {
    this.series = series;
    this.step = step;
    const levels = this.lines ? series : stacked(series);
    let most = 0;
    for (const level of levels) for (const value of level) if (value > most) most = value;
    this.top = most;
    const scale = most > 0 ? (HEIGHT - 3) / most : 0;
    levels.forEach((level, index) => {
      const below = index && !this.lines ? levels[index - 1] : null;
      this.paths[index].setAttribute("d", this.lines ? line(level, step, scale) : area(level, below, step, scale));
    });
    this.svg.ariaLabel = words;
    this.#read();
  }

  #read() {
    const length = this.series?.[0].length ?? 0;
    const age = this.at === null ? null : Math.floor(((1 - this.at) * WIDTH) / this.step);
    const found = age !== null && age < length;
    this.cursor.setAttribute("d", found ? `M${this.at * WIDTH} 0V${HEIGHT}` : "");
    if (found) {
      const values = this.series.map((level) => level[length - 1 - age]);
      this.most.textContent = `${age ? `${seconds(age * this.step)} ago` : "now"}: ${this.say(values)}`;
    } else {
      this.most.textContent = this.top ? `max ${this.say([this.top])}` : "";
    }
  }
}

function stacked(series) {
  const levels = [];
  for (const layer of series) {
    const below = levels.at(-1);
    levels.push(layer.map((value, index) => value + (below ? below[index] : 0)));
  }
  return levels;
}

const round = (value) => Math.round(value * 10) / 10;

function area(level, below, step, scale) {
  const left = WIDTH - level.length * step;
  const up = level.map((value, index) => `${left + (index + 0.5) * step} ${round(HEIGHT - value * scale)}`);
  if (!up.length) return "";
  const down = below
    ? below.map((value, index) => `${left + (index + 0.5) * step} ${round(HEIGHT - value * scale)}`).reverse()
    : [`${WIDTH - 0.5 * step} ${HEIGHT}`, `${left + 0.5 * step} ${HEIGHT}`];
  return `M${up.join("L")}L${down.join("L")}Z`;
}

function line(level, step, scale) {
  const left = WIDTH - level.length * step;
  let path = "";
  let pen = "M";
  level.forEach((value, index) => {
    if (value == null) {
      pen = "M";
      return;
    }
    const x = left + index * step;
    const y = round(HEIGHT - 1 - value * scale);
    path += `${pen}${x} ${y}H${x + step}`;
    pen = "L";
  });
  return path;
}

function track(parent, parts) {
  const svg = picture(parent, "bar", 100, 6);
  svg.ariaHidden = "true"; // the figures stand beside it
  const rect = (name, width) => draw(svg, "rect", { class: name, width, height: 6 });
  rect("whole", 100);
  return [svg, ...parts.map((name) => rect(name, 0))];
}

// A share of a whole, 0 to 1.
export function bar(parent) {
  const [svg, fill] = track(parent, ["fill"]);
  return (part) => {
    const level = within(part || 0);
    fill.setAttribute("width", round(100 * level));
    svg.classList.toggle("full", level >= 0.9);
  };
}

// Shares of one whole beside each other; `classes` name them.
export function shares(parent, classes) {
  const parts = track(parent, classes).slice(1);
  return (values) => {
    const all = values.reduce((sum, value) => sum + value, 0);
    let x = 0;
    values.forEach((value, index) => {
      const width = all ? (100 * value) / all : 0;
      parts[index].setAttribute("x", round(x));
      parts[index].setAttribute("width", round(width));
      x += width;
    });
  };
}

const NAMES = { queue: "queue", backoff: "backoff", attempt: "attempt", first_token: "first token", stream: "stream" };

const went = (phase) => phase.result === undefined || phase.result === "ok" || phase.result === "cancelled";

export const isRefused = (phase) => phase.kind === "attempt" && !went(phase);

export const isBroken = (phase) => phase.kind === "stream" && !went(phase);

export const phaseName = (phase) => (phase.kind === "step" ? `step ${phase.step}` : NAMES[phase.kind] ?? phase.kind);

// Where a call's time went. Waits are thin, work is thick. Returns a function that sets its length, 0 to 1.
export function waterfall(parent, call) {
  const svg = picture(parent, "waterfall", 1000, 14);
  const scaled = draw(svg, "g");
  const whole = Math.max(call.seconds, 1e-6);
  draw(scaled, "rect", { class: "whole", y: 6.5, width: 1000, height: 1 });
  const part = (name, from, width, height) =>
    draw(scaled, "rect", { class: name, x: from, y: 7 - height / 2, width: Math.max(width, 0), height });
  for (const phase of call.phases) {
    const waits = phase.kind === "queue" || phase.kind === "backoff";
    part(phase.kind, (1000 * phase.from) / whole, (1000 * (phase.to - phase.from)) / whole, waits ? 6 : 12);
  }
  for (const phase of call.phases) { // on top of the others and never too short to be seen
    const [from, to] = [(1000 * phase.from) / whole, (1000 * phase.to) / whole];
    if (isRefused(phase)) part("refused", Math.min(from, 1000 - MARK), Math.max(to - from, MARK), 14);
    if (isBroken(phase)) part("refused", to - MARK, MARK, 14);
  }
  svg.ariaLabel = call.phases.map((phase) => `${phaseName(phase)} ${seconds(phase.to - phase.from)}`).join(", ") || "no phases";
  return (length) => scaled.setAttribute("transform", `scale(${Math.max(0.004, within(length))} 1)`);
}
