// What is known of the mesh: nodes, workloads, and the links between them, merged from all daemons.

/** How connections are carried, with the words that the page uses. */
export const KINDS = {
  mtls: { name: "mutual TLS", about: "Encrypted, both identities verified" },
  local: { name: "same node", about: "Between pods of a node, through its kernel: identities verified, no TLS needed" },
  plaintext: { name: "plaintext", about: "Not encrypted, the caller has no identity" },
  refused: { name: "refused", about: "Not established" },
};

const KIND_OF_PATH = { tunnel: "mtls", hbone: "mtls", plaintext: "plaintext", "same-node": "local", self: "local" };
/** Connections that are kept for each link. */
const KEPT = 30;
/** The most links: the daemons' own limits times a few nodes. */
const MAX_LINKS = 20000;
/** Rates are of the last so many milliseconds. */
const WINDOW = 10000;
/** A link is quiet after so many milliseconds without a connection. */
const QUIET = 300000;
/** Namespace of what is in none. */
export const OUTSIDE = "";

export class Mesh {
  /** By name: { at, reason, known, next, since, started, status }. The reason is empty while the node answers. */
  nodes = new Map();
  /** Nodes that have no daemon to ask: { node, reason }. */
  missing = [];
  /** By key: { key, namespace, name, kind, identities, pods, podCount, nodes, services }. */
  workloads = new Map();
  /** By key: see `#link`. */
  links = new Map();
  /** The latest time of a daemon. */
  time = "";
  /** Whether an answer says which workloads there are. */
  isKnown = false;
  leftOut = 0;
  /** Why the page's server cannot be reached. */
  trouble = "";

  takeNodes({ nodes, missing }) {
    this.trouble = "";
    this.missing = missing;
    const names = new Set(nodes.map((node) => node.name));
    for (const name of this.nodes.keys()) {
      if (!names.has(name)) this.nodes.delete(name);
    }
    for (const { name, at } of nodes) {
      if (!this.nodes.has(name)) this.nodes.set(name, { at, reason: "", known: false, next: 0, since: "0" });
    }
  }

  lost(reason) {
    this.trouble = reason;
  }

  fail(name, reason) {
    const node = this.nodes.get(name);
    if (node) node.reason = reason || "it does not answer";
  }

  takeStatus(name, status) {
    const node = this.nodes.get(name);
    if (node) node.status = status;
  }

  cursor(name) {
    return this.nodes.get(name) ?? { next: 0, since: "0" };
  }

  takeInventory({ workloads, left_out }) {
    this.isKnown = true;
    this.leftOut = left_out;
    const now = new Set();
    for (const workload of workloads) {
      const key = `${workload.namespace}/${workload.name}`;
      now.add(key);
      this.workloads.set(key, { ...workload, key, kind: "workload", podCount: workload.pod_count });
    }
    const linked = new Set([...this.links.values()].flatMap((link) => [link.from, link.to]));
    for (const [key, workload] of this.workloads) {
      if (now.has(key)) continue;
      if (linked.has(key)) workload.podCount = 0;
      else this.workloads.delete(key);
    }
  }

  /** Takes what a node has seen since its cursor. */
  takeLive(name, { time, flows, pairs }) {
    const node = this.nodes.get(name);
    if (!node) return;
    if (time > this.time) this.time = time;
    if (node.started !== undefined && node.started !== flows.started) this.#forget(name, node);
    const isFirst = !node.known;
    const now = Date.now();
    for (const pair of pairs.pairs) {
      const kind = pair.verdict === "denied" ? "refused" : (KIND_OF_PATH[pair.path] ?? "mtls");
      const link = this.#link(this.#party(pair.client), this.#party(pair.server), pair.port, kind);
      if (!link) continue;
      link.parts.set(JSON.stringify([name, pair.direction, pair.client, pair.server, pair.path]), pair);
      if (pair.last >= link.last) {
        link.last = pair.last;
        link.policy = pair.policy ?? link.policy;
        link.reasons[pair.direction] = pair.reason || link.reasons[pair.direction];
        // The server's side says more about what it decided.
        link.reason = link.reasons.inbound || link.reasons.outbound;
        link.service = pair.service ?? link.service;
      }
      link.clientIdentity = pair.client.identity ?? link.clientIdentity;
      link.serverIdentity = pair.server.identity ?? link.serverIdentity;
      if (pair.last > node.since) node.since = pair.last;
      total(link);
      if (isFirst || link.samples.length === 0) link.samples = [{ at: now, total: isFirst ? link.connections : 0 }];
      link.samples.push({ at: now, total: link.connections });
    }
    for (const flow of flows.flows) {
      const kind = flow.verdict === "denied" ? "refused" : (KIND_OF_PATH[flow.path] ?? "mtls");
      const at = flow.endpoint ?? flow.destination;
      const client = this.#party(ofFlow(flow.client_workload, flow.client_identity, flow.client));
      const server = this.#party(ofFlow(flow.server_workload, flow.server_identity, at));
      const link = this.#link(client, server, at ? Number(at.slice(at.lastIndexOf(":") + 1)) : 0, kind);
      if (!link) continue;
      link.flows.push(flow);
      if (link.flows.length > KEPT) link.flows.shift();
    }
    Object.assign(node, { known: true, reason: "", next: flows.next, started: flows.started });
  }

  /** Certificates of an identity, as [node, certificate]. */
  certificates(identity) {
    const all = [];
    for (const [name, { status }] of this.nodes) {
      for (const one of status?.certificates ?? []) if (one.identity === identity) all.push([status.node ?? name, one]);
    }
    return all;
  }

  /** The status of a pod on its node, `namespace/name`. */
  podStatus(pod) {
    for (const { status } of this.nodes.values()) {
      const found = status?.pods.find((one) => one.pod === pod);
      if (found) return found;
    }
    return undefined;
  }

  /** A daemon that has restarted counts from zero. */
  #forget(name, node) {
    Object.assign(node, { known: false, next: 0, since: "0" });
    for (const link of this.links.values()) {
      for (const key of link.parts.keys()) if (JSON.parse(key)[0] === name) link.parts.delete(key);
    }
  }

  /** Returns the workload of a party, which may be new. */
  #party({ namespace, workload, identity, address }) {
    let known;
    if (namespace && workload) known = { namespace, name: workload, kind: "workload" };
    else if (identity) known = account(identity);
    else known = { namespace: OUTSIDE, name: address ?? "unknown", kind: "address" };
    const key = known.kind === "workload" ? `${namespace}/${workload}` : `${known.kind}:${known.namespace}/${known.name}`;
    let found = this.workloads.get(key);
    if (!found) {
      found = { ...known, key, identities: [], pods: [], podCount: 0, nodes: [], services: [] };
      this.workloads.set(key, found);
    }
    if (identity && !found.identities.includes(identity)) found.identities.push(identity);
    return key;
  }

  /** Returns the link of a kind between two workloads at a port. Null if there are too many links. */
  #link(from, to, port, kind) {
    const key = JSON.stringify([from, to, port, kind]);
    let link = this.links.get(key);
    if (!link) {
      if (this.links.size >= MAX_LINKS) return null;
      link = {
        ...{ key, from, to, port, kind, last: "", policy: null, reason: "", reasons: { inbound: "", outbound: "" }, service: null },
        ...{ clientIdentity: null, serverIdentity: null, parts: new Map() },
        ...{ samples: [], flows: [], connections: 0, bytesUp: 0, bytesDown: 0, wouldBeDenied: 0, open: 0 },
      };
      this.links.set(key, link);
    }
    return link;
  }
}

/** Whether a link had no connection in the last minutes, by the daemons' own clocks. */
export function isQuiet(mesh, link) {
  return link.open === 0 && Date.parse(mesh.time) - Date.parse(link.last || mesh.time) > QUIET;
}

/** Connections per second of a link, of late. */
export function rateOf(link, now) {
  const samples = link.samples;
  while (samples.length > 1 && samples[1].at < now - WINDOW) samples.shift();
  if (samples.length === 0) return 0;
  const seconds = Math.max(1, (now - Math.max(samples[0].at, now - WINDOW)) / 1000);
  return Math.max(0, samples.at(-1).total - samples[0].total) / seconds;
}

/** A connection between two nodes is counted on both, so the larger count is the number of connections. */
function total(link) {
  const sums = { outbound: [0, 0, 0, 0, 0], inbound: [0, 0, 0, 0, 0] };
  for (const part of link.parts.values()) {
    const sum = sums[part.direction];
    sum[0] += part.connections;
    sum[1] += part.bytes_to_server;
    sum[2] += part.bytes_to_client;
    sum[3] += part.would_be_denied;
    sum[4] += part.open;
  }
  const most = sums.outbound.map((sum, index) => Math.max(sum, sums.inbound[index]));
  [link.connections, link.bytesUp, link.bytesDown, link.wouldBeDenied, link.open] = most;
}

/** A service account, when no pod is known. */
function account(identity) {
  const path = identity.split("/ns/")[1]?.split("/sa/") ?? [OUTSIDE, identity];
  return { namespace: path[0], name: path[1] ?? identity, kind: "account" };
}

function ofFlow(workload, identity, at) {
  const slash = workload ? workload.indexOf("/") : -1;
  return {
    namespace: slash > 0 ? workload.slice(0, slash) : null,
    workload: slash > 0 ? workload.slice(slash + 1) : null,
    identity,
    address: at ? at.slice(0, at.lastIndexOf(":")).replace(/^\[|\]$/g, "") : null,
  };
}
