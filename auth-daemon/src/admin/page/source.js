// Asks the daemons, each at its own pace, and hands their answers to the mesh.

/** The most connections in one answer: a full answer means that there are more. */
const PAGE = 1000;
/** How often the list of daemons, their status, and the workloads are asked for, in milliseconds. */
const SELDOM = 5000;
/** How long a request may take. */
const DEADLINE = 12000;

/** Follows all daemons for as long as the page is open. Calls `changed` after each answer. */
export function follow(mesh, changed) {
  const readers = new Map();
  let pause = 500;

  repeat(SELDOM, async () => {
    let found;
    try {
      found = await get("nodes");
    } catch (error) {
      mesh.lost(`This page's server does not answer: ${error.message}`);
      changed();
      return;
    }
    pause = found.pause;
    mesh.takeNodes(found);
    for (const { name, at } of found.nodes) {
      if (!readers.has(name)) {
        readers.set(name, at);
        readNode(name, at);
      }
    }
    for (const name of readers.keys()) {
      if (!mesh.nodes.has(name)) readers.delete(name);
    }
    changed();
    const inventory = await any(mesh, ["mesh"]);
    if (inventory) mesh.takeInventory(inventory);
    changed();
  });

  async function readNode(name, at) {
    let statusIsDue = 0;
    while (readers.has(name)) {
      const cursor = mesh.cursor(name);
      let isFull = false;
      try {
        const answer = await get(...at, "live", cursor.next, cursor.since);
        isFull = answer.flows.flows.length === PAGE;
        mesh.takeLive(name, answer);
        if (Date.now() >= statusIsDue) {
          mesh.takeStatus(name, await get(...at, "summary"));
          statusIsDue = Date.now() + SELDOM;
        }
      } catch (error) {
        mesh.fail(name, error.message);
      }
      changed();
      if (!isFull) await wait(pause);
      await visible();
    }
  }
}

/** Asks the first daemon that answers, for what all of them know. Returns null if none does. */
export async function any(mesh, path, question) {
  for (const node of mesh.nodes.values()) {
    if (node.reason !== "") continue;
    try {
      return await get(...node.at, ...path, question);
    } catch {
      // The reader of this node tells the user.
    }
  }
  return null;
}

/** Requests a path, given by its segments. A last argument that is an object is sent as a question. */
async function get(...segments) {
  const question = typeof segments.at(-1) === "object" || segments.at(-1) === undefined ? segments.pop() : undefined;
  const url = `./${segments.map(encodeURIComponent).join("/")}`;
  const options = { signal: AbortSignal.timeout(DEADLINE) };
  if (question) {
    options.method = "POST";
    options.headers = { "content-type": "application/json" };
    options.body = JSON.stringify(question);
  }
  const answer = await fetch(url, options);
  if (!answer.ok) throw new Error((await answer.text()).slice(0, 1000) || `HTTP ${answer.status}`);
  return answer.json();
}

async function repeat(milliseconds, work) {
  for (;;) {
    try {
      await work();
    } catch (error) {
      console.error(error);
    }
    await wait(milliseconds);
    await visible();
  }
}

function wait(milliseconds) {
  return new Promise((done) => setTimeout(done, milliseconds));
}

/** Waits while the page is in the background: nobody looks, so nobody is asked. */
function visible() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
}
