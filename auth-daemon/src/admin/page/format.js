// Numbers and times as people read them.

/** 12345 as "12,345". */
export function count(number) {
  return Math.round(number).toLocaleString("en");
}

/** A number of things: "1 pod", "2 pods". */
export function some(number, what) {
  return `${count(number)} ${what}${number === 1 ? "" : "s"}`;
}

/** Connections per second. Empty if there are none. */
export function rate(perSecond) {
  if (perSecond <= 0) return "";
  if (perSecond < 0.1) return "<0.1/s";
  return perSecond < 10 ? `${perSecond.toFixed(1)}/s` : `${count(perSecond)}/s`;
}

/** Bytes with a unit. */
export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (number >= 1024 && unit < units.length - 1) {
    number /= 1024;
    unit += 1;
  }
  return `${number >= 100 || unit === 0 ? Math.round(number) : number.toFixed(1)} ${units[unit]}`;
}

/** The time of day of a time in the format of RFC 3339, in UTC. */
export function clock(time) {
  return time.slice(11, 19);
}

/** A time in the format of RFC 3339, to the minute. */
export function minute(time) {
  return time ? `${time.slice(0, 10)} ${time.slice(11, 16)} UTC` : "unknown";
}
