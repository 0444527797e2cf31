// A table whose rows are kept from snapshot to snapshot, sorted by whatever column its reader chose.

import { NONE } from "./words.js";

export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function element(parent, name, className = "", text = "") {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text) node.textContent = text;
  parent?.append(node);
  return node;
}

// columns: {title, class, sort(row) -> number or string, rising, head, make(cell, row, known) -> update(row) or null}.
// `sort` makes the heading a button, `rising` begins with the least, `head` makes the cells name their rows; `known` is what
// the table keeps of a row. key(row) tells a row from all others.
export class Table {
  constructor(node, { label, columns, key, empty }) {
    this.columns = columns;
    this.key = key;
    this.rows = new Map(); // key -> {tr, updates, row}
    this.order = null; // {column, falling}
    node.setAttribute("aria-labelledby", label);
    const head = element(element(node, "thead"), "tr");
    this.heads = columns.map((column) => this.#head(head, column));
    this.body = element(node, "tbody");
    this.empty = element(node.parentNode, "p", "empty soft", empty);
    this.last = [];
  }

  #head(head, column) {
    const cell = element(head, "th", column.class);
    cell.scope = "col";
    if (!column.sort) {
      cell.textContent = column.title;
      return cell;
    }
    const button = element(cell, "button", "", column.title);
    button.type = "button";
    button.addEventListener("click", () => {
      const first = this.order?.column !== column;
      if (first) this.order = { column, falling: !column.rising };
      else if (this.order.falling === !column.rising) this.order.falling = !this.order.falling;
      else this.order = null; // the third time: as the gateway tells them
      for (const each of this.heads) each.removeAttribute("aria-sort");
      if (this.order) cell.ariaSort = this.order.falling ? "descending" : "ascending";
      this.show(this.last);
    });
    return cell;
  }

  show(rows) {
    this.last = rows;
    const wanted = this.order ? this.#sorted(rows) : rows;
    const keys = new Set(wanted.map(this.key));
    for (const [key, known] of this.rows) {
      if (!keys.has(key)) {
        this.removed?.(known);
        known.tr.remove();
        this.rows.delete(key);
      }
    }
    const focused = this.body.contains(document.activeElement) ? document.activeElement : null;
    let place = this.body.firstElementChild;
    for (const row of wanted) {
      const known = this.#row(row);
      for (const node of known.detail ? [known.tr, known.detail] : [known.tr]) {
        if (node === place) place = place.nextElementSibling;
        else this.body.insertBefore(node, place);
      }
    }
    if (focused && focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
    this.empty.hidden = wanted.length > 0;
    this.body.parentNode.hidden = wanted.length === 0;
  }

  #row(row) {
    const key = this.key(row);
    let known = this.rows.get(key);
    if (known === undefined) {
      const tr = document.createElement("tr");
      known = { tr, detail: null, row };
      known.updates = this.columns.map((column) => {
        const cell = element(tr, column.head ? "th" : "td", column.class);
        if (column.head) cell.scope = "row";
        return column.make(cell, row, known);
      });
      this.rows.set(key, known);
    }
    known.row = row;
    for (const update of known.updates) update?.(row);
    return known;
  }

  #sorted(rows) {
    const { column, falling } = this.order;
    const sign = falling ? -1 : 1;
    return [...rows].sort((one, other) => {
      const [left, right] = [column.sort(one) ?? -Infinity, column.sort(other) ?? -Infinity];
      return left === right ? 0 : sign * (left < right ? -1 : 1);
    });
  }
}

// The commonest column: one line of text.
const plain = (title, say, sort, more) => ({
  title,
  sort,
  make: (cell) => (row) => {
    const text = say(row);
    write(cell, text);
    cell.classList.toggle("none", text === NONE);
  },
  ...more,
});

// Columns of words, of the names of the rows, and of figures; `of(row)` is what they are sorted by.
export const text = (title, of, kind = "", more) => plain(title, of, of, { class: `text ${kind}`, rising: true, ...more });
export const name = (title, of) => text(title, of, "name", { head: true });
export const figure = (title, of, say, kind = "") => plain(title, (row) => say(of(row)), of, { class: `number ${kind}` });
