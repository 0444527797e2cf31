// Pipelines as small drawings: stages from left to right, the steps of one stage below each other.

import { element, write } from "./table.js";
import { count, seconds } from "./words.js";

export class Pipelines {
  constructor(section) {
    this.section = section;
    this.drawn = ""; // the shape that stands there
    this.updates = [];
  }

  show(pipelines) {
    this.section.hidden = !pipelines.length;
    const shape = JSON.stringify(pipelines.map(({ pipeline, stages }) => [pipeline, stages.map((stage) => stage.map(({ step, model, mapped }) => [step, model, mapped]))]));
    if (shape !== this.drawn) this.draw(pipelines, shape);
    const steps = pipelines.flatMap(({ stages }) => stages.flat());
    this.updates.forEach((update, at) => update(steps[at]));
  }

  draw(pipelines, shape) {
    this.drawn = shape;
    this.updates = [];
    this.section.querySelectorAll(".pipeline").forEach((node) => node.remove());
    for (const { pipeline, stages } of pipelines) {
      const figure = element(this.section, "div", "pipeline");
      element(figure, "h3", "", pipeline);
      const list = element(figure, "ol");
      for (const stage of stages) {
        const column = element(element(list, "li"), "ul");
        for (const step of stage) this.updates.push(box(element(column, "li"), step));
      }
    }
  }
}

function box(node, { step, model, mapped }) {
  element(node, "b", "", step);
  element(node, "span", "soft", mapped ? `${model}, for each item` : model);
  const now = element(node, "span", "number");
  const past = element(node, "span", "soft");
  return ({ in_flight, results, mean_seconds }) => {
    write(now, in_flight ? `${count(in_flight)} in flight` : "idle");
    const told = Object.entries(results).map(([result, times]) => `${count(times)} ${result}`);
    if (mean_seconds != null) told.push(`${seconds(mean_seconds)} on average`);
    write(past, told.join(", ") || "has not run");
  };
}
