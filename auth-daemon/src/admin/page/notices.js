// What the user should know before the rest: daemons that cannot be reached, and what to do when there is nothing to see.

import { h } from "./dom.js";
import { count } from "./format.js";

/** Shows problems in `place`, and in `empty` what to do if there is nothing to see. Returns whether there is. */
export function notices(mesh, selection, place, empty) {
  const silent = [...mesh.nodes].filter(([, node]) => node.reason !== "");
  const problems = [];
  if (mesh.trouble) problems.push(`${mesh.trouble}. Start auth-daemon ui again, or look whether the daemon runs.`);
  for (const [name, { reason }] of silent) problems.push(`Node ${name} cannot be reached: ${reason}`);
  for (const { node, reason } of mesh.missing) problems.push(`Node ${node} cannot be reached: ${reason}`);
  for (const [name, { status }] of mesh.nodes) {
    const bad = (status?.pods ?? []).filter((pod) => !pod.enrolled || pod.tampered);
    if (bad.length > 0) problems.push(`Node ${name}: ${bad.map((pod) => `${pod.pod} is not protected (${pod.reason || pod.tampered})`).join("; ")}`);
    for (const policy of (status?.policies ?? []).filter((one) => one.error)) {
      problems.push(`${policy.kind} ${policy.name} cannot be read: ${policy.error}`);
    }
  }
  if (mesh.leftOut > 0) problems.push(`${count(mesh.leftOut)} workloads or Services are not shown: there are too many.`);
  // Every node reports the same policies.
  once(place, [...new Set(problems)], (texts) => {
    const shown = texts.slice(0, 5).map((text) => h("p", {}, text));
    if (texts.length > 5) shown.push(h("p", {}, `and ${count(texts.length - 5)} more: auth-daemon status shows all.`));
    return shown;
  });
  const advice = nothing(mesh, selection, silent.length);
  empty.hidden = advice === null;
  once(empty, advice ?? [], ([title, ...texts]) => [h("h2", {}, title), ...texts.map((text) => h("p", {}, text))]);
  return advice === null;
}

/** Says why there is nothing to see, and what to do. Null if there is something. */
function nothing(mesh, selection, silent) {
  if (selection.workloads.size > 0) return null;
  if (mesh.workloads.size > 0) {
    return ["Nothing matches", "Clear the search, choose all namespaces, or show more kinds of connections."];
  }
  if (mesh.trouble || (silent > 0 && silent === mesh.nodes.size)) {
    return [
      "No daemon can be reached",
      "The reasons are above. In a cluster, see whether the daemons' pods run: kubectl -n auth-system get pods.",
      "On a node, auth-daemon check says what is missing, and auth-daemon status whether the daemon answers.",
    ];
  }
  if (!mesh.isKnown) return ["Asking the daemons …"];
  return [
    "No pod is in the mesh",
    "Add the label auth-daemon.io/mesh=enabled to a namespace or a pod; new connections of its pods then appear here.",
    "auth-daemon status says which pods a daemon knows, and why one is not protected.",
  ];
}

/** Replaces the children of `place` if the texts have changed, so that a screen reader says them once. */
function once(place, texts, make) {
  const key = JSON.stringify(texts);
  if (place.dataset.key === key) return;
  place.dataset.key = key;
  place.replaceChildren(...(texts.length ? make(texts) : []));
}
