// Positions: callers to the left of what they call, namespaces as boxes. Pure functions of their arguments.

export const CHIP = { width: 168, height: 38 };
const GAP = { x: 74, y: 12, boxX: 100, boxY: 22 };
/** How much wider the gaps between boxes become where there is room. */
const STRETCH = { x: 90, y: 46 };
const PAD = 12;
const TITLE = 28;
/** Room on the right for edges that do not lead ahead. */
const LOOP = 40;
/** Chips in a column of a box. */
const MAX_CHIPS = 12;
/** Height of a column of boxes that is not split, in however small a room. */
const MIN_HEIGHT = 500;
/** The map may be drawn smaller by this factor to fit into the room. */
export const SCALE = 0.7;

/** Places boxes and chips in a room { width, height }. Returns { width, height, at: Map(id → rectangle) }. */
export function layout({ boxes, edges }, room) {
  const homes = new Map();
  for (const box of boxes) {
    homes.set(box.id, box.id);
    for (const chip of box.chips) homes.set(chip.id, box.id);
  }
  const sizes = new Map(boxes.map((box) => [box.id, inside(box, edges)]));
  const outer = edges.map((edge) => [homes.get(edge.from), homes.get(edge.to)]);
  // A long chain of callers is folded, so that the map is not much wider than the room.
  const most = Math.max(2, Math.floor(room.width / SCALE / (CHIP.width + 2 * PAD + GAP.boxX)));
  const layers = fold(layered([...sizes.keys()], outer), most);
  const columns = split(layers, (id) => sizes.get(id).height + GAP.boxY, Math.max(MIN_HEIGHT, room.height / SCALE));

  const widths = columns.map((column) => Math.max(...column.map((id) => sizes.get(id).width)));
  const heights = columns.map((column) => sum(column.map((id) => sizes.get(id).height)));
  const gapX = stretched(GAP.boxX, STRETCH.x, room.width - sum(widths) - 2 * PAD, columns.length);
  const gaps = columns.map((column, index) => stretched(GAP.boxY, STRETCH.y, room.height - heights[index] - 2 * PAD, column.length));
  const totals = columns.map((column, index) => heights[index] + gaps[index] * (column.length - 1));
  const height = Math.max(0, ...totals) + 2 * PAD;

  const at = new Map();
  let x = PAD;
  columns.forEach((column, index) => {
    let y = (height - totals[index]) / 2;
    for (const id of column) {
      const size = sizes.get(id);
      const left = x + (widths[index] - size.width) / 2;
      at.set(id, { x: left, y, width: size.width, height: size.height });
      for (const [chip, place] of size.chips) at.set(chip, { ...CHIP, x: left + place.x, y: y + place.y });
      y += size.height + gaps[index];
    }
    x += widths[index] + gapX;
  });
  return { width: Math.max(0, x - gapX + PAD + LOOP), height, at };
}

/**
 * Says where edges begin and end, so that those of a chip or box do not lie on each other: Map(id of edge → { start, end,
 * isAhead }). An edge begins on the right. It ends on the left if that is ahead, else on the right.
 */
export function ends(edges, at) {
  const sides = new Map();
  const found = new Map();
  const add = (id, side, other, put) => {
    const key = JSON.stringify([id, side]);
    if (!sides.has(key)) sides.set(key, []);
    sides.get(key).push({ id, side, other: other.y + other.height / 2, put });
  };
  for (const edge of edges) {
    const [from, to] = [at.get(edge.from), at.get(edge.to)];
    const isAhead = to.x > from.x + from.width;
    const place = { start: null, end: null, isAhead };
    found.set(edge.id, place);
    add(edge.from, "right", to, (point) => (place.start = point));
    add(edge.to, isAhead ? "left" : "right", from, (point) => (place.end = point));
  }
  for (const side of sides.values()) {
    side.sort((a, b) => a.other - b.other);
    side.forEach(({ id, side: name, put }, index) => {
      const { x, y, width, height } = at.get(id);
      put({ x: name === "left" ? x : x + width, y: y + (height * (index + 1)) / (side.length + 1) });
    });
  }
  return found;
}

/** Places the chips of a box in it. Returns its size and their places. */
function inside(box, edges) {
  const chips = new Map();
  const foot = box.idle > 0 && box.isOpen ? 20 : 0;
  if (box.chips.length === 0) return { width: CHIP.width + 2 * PAD, height: TITLE + (box.isOpen ? foot : 26) + 4, chips };
  const ids = box.chips.map((chip) => chip.id);
  const isInside = new Set(ids);
  const inner = edges.filter((edge) => isInside.has(edge.from) && isInside.has(edge.to));
  const layers = layered(ids, inner.map((edge) => [edge.from, edge.to]));
  const columns = split(layers, () => 1, MAX_CHIPS);
  const most = Math.max(...columns.map((column) => column.length));
  const step = CHIP.height + GAP.y;
  columns.forEach((column, index) => {
    const top = TITLE + ((most - column.length) * step) / 2;
    column.forEach((id, row) => {
      chips.set(id, { x: PAD + index * (CHIP.width + GAP.x), y: top + row * step });
    });
  });
  return {
    width: columns.length * (CHIP.width + GAP.x) - GAP.x + 2 * PAD,
    height: TITLE + most * step - GAP.y + foot + PAD,
    chips,
  };
}

/** Assigns ids to columns so that most edges lead to the right, and orders each column by where its edges come from. */
function layered(ids, pairs) {
  const after = new Map(ids.map((id) => [id, new Set()]));
  for (const [from, to] of pairs) if (from !== to) after.get(from).add(to);
  const order = sorted(ids, after);
  const place = new Map(order.map((id, index) => [id, index]));
  const layer = new Map(ids.map((id) => [id, 0]));
  for (const id of order) {
    for (const next of after.get(id)) {
      // An edge back to an earlier one closes a circle, and moves nothing.
      if (place.get(next) > place.get(id)) layer.set(next, Math.max(layer.get(next), layer.get(id) + 1));
    }
  }
  const columns = [];
  for (const id of ids) (columns[layer.get(id)] ??= []).push(id);
  const rows = new Map();
  for (const column of columns) {
    const middle = new Map();
    for (const id of column) {
      const before = ids.filter((one) => after.get(one).has(id) && rows.has(one)).map((one) => rows.get(one));
      middle.set(id, before.length ? before.reduce((a, b) => a + b) / before.length : Infinity);
    }
    column.sort((a, b) => middle.get(a) - middle.get(b) || (a < b ? -1 : 1));
    column.forEach((id, index) => rows.set(id, index / column.length));
  }
  return columns;
}

/** Orders ids so that most come after those that lead to them: a depth-first search, from those that nothing leads to. */
function sorted(ids, after) {
  const called = new Set([...after.values()].flatMap((all) => [...all]));
  const starts = [...ids.filter((id) => !called.has(id)), ...ids];
  const seen = new Set();
  const order = [];
  for (const start of starts) {
    if (seen.has(start)) continue;
    seen.add(start);
    const path = [[start, [...after.get(start)]]];
    while (path.length > 0) {
      const [id, rest] = path.at(-1);
      const next = rest.pop();
      if (next === undefined) {
        order.push(id);
        path.pop();
      } else if (!seen.has(next)) {
        seen.add(next);
        path.push([next, [...after.get(next)]]);
      }
    }
  }
  return order.reverse();
}

/** Joins neighbouring columns until there are at most so many. */
function fold(columns, most) {
  if (columns.length <= most) return columns;
  const folded = [];
  columns.forEach((column, index) => (folded[Math.floor((index * most) / columns.length)] ??= []).push(...column));
  return folded;
}

/** Widens the gap between things where they leave room. */
function stretched(gap, most, room, things) {
  return Math.max(gap, Math.min(gap + most, things > 1 ? room / (things - 1) : 0));
}

function sum(numbers) {
  return numbers.reduce((total, number) => total + number, 0);
}

/** Splits columns that are longer than `most` into several. */
function split(columns, size, most) {
  return columns.flatMap((column) => {
    const parts = [[]];
    let length = 0;
    for (const id of column) {
      if (length + size(id) > most && parts.at(-1).length > 0) {
        parts.push([]);
        length = 0;
      }
      parts.at(-1).push(id);
      length += size(id);
    }
    return parts;
  });
}
