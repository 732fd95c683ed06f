// What the map and the table show: the mesh, filtered and grouped by namespace.

import { OUTSIDE, isQuiet, rateOf } from "./mesh.js";

/** With more workloads than this, namespaces are closed until they are opened. */
const OPEN_UP_TO = 60;

/** Returns the links and workloads that the filter selects. */
export function select(mesh, filter) {
  const words = filter.search.trim().toLowerCase();
  const hit = (key) => {
    const workload = mesh.workloads.get(key);
    const isHere = filter.namespace === null || workload.namespace === filter.namespace;
    if (!isHere || words === "") return isHere;
    const texts = [key, ...workload.services, ...workload.identities];
    return texts.some((text) => text.toLowerCase().includes(words));
  };
  const hits = new Set([...mesh.workloads.keys()].filter(hit));
  const links = [...mesh.links.values()].filter(
    (link) => filter.kinds.has(link.kind) && (hits.has(link.from) || hits.has(link.to)),
  );
  const workloads = new Set(hits);
  for (const link of links) workloads.add(link.from).add(link.to);
  return { links, workloads, hits };
}

/**
 * Groups a selection by namespace. Returns boxes { id, title, isOpen, chips, idle } and edges { id, from, to, kind, links,
 * rate, open, total, isQuiet }, whose ends are ids of chips, or of closed boxes. A namespace is open if `isOpen` has it as true, or if there
 * is little to show.
 */
export function group(mesh, selection, isOpen) {
  const linked = new Set(selection.links.flatMap((link) => [link.from, link.to]));
  const isSmall = selection.workloads.size <= OPEN_UP_TO;
  const boxes = new Map();
  const ends = new Map();
  for (const key of [...selection.workloads].sort()) {
    const workload = mesh.workloads.get(key);
    const id = `ns:${workload.namespace}`;
    if (!boxes.has(id)) {
      const title = workload.namespace === OUTSIDE ? "outside the mesh" : workload.namespace;
      const open = isOpen.get(id) ?? isSmall;
      boxes.set(id, { id, title, isOpen: open, chips: [], idle: 0, size: 0 });
    }
    const box = boxes.get(id);
    box.size += 1;
    ends.set(key, box.isOpen ? key : id);
    if (!box.isOpen) continue;
    // Workloads without connections would hide the others where there are many.
    if (linked.has(key) || isSmall) box.chips.push({ id: key, workload, isHit: selection.hits.has(key) });
    else box.idle += 1;
  }
  const edges = new Map();
  const now = Date.now();
  for (const link of selection.links) {
    const [from, to] = [ends.get(link.from), ends.get(link.to)];
    const id = JSON.stringify([from, to, link.kind]);
    if (!edges.has(id)) {
      edges.set(id, { id, from, to, kind: link.kind, links: [], rate: 0, open: 0, total: 0, isQuiet: true });
    }
    const edge = edges.get(id);
    edge.links.push(link);
    edge.rate += rateOf(link, now);
    edge.open += link.open;
    edge.total += link.connections;
    edge.isQuiet &&= isQuiet(mesh, link);
  }
  return { boxes: [...boxes.values()], edges: [...edges.values()] };
}
