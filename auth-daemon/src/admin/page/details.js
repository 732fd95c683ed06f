// The panel beside the map: one workload, or the connections between two.

import { h, say } from "./dom.js";
import { bytes, clock, count, minute, rate, some } from "./format.js";
import { about } from "./map.js";
import { KINDS, rateOf } from "./mesh.js";
import { any } from "./source.js";
import { kindOf, shown } from "./table.js";

/** Links that are listed. */
const MAX_LINKS = 60;

export class Details {
  #place;
  #mesh;
  #closed;
  /** Refreshes what changes while the panel is open. */
  #refresh = () => {};
  /** Returns the focus to where it was before the panel opened. */
  #back = null;

  /** Shows in `place`. Calls `closed` when the user closes it. */
  constructor(place, mesh, closed) {
    this.#place = place;
    this.#mesh = mesh;
    this.#closed = closed;
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !place.hidden) this.close();
    });
  }

  refresh() {
    if (!this.#place.hidden) this.#refresh();
  }

  close() {
    this.#place.hidden = true;
    this.#refresh = () => {};
    this.#closed();
    this.#back?.();
    this.#back = null;
  }

  workload(key) {
    const mesh = this.#mesh;
    const workload = mesh.workloads.get(key);
    const policies = h("div", {}, h("p", { class: "quiet" }, "asking …"));
    const [incoming, outgoing, certificates] = [h("ul"), h("ul"), h("ul", { class: "plain" })];
    this.#open(
      shown(workload),
      h("p", { class: "quiet" }, workload.pods.length ? `${some(workload.podCount, "pod")} on ${workload.nodes.join(", ")}` : about(workload)),
      section("Identity and certificates", ...workload.identities.map((one) => h("p", { class: "code" }, one)), certificates),
      workload.services.length ? section("Services", h("p", {}, workload.services.join(", "))) : null,
      workload.pods.length ? section("Pods", this.#pods(workload)) : null,
      section("Is called by", incoming),
      section("Calls", outgoing),
      workload.pods.length ? section("Policies", policies) : null,
    );
    this.#refresh = () => {
      const links = [...mesh.links.values()];
      this.#links(incoming, links.filter((link) => link.to === key), (link) => link.from);
      this.#links(outgoing, links.filter((link) => link.from === key), (link) => link.to);
      this.#certificates(certificates, workload.identities);
    };
    this.#refresh();
    if (workload.pods.length) this.#policies(policies, workload);
  }

  /** Shows the connections of an edge of the map: those of one link, or a list of links. */
  links(links) {
    if (links.length === 1) {
      this.link(links[0]);
      return;
    }
    const list = h("ul");
    this.#open(`${links.length} pairs`, h("p", {}, kindOf(links[0].kind), ` – ${KINDS[links[0].kind].about}`), list);
    this.#refresh = () => this.#links(list, links, (link) => link.from, (link) => link.to);
    this.#refresh();
  }

  link(link) {
    const mesh = this.#mesh;
    const [from, to] = [mesh.workloads.get(link.from), mesh.workloads.get(link.to)];
    const facts = h("dl");
    const flows = h("tbody");
    const verdict = h("pre", {}, "asking …");
    const [client, server] = [h("div"), h("div")];
    this.#open(
      `${shown(from)} → ${shown(to)}:${link.port}`,
      h("p", {}, kindOf(link.kind), ` – ${KINDS[link.kind].about}`),
      facts,
      section("Client", client),
      section("Server", server),
      section("Last connections", h("table", { class: "flows" }, h("thead", {}, h("tr", {}, ["UTC", "Seen on", "Client", "Result", "Sent", "Received"].map((name) => h("th", { scope: "col" }, name)))), flows)),
      section("What the policies say now", verdict),
    );
    let last = null;
    this.#refresh = () => {
      pairs(facts, [
        ["Service", link.service],
        ["Rate", rate(rateOf(link, Date.now()))],
        ["Open", link.open ? count(link.open) : ""],
        ["Ended", `${count(link.connections)}, ${bytes(link.bytesUp)} sent, ${bytes(link.bytesDown)} received`],
        ["Decided by", link.policy],
        ["Reason", link.reason],
        ["A dry-run policy would refuse", link.wouldBeDenied ? count(link.wouldBeDenied) : ""],
      ]);
      this.#identity(client, link.clientIdentity, from);
      this.#identity(server, link.serverIdentity, to);
      if (link.flows.at(-1) === last) return;
      last = link.flows.at(-1);
      flows.replaceChildren(...link.flows.toReversed().map(flowRow));
    };
    this.#refresh();
    this.#verdict(verdict, link, from, to);
  }

  #open(title, ...parts) {
    if (this.#place.hidden) this.#back = wayBack(document.activeElement);
    this.#place.hidden = false;
    const close = h("button", { type: "button", class: "close", "aria-label": "Close details", click: () => this.close() }, "✕");
    const heading = h("h2", { tabindex: -1 }, title);
    this.#place.replaceChildren(h("div", { class: "head" }, heading, close), ...parts.filter(Boolean));
    this.#place.scrollTop = 0;
    heading.focus();
  }

  #pods(workload) {
    const items = workload.pods.map((name) => {
      const status = this.#mesh.podStatus(`${workload.namespace}/${name}`);
      let state = "";
      if (status) state = status.enrolled ? "protected" : `NOT PROTECTED: ${status.reason}`;
      if (status?.tampered) state += `; tampered: ${status.tampered}`;
      return h("li", {}, name, state ? h("span", { class: status.enrolled ? "quiet" : "bad" }, ` ${state}`) : null);
    });
    const more = workload.podCount - workload.pods.length;
    if (more > 0) items.push(h("li", { class: "quiet" }, `and ${count(more)} more`));
    return h("ul", { class: "plain" }, items);
  }

  /** Lists links, the busiest first, each with the workloads that `names` return. */
  #links(list, links, ...names) {
    const now = Date.now();
    const busiest = links.map((link) => [rateOf(link, now), link]);
    busiest.sort(([a, x], [b, y]) => b - a || y.connections - x.connections || (x.key < y.key ? -1 : 1));
    const shownLinks = busiest.slice(0, MAX_LINKS);
    const keys = shownLinks.map(([, link]) => link.key).join("\n");
    if (list.dataset.keys !== keys) {
      const hadFocus = list.contains(document.activeElement) ? document.activeElement.dataset.key : null;
      list.dataset.keys = keys;
      list.replaceChildren(...shownLinks.map(([, link]) => {
        const name = names.map((one) => shown(this.#mesh.workloads.get(one(link)))).join(" → ");
        const open = h("button", { type: "button", class: "link", "data-key": link.key, click: () => this.link(link) }, `${name}:${link.port}`);
        return h("li", {}, kindOf(link.kind), " ", open, " ", h("span", { class: "quiet" }));
      }));
      const more = links.length - shownLinks.length;
      if (more > 0) list.append(h("li", { class: "quiet" }, `and ${count(more)} more`));
      if (links.length === 0) list.append(h("li", { class: "quiet" }, "nothing yet"));
      if (hadFocus) [...list.querySelectorAll("button")].find((one) => one.dataset.key === hadFocus)?.focus();
    }
    shownLinks.forEach(([perSecond, link], index) => {
      say(list.children[index].lastChild, rate(perSecond) || (link.open ? `${count(link.open)} open` : some(link.connections, "connection")));
    });
  }

  #identity(place, identity, workload) {
    const key = JSON.stringify([identity, identity ? this.#mesh.certificates(identity) : 0]);
    if (place.dataset.key === key) return;
    place.dataset.key = key;
    if (!identity) {
      const name = workload.kind === "address" ? workload.name : shown(workload);
      place.replaceChildren(h("p", { class: "quiet" }, `${name}: no identity was proven`));
      return;
    }
    const list = h("ul", { class: "plain" });
    this.#certificates(list, [identity]);
    place.replaceChildren(h("p", { class: "code" }, identity), list);
  }

  #certificates(list, identities) {
    const all = identities.flatMap((identity) => this.#mesh.certificates(identity));
    const key = JSON.stringify(all);
    if (list.dataset.key === key) return;
    list.dataset.key = key;
    const items = all.map(([node, { serial, notBefore, notAfter }]) =>
      h("li", {}, serial ? `on ${node}: valid until ${minute(notAfter)}` : `on ${node}: not issued yet`, serial ? h("div", { class: "quiet" }, `since ${minute(notBefore)}, serial ${serial}`) : null));
    if (items.length === 0) items.push(h("li", { class: "quiet" }, "No daemon that answers holds a certificate of this identity."));
    list.replaceChildren(...items);
  }

  async #policies(place, workload) {
    const answer = await any(this.#mesh, ["policy", "pod", workload.namespace, workload.pods[0]]);
    const found = answer?.Ok;
    if (!found) {
      place.replaceChildren(h("p", {}, answer?.Err ?? "No daemon answers."));
      return;
    }
    const reach = found.reach.map((one) => h("li", {}, h("span", { class: one.allowed ? "good" : "bad" }, one.allowed ? "✓ " : "✕ "), one.service, h("div", { class: "quiet" }, one.why)));
    place.replaceChildren(
      h("p", {}, `mutual TLS: ${found.mode}`),
      h("ul", { class: "plain" }, found.policies.length ? found.policies.map((one) => h("li", {}, one)) : h("li", { class: "quiet" }, "No policy selects it.")),
      h("details", {}, h("summary", {}, `Services that it may reach: ${found.reach.filter((one) => one.allowed).length} of ${found.reach.length}`), h("ul", { class: "plain" }, reach)),
      found.left_out ? h("p", { class: "quiet" }, `${count(found.left_out)} ports of Services are not shown.`) : "",
    );
  }

  async #verdict(place, link, from, to) {
    const last = link.flows.at(-1);
    const client = last?.client_pod ?? (from.pods.length ? `${from.namespace}/${from.pods[0]}` : link.clientIdentity);
    const server = last?.server_pod ?? (to.pods.length ? `${to.namespace}/${to.pods[0]}` : null);
    if (!client || !server) {
      place.textContent = "Policies are evaluated between a caller with an identity and a pod of the mesh.";
      return;
    }
    const answer = await any(this.#mesh, ["policy", "check"], { from: client, to: `pod/${server}:${link.port}`, sourceIp: null });
    say(place, answer ? (answer.Ok?.text ?? answer.Err) : "No daemon answers.");
  }
}

/** Returns a function that moves the focus back to an element. The map may be drawn anew in the meantime. */
function wayBack(element) {
  const id = element?.dataset.id;
  if (id === undefined) return () => element?.focus();
  return () => [...document.querySelectorAll("[data-id]")].find((one) => one.dataset.id === id)?.focus();
}

function section(title, ...parts) {
  return h("section", {}, h("h3", {}, title), ...parts);
}

/** Shows facts that are not empty as a list of terms. */
function pairs(list, facts) {
  const filled = facts.filter(([, value]) => value);
  const key = JSON.stringify(filled);
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(...filled.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

function flowRow(flow) {
  const result = flow.verdict === "denied" ? "refused" : flow.result;
  const why = [flow.reason, flow.policy].filter(Boolean).join("; ");
  const end = h("td", {}, h("span", { class: result === "ok" ? "good" : "bad" }, result), why ? h("div", { class: "quiet" }, why) : null);
  return h(
    "tr",
    {},
    h("td", {}, clock(flow.time)),
    h("td", {}, `${flow.node} (${flow.direction === "inbound" ? "server" : "client"})`),
    h("td", {}, flow.client),
    end,
    h("td", { class: "number" }, bytes(flow.bytes_to_server)),
    h("td", { class: "number" }, bytes(flow.bytes_to_client)),
  );
}
