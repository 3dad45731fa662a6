// Numbers and states as words.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

/** Bytes in the unit that leaves at most four digits. */
export function size(bytes) {
  let unit = 0;
  while (bytes >= 1024 && unit < UNITS.length - 1) {
    bytes /= 1024;
    unit += 1;
  }
  const digits = bytes >= 100 || Number.isInteger(bytes) ? 0 : 1;
  return `${bytes.toFixed(digits)} ${UNITS[unit]}`;
}

export const rate = (bytesPerSecond) => `${size(bytesPerSecond)}/s`;

/** Bits per second of a port. */
export const bits = (perSecond) => (perSecond ? `${+(perSecond / 1e9).toFixed(1)} Gb/s` : "");

/** Seconds of something that was measured. */
export function time(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1e-3) return `${short(seconds * 1e6)} µs`;
  if (seconds < 1) return `${short(seconds * 1e3)} ms`;
  return seconds < 120 ? `${short(seconds)} s` : age(seconds);
}

const short = (number) => (number >= 99.5 ? number.toFixed(0) : number.toPrecision(2).replace(/\.0$/, ""));

/** Seconds that have passed, to the two largest units. */
export function age(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const parts = [
    [Math.floor(whole / 86400), "d"],
    [Math.floor(whole / 3600) % 24, "h"],
    [Math.floor(whole / 60) % 60, "min"],
    [whole % 60, "s"],
  ];
  const first = parts.findIndex(([count]) => count > 0);
  if (first < 0) return "0 s";
  return parts
    .slice(first, first + 2)
    .filter(([count]) => count > 0)
    .map(([count, unit]) => `${count} ${unit}`)
    .join(" ");
}

export const clock = (unix) => new Date(unix * 1000).toLocaleTimeString([], { hour12: false });

export const count = (number, one, many = `${one}s`) => `${number} ${number === 1 ? one : many}`;

/** The last part of a resource name, with its node where that is another one. */
export function place(name, node) {
  const [, where, , id] = name.split("/");
  if (!id) return name || "–";
  return where === node ? id : `${where}/${id}`;
}

/** A path as short as a cell needs it. */
export const shortPath = (path) => ({ LEGACY_PEER_MEMORY: "LEGACY" })[path] ?? path;
