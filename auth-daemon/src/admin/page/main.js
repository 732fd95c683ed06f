// Connects the parts: what the user chose, what the daemons say, and what is shown.

import { Details } from "./details.js";
import { h, say } from "./dom.js";
import { count, rate, some } from "./format.js";
import { group, select } from "./graph.js";
import { MeshMap } from "./map.js";
import { KINDS, Mesh, rateOf } from "./mesh.js";
import { notices } from "./notices.js";
import { follow } from "./source.js";
import { LinkTable } from "./table.js";

const place = (id) => document.getElementById(id);

const mesh = new Mesh();
const filter = { search: "", namespace: null, kinds: new Set(Object.keys(KINDS)) };
/** Namespaces that the user has opened or closed. */
const isOpen = new Map();
let chosen = null;
let isTable = false;

const details = new Details(place("details"), mesh, () => {
  chosen = null;
  show();
});
const map = new MeshMap(place("map"), {
  workload: (key) => {
    details.workload(key);
    chosen = key;
    show();
  },
  links: (links) => {
    chosen = null;
    details.links(links);
  },
  toggle: (box) => {
    isOpen.set(box.id, !box.isOpen);
    show();
  },
});
const table = new LinkTable(place("table"), (link) => details.link(link));

const legend = new Map();
for (const [kind, { name, about }] of Object.entries(KINDS)) {
  const total = h("span", { class: "quiet" });
  const toggle = () => {
    if (!filter.kinds.delete(kind)) filter.kinds.add(kind);
    button.setAttribute("aria-pressed", String(filter.kinds.has(kind)));
    show();
  };
  const button = h("button", { type: "button", class: kind, title: about, "aria-pressed": "true", click: toggle }, h("span", { class: "swatch" }), name, " ", total);
  legend.set(kind, total);
  place("legend").append(button);
}
place("search").addEventListener("input", (event) => {
  filter.search = event.target.value;
  show();
});
place("namespace").addEventListener("change", (event) => {
  filter.namespace = event.target.selectedIndex === 0 ? null : event.target.value;
  show();
});
for (const [id, value] of [["show-map", false], ["show-table", true]]) {
  place(id).addEventListener("click", () => {
    isTable = value;
    show();
  });
}
new ResizeObserver(() => show()).observe(document.querySelector("main"));

/** Draws at most once a frame, however many daemons answer. */
let isDue = false;
function changed() {
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    show();
  });
}

function show() {
  const selection = select(mesh, filter);
  const hasContent = notices(mesh, selection, place("notices"), place("empty"));
  place("map").hidden = isTable || !hasContent;
  place("table").hidden = !isTable || !hasContent;
  place("show-map").setAttribute("aria-pressed", String(!isTable));
  place("show-table").setAttribute("aria-pressed", String(isTable));
  if (isTable) table.show(mesh, selection.links);
  else map.show(group(mesh, selection, isOpen), chosen);
  namespaces();
  numbers();
  details.refresh();
}

function namespaces() {
  const names = [...new Set([...mesh.workloads.values()].map((workload) => workload.namespace))].sort();
  const list = place("namespace");
  const key = JSON.stringify(names);
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  const options = names.map((name) => h("option", { value: name, selected: name === filter.namespace }, name || "outside the mesh"));
  list.replaceChildren(h("option", { value: "" }, "all"), ...options);
}

function numbers() {
  const now = Date.now();
  const sums = new Map(Object.keys(KINDS).map((kind) => [kind, { rate: 0, total: 0 }]));
  for (const link of mesh.links.values()) {
    const sum = sums.get(link.kind);
    sum.rate += rateOf(link, now);
    sum.total += link.connections + link.open;
  }
  for (const [kind, total] of legend) {
    const { rate: perSecond, total: all } = sums.get(kind);
    say(total, [count(all), rate(perSecond)].filter(Boolean).join(" · "));
  }
  const answering = [...mesh.nodes.values()].filter((node) => node.known && node.reason === "").length;
  const nodes = `${count(answering)} of ${some(mesh.nodes.size + mesh.missing.length, "node")}`;
  const workloads = [...mesh.workloads.values()].filter((workload) => workload.kind === "workload");
  say(place("summary"), mesh.nodes.size ? `${nodes} · ${some(workloads.length, "workload")}` : "asking the daemons …");
}

follow(mesh, changed);
