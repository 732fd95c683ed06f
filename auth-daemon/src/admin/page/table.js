// The same connections as a table: what the map shows, for the keyboard and for screen readers.

import { h } from "./dom.js";
import { bytes, clock, count, rate } from "./format.js";
import { KINDS, rateOf } from "./mesh.js";

/** Rows that are shown. Search finds the others. */
const MAX_ROWS = 500;

const COLUMNS = [
  { name: "From", value: (link) => link.from },
  { name: "To", value: (link) => link.to },
  { name: "Port", value: (link) => link.port, isNumber: true },
  { name: "How", value: (link) => link.kind },
  { name: "Rate", value: (link) => rateOf(link, Date.now()), text: (link) => rate(rateOf(link, Date.now())), isNumber: true },
  { name: "Open", value: (link) => link.open, text: (link) => (link.open ? count(link.open) : ""), isNumber: true },
  { name: "Ended", value: (link) => link.connections, text: (link) => count(link.connections), isNumber: true },
  { name: "Bytes", value: (link) => link.bytesUp + link.bytesDown, text: (link) => bytes(link.bytesUp + link.bytesDown), isNumber: true },
  { name: "Last", value: (link) => link.last, text: (link) => clock(link.last) },
  { name: "Policy or reason", value: why },
];

export class LinkTable {
  #place;
  #choose;
  #sort = { column: COLUMNS[8], isDown: true };
  #body = h("tbody");
  #rows = new Map();
  #heads = [];
  #more = h("p", { class: "quiet" });

  /** Shows rows in `place`, and calls `choose(link)`. */
  constructor(place, choose) {
    this.#place = place;
    this.#choose = choose;
    const heads = COLUMNS.map((column) => {
      const head = h("th", { scope: "col" }, h("button", { type: "button", click: () => this.#sortBy(column) }, column.name));
      this.#heads.push(head);
      return head;
    });
    const caption = h("caption", {}, "Connections between workloads since the daemons started");
    place.append(h("table", {}, caption, h("thead", {}, h("tr", {}, heads)), this.#body), this.#more);
  }

  show(mesh, links) {
    this.links = links;
    this.mesh = mesh;
    const { column, isDown } = this.#sort;
    const sorted = links
      .map((link) => [column.value(link), link])
      .sort(([a, x], [b, y]) => (isDown ? -1 : 1) * (a < b ? -1 : a > b ? 1 : 0) || (x.key < y.key ? -1 : 1))
      .slice(0, MAX_ROWS)
      .map(([, link]) => link);
    const rows = sorted.map((link) => this.#row(link));
    // Rows that stay in place keep the focus.
    rows.forEach((row, index) => {
      if (this.#body.children[index] !== row) this.#body.insertBefore(row, this.#body.children[index] ?? null);
    });
    while (this.#body.children.length > rows.length) this.#body.lastChild.remove();
    const hidden = links.length - rows.length;
    this.#more.textContent = hidden > 0 ? `${count(hidden)} more: search, or choose a namespace.` : "";
    COLUMNS.forEach((one, index) => {
      const order = one !== column ? "none" : isDown ? "descending" : "ascending";
      this.#heads[index].setAttribute("aria-sort", order);
    });
  }

  #sortBy(column) {
    const isSame = this.#sort.column === column;
    this.#sort = { column, isDown: isSame ? !this.#sort.isDown : Boolean(column.isNumber) };
    this.show(this.mesh, this.links);
  }

  #row(link) {
    let row = this.#rows.get(link.key);
    if (!row) {
      row = h("tr", { class: link.kind }, COLUMNS.map((column) => h("td", { class: column.isNumber ? "number" : "" })));
      const name = this.mesh.workloads.get(link.from);
      const open = h("button", { type: "button", class: "link", click: () => this.#choose(link) }, shown(name));
      row.children[0].append(open);
      row.children[1].textContent = shown(this.mesh.workloads.get(link.to));
      row.children[3].append(kindOf(link.kind));
      this.#rows.set(link.key, row);
    }
    COLUMNS.forEach((column, index) => {
      if (index === 0 || index === 1 || index === 3) return;
      const text = String(column.text ? column.text(link) : column.value(link));
      if (row.children[index].textContent !== text) row.children[index].textContent = text;
    });
    return row;
  }
}

/** Which policy decided, or why connections were refused or reset. */
function why(link) {
  return [link.reason, link.policy].filter(Boolean).join("; ");
}

/** A kind of connection, as a word with its colour. */
export function kindOf(kind) {
  return h("span", { class: `kind ${kind}` }, KINDS[kind].name);
}

/** The name of a workload, with its namespace. */
export function shown(workload) {
  return workload.namespace ? `${workload.namespace}/${workload.name}` : workload.name;
}
