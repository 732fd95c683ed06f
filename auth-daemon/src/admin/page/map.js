// Draws the map: a box for each namespace, a chip for each workload, a line for each kind of connection between two.

import { s } from "./dom.js";
import { count, rate, some } from "./format.js";
import { CHIP, SCALE, ends, layout } from "./layout.js";
import { KINDS } from "./mesh.js";

/** With more lines than this, they have no signs: the colour and the dashes remain. */
const SIGNS_UP_TO = 90;
const LIMIT = { name: 20, about: 27 };

export class MeshMap {
  #place;
  #act;
  #shape = "";
  #drawn = { edges: new Map() };
  #chosen = null;
  #current = null;

  /** Draws in `place`. Calls `act.workload(key)`, `act.links(links)` and `act.toggle(box)` when something is chosen. */
  constructor(place, act) {
    this.#place = place;
    this.#act = act;
    place.addEventListener("keydown", (event) => this.#move(event));
    place.addEventListener("focusin", (event) => this.#rove(event.target.closest("[data-id]"), false));
  }

  /** Shows boxes and edges. What has not moved is not drawn again. `chosen` is the key of a workload, or null. */
  show(graph, chosen) {
    const shape = JSON.stringify([
      graph.boxes.map((box) => [box.id, box.isOpen, box.size, box.idle, box.chips.map((chip) => [chip.id, chip.isHit, chip.workload.podCount, chip.workload.services])]),
      graph.edges.map((edge) => edge.id),
      this.#place.clientWidth,
      this.#place.parentElement.clientHeight,
    ]);
    if (shape !== this.#shape) {
      this.#shape = shape;
      this.#draw(graph);
    }
    for (const edge of graph.edges) this.#update(edge);
    this.#emphasize(graph, chosen);
  }

  #draw(graph) {
    const hadFocus = this.#place.contains(document.activeElement);
    const main = this.#place.parentElement;
    const room = { width: this.#place.clientWidth, height: main.clientHeight - 40 };
    const places = layout(graph, room);
    const scale = Math.max(SCALE, Math.min(1, (room.width - 4) / Math.max(1, places.width)));
    const root = s("svg", {
      width: places.width * scale,
      height: places.height * scale,
      viewBox: `0 0 ${places.width} ${places.height}`,
      role: "group",
      "aria-label": "Map. Move with the arrow keys, open with Enter. The table has the same connections.",
    });
    const lines = s("g");
    const signs = s("g");
    const boxes = s("g");
    const chips = s("g");
    for (const box of graph.boxes) boxes.append(this.#box(box, places.at.get(box.id)));
    for (const box of graph.boxes) {
      for (const chip of box.chips) chips.append(this.#chip(chip, places.at.get(chip.id)));
    }
    this.#drawn.edges.clear();
    const hasSigns = graph.edges.length <= SIGNS_UP_TO;
    const between = ends(graph.edges, places.at);
    const taken = graph.boxes.flatMap((box) => box.chips.map((chip) => places.at.get(chip.id)));
    for (const edge of graph.edges) this.#edge(edge, curve(between.get(edge.id)), hasSigns ? taken : null, lines, signs);
    root.append(boxes, lines, chips, signs);
    this.#place.replaceChildren(root);
    this.#rove(this.#find(this.#current) ?? root.querySelector("[data-id]"), hadFocus);
  }

  #box(box, at) {
    const label = `${box.title}: ${some(box.size, "workload")}`;
    const act = () => this.#act.toggle(box);
    const title = s(
      "g",
      { class: "title", role: "button", tabindex: -1, "data-id": box.id, "aria-expanded": String(box.isOpen), "aria-label": `Namespace ${label}`, click: act },
      s("title", {}, `${box.isOpen ? "Close" : "Open"} ${box.title}`),
      s("rect", { x: at.x, y: at.y, width: at.width, height: box.isOpen ? 26 : at.height, rx: 8 }),
      s("text", { x: at.x + 12, y: at.y + 18, class: "name" }, `${box.isOpen ? "▾" : "▸"} ${shorten(box.title, LIMIT.name)}`),
      box.isOpen ? null : s("text", { x: at.x + 12, y: at.y + 40, class: "quiet" }, some(box.size, "workload")),
    );
    const idle = box.isOpen && box.idle > 0;
    const foot = idle ? s("text", { x: at.x + 12, y: at.y + at.height - 9, class: "quiet" }, `${count(box.idle)} without connections`) : null;
    return s("g", { class: "box" }, s("rect", { ...at, rx: 8, class: "back" }), title, foot);
  }

  #chip({ id, workload, isHit }, at) {
    const services = workload.services.join(", ");
    return s(
      "g",
      { class: `chip ${workload.kind}${isHit ? "" : " beside"}`, role: "button", tabindex: -1, "data-id": id, "aria-label": `${workload.namespace} ${workload.name}${services ? `, Service ${services}` : ""}`, click: () => this.#act.workload(id) },
      s("title", {}, `${workload.name}\n${about(workload)}`),
      s("rect", { x: at.x, y: at.y, width: CHIP.width, height: CHIP.height, rx: 6 }),
      s("text", { x: at.x + 10, y: at.y + 16, class: "name" }, shorten(workload.name, LIMIT.name)),
      s("text", { x: at.x + 10, y: at.y + 30, class: "quiet" }, shorten(about(workload), LIMIT.about)),
    );
  }

  /** Draws an edge, with a sign if `taken` has the places where there is no room for it. */
  #edge(edge, { path, point }, taken, lines, signs) {
    const act = () => this.#act.links(edge.links);
    const line = s("path", { d: path, class: `line ${edge.kind}` });
    const reach = s("path", { d: path, class: "reach", click: act }, s("title", {}, KINDS[edge.kind].name));
    lines.append(s("g", { class: "edge" }, line, reach));
    const drawn = { line, reach, label: null, sign: null };
    if (taken) {
      const middle = free(point, taken);
      taken.push({ x: middle.x - 8, y: middle.y - 18, width: 16, height: 26 });
      drawn.label = s("text", { x: middle.x, y: middle.y - 11, class: "rate" });
      drawn.sign = s("g", { class: `sign ${edge.kind}`, click: act }, s("circle", { cx: middle.x, cy: middle.y, r: 8 }), sign(edge.kind, middle), drawn.label);
      signs.append(drawn.sign);
    }
    this.#drawn.edges.set(edge.id, drawn);
  }

  #update(edge) {
    const drawn = this.#drawn.edges.get(edge.id);
    drawn.links = edge.links;
    // One connection a second is 1.5 wide, a thousand are 4.
    drawn.line.setAttribute("stroke-width", (1.3 + Math.log10(1 + edge.rate + edge.open)).toFixed(1));
    const busy = rate(edge.rate) || (edge.open > 0 ? `${count(edge.open)} open` : "");
    if (drawn.label && drawn.label.textContent !== busy) drawn.label.textContent = busy;
    const words = `${KINDS[edge.kind].name}: ${some(edge.total, "connection")}${busy && `, ${busy}`}`;
    const title = drawn.reach.firstChild;
    if (title.textContent !== words) title.textContent = words;
  }

  /** Dims what has nothing to do with the chosen workload, and lines on which nothing happens. */
  #emphasize(graph, chosen) {
    this.#chosen = chosen;
    const hasChosen = chosen !== null && this.#find(chosen) !== undefined;
    for (const edge of graph.edges) {
      const drawn = this.#drawn.edges.get(edge.id);
      const isBeside = hasChosen && edge.from !== chosen && edge.to !== chosen;
      for (const part of [drawn.line, drawn.sign]) {
        part?.classList.toggle("dim", isBeside);
        part?.classList.toggle("stale", edge.isQuiet);
      }
    }
    for (const chip of this.#place.querySelectorAll(".chip")) chip.classList.toggle("chosen", chip.dataset.id === chosen);
  }

  #find(id) {
    return [...this.#place.querySelectorAll("[data-id]")].find((one) => one.dataset.id === id);
  }

  /** Makes one element the one that the Tab key reaches. */
  #rove(element, takesFocus) {
    if (!element) return;
    this.#find(this.#current)?.setAttribute("tabindex", -1);
    this.#current = element.dataset.id;
    element.setAttribute("tabindex", 0);
    if (takesFocus) element.focus({ preventScroll: false });
  }

  #move(event) {
    const here = event.target.closest("[data-id]");
    if (!here) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      here.dispatchEvent(new MouseEvent("click", { bubbles: true }));
      return;
    }
    const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!direction) return;
    event.preventDefault();
    const from = center(here);
    const distance = (element) => {
      const to = center(element);
      const along = (to.x - from.x) * direction[0] + (to.y - from.y) * direction[1];
      const across = Math.abs((to.x - from.x) * direction[1]) + Math.abs((to.y - from.y) * direction[0]);
      return along > 1 ? along + 2 * across : Infinity;
    };
    // The title of an open box is above its chips, not beside them.
    const beside = direction[0] === 0 ? "[data-id]" : "[data-id]:not([aria-expanded=true])";
    const others = [...this.#place.querySelectorAll(beside)].filter((one) => distance(one) < Infinity);
    others.sort((a, b) => distance(a) - distance(b));
    this.#rove(others[0], true);
  }
}

/** What a workload is, in a few words. */
export function about(workload) {
  if (workload.kind === "address") return "address without identity";
  if (workload.kind === "account") return "service account";
  const pods = some(workload.podCount, "pod");
  if (workload.services.length === 0) return pods;
  const isSame = workload.services.length === 1 && workload.services[0] === workload.name;
  return isSame ? `${pods} · Service` : `${pods} · Service ${workload.services.join(", ")}`;
}

function shorten(text, limit) {
  const letters = [...text];
  return letters.length > limit ? `${letters.slice(0, limit - 1).join("")}…` : text;
}

function center(element) {
  const at = element.getBoundingClientRect();
  return { x: at.x + at.width / 2, y: at.y + at.height / 2 };
}

/** A curve between two points. One that does not lead ahead leaves and arrives on the right. */
function curve({ start, end, isAhead }) {
  const bend = isAhead ? Math.max(30, (end.x - start.x) / 2) : 46;
  const one = { x: start.x + bend, y: start.y };
  const two = { x: end.x - bend, y: end.y };
  if (!isAhead) one.x = two.x = Math.max(start.x, end.x) + bend;
  const point = (t) => {
    const at = (axis) => (1 - t) ** 3 * start[axis] + 3 * (1 - t) ** 2 * t * one[axis] + 3 * (1 - t) * t ** 2 * two[axis] + t ** 3 * end[axis];
    return { x: at("x"), y: at("y") };
  };
  return { path: `M${start.x} ${start.y}C${one.x} ${one.y} ${two.x} ${two.y} ${end.x} ${end.y}`, point };
}

/** The point of a curve, near its middle, where a sign covers nothing. The middle, if there is none. */
function free(point, taken) {
  const isFree = ({ x, y }) => taken.every((one) => x + 9 < one.x || x - 9 > one.x + one.width || y + 9 < one.y || y - 19 > one.y + one.height);
  const tried = [0.5, 0.42, 0.58, 0.34, 0.66, 0.26, 0.74, 0.18, 0.82].map(point);
  return tried.find(isFree) ?? tried[0];
}

/** A closed lock, arrows both ways, an open lock, a cross. */
function sign(kind, { x, y }) {
  const lock = `M${x - 3} ${y - 0.5}h6v4h-6z`;
  const paths = {
    mtls: `${lock}M${x - 2} ${y - 0.5}v-1.5a2 2 0 0 1 4 0v1.5`,
    local: `M${x - 3.5} ${y}h7M${x - 1.5} ${y - 2.5}l-2.5 2.5l2.5 2.5M${x + 1.5} ${y - 2.5}l2.5 2.5l-2.5 2.5`,
    plaintext: `${lock}M${x - 2} ${y - 0.5}v-2a2 2 0 0 1 3.6 -1`,
    refused: `M${x - 3} ${y - 3}l6 6M${x + 3} ${y - 3}l-6 6`,
  };
  return s("path", { d: paths[kind], class: "glyph" });
}
