// Draws the PCI tree with devices and NICs at its ends, and beside it a crossing for each device and NIC: its verdict.
//
// Rules of this file:
// * A row is an end of the tree; a NIC's row leads to its column, a device's row crosses all of them.
// * A verdict is told by a glyph, a word, a line and a colour, and in full beside the drawing when it is chosen.
// * One crossing is chosen; the arrow keys go from one to the next, and the way between its ends is drawn strong.

import { bdi, fill, h, s } from "./dom.js";
import { bits, rate, shortPath, time } from "./words.js";

const ROW = 40;
const BOX = 58;
const DOT = 10; // a switch's downstream port
const GAP = 14; // from one depth of the tree to the next
const END = 136;
const CELL = 72;
const KINDS = {
  bad: ["✕", "fails"],
  fair: ["◐", "works, by copies"],
  good: ["✓", "works"],
  off: ["?", "not tried"],
  down: ["–", "its NIC does not work"],
};
const VENDORS = { "10de": "NVIDIA", "1002": "AMD", "15b3": "NVIDIA networking", "8086": "Intel", "144d": "Samsung" };

const drawing = document.getElementById("drawing");
let chosen = null;
let top = 0; // where the rows begin: below the heads of the NICs
let last = null;

export function showMachine(facts) {
  last = facts;
  const { devices, nics, pairs } = facts;
  const crossings = gather(pairs, new Set(nics.listed.filter((nic) => nic.error).map((nic) => nic.name)));
  if (!crossings.has(chosen)) chosen = worst(crossings);
  const counts = Object.keys(KINDS).map((kind) => [...crossings.values()].filter((each) => each.kind === kind).length);
  document.getElementById("machine-count").textContent = crossings.size ? `${crossings.size} pairs` : "";
  fill(drawing, devices.listed.length + nics.listed.length ? draw(facts, crossings) : h("p", { class: "empty" }, "There is nothing to draw: no device and no NIC."));
  fill(document.getElementById("inspector"), inspector(crossings.get(chosen), facts));
  fill(document.getElementById("key"), crossings.size ? key(counts) : []);
}

function key(counts) {
  const kinds = Object.entries(KINDS).map(([kind, [glyph, words]], index) => h("span", { class: kind }, h("b", {}, glyph), ` ${words} (${counts[index]})`));
  return [...kinds, h("span", { class: "fair" }, h("b", {}, "▲"), " ACS sends what passes there up to the root complex")];
}

const kindOf = (verdict, isDown) => (isDown ? "down" : { works: verdict.path === "STAGED" ? "fair" : "good", fails: "bad", untried: "off" }[verdict.state]);

// Crossings by device and NIC: all verdicts on it, and the one that counts: the first that works, else the first.
function gather(pairs, down) {
  const crossings = new Map();
  for (const pair of pairs) {
    const id = `${pair.device}|${pair.nic}`;
    const found = crossings.get(id) ?? { id, device: pair.device, nic: pair.nic, verdicts: [] };
    found.verdicts.push(pair);
    crossings.set(id, found);
  }
  for (const each of crossings.values()) {
    each.best = each.verdicts.find((verdict) => verdict.state === "works") ?? each.verdicts[0];
    each.kind = kindOf(each.best, down.has(each.nic));
  }
  return crossings;
}

function worst(crossings) {
  const every = [...crossings.values()];
  for (const kind of Object.keys(KINDS)) {
    const found = every.find((each) => each.kind === kind);
    if (found) return found.id;
  }
  return null;
}

// The tree: host bridges, the bridges below them, and at the ends devices and NICs.
function plant({ pci, devices, nics }) {
  const functions = new Map(pci.functions.map((each) => [each.address, each]));
  const roots = new Map();
  const grow = (children, id, node) => children.get(id) ?? children.set(id, { id, children: new Map(), ends: [], ...node }).get(id);
  const add = (end) => {
    const own = functions.get(end.pci);
    if (!own) {
      const where = end.pci ? "unknown place" : "host memory";
      grow(roots, where, { kind: "memory", label: where }).ends.push(end);
      return;
    }
    let at = grow(roots, own.host_bridge, { kind: "root", label: own.host_bridge, numa: own.numa });
    [...own.bridges].reverse().forEach((address, depth) => {
      const kind = depth === 0 ? "root port" : depth % 2 ? "switch" : "port";
      at = grow(at.children, address, { kind, label: address, redirects: functions.get(address)?.redirects });
    });
    at.ends.push({ ...end, function: own });
  };
  devices.listed.forEach((each) => add({ ...each, end: "device" }));
  nics.listed.forEach((each) => add({ ...each, end: "nic" }));
  return [...roots.values()].sort((a, b) => (a.kind === "memory") - (b.kind === "memory") || a.id.localeCompare(b.id));
}

// Give each node its row and depth, and return the ends in order and the greatest depth.
function lay(roots) {
  const ends = [];
  let deepest = 0;
  const walk = (node, depth, above) => {
    Object.assign(node, { depth, above, from: ends.length });
    deepest = Math.max(deepest, depth);
    const below = [...node.children.values()].map((child) => [child.id, () => walk(child, depth + 1, node)]);
    const here = node.ends.map((end) => [end.pci || `~${end.end}${end.name}`, () => ends.push(Object.assign(end, { above: node, row: ends.length }))]);
    for (const [, place] of [...below, ...here].sort(([a], [b]) => a.localeCompare(b, undefined, { numeric: true }))) place();
    node.row = (node.from + ends.length - 1) / 2;
  };
  roots.forEach((root) => walk(root, 0, null));
  return { ends, deepest };
}

const short = (address) => address.replace(/^0000:/, "");
const cut = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
const y = (row) => top + row * ROW + ROW / 2;

function draw(facts, crossings) {
  const roots = plant(facts);
  const { ends, deepest } = lay(roots);
  const nics = ends.filter((end) => end.end === "nic");
  top = nics.length ? 56 : 8;
  const left = (depth) => 11 + Array.from({ length: depth }, (_, above) => broad(above) + GAP).reduce((sum, each) => sum + each, 0);
  const endsAt = left(deepest + 1) + 4;
  const cellsAt = endsAt + END + 12;
  const width = cellsAt + Math.max(nics.length * CELL, 12) + 4;
  const height = top + ends.length * ROW + 6;
  const column = (nic) => cellsAt + nics.findIndex((each) => each.name === nic) * CELL + CELL / 2;
  const strong = way(crossings.get(chosen), ends);
  const parts = { lines: [], boxes: [] };
  const visit = (node) => {
    parts.boxes.push(box(node, left(node.depth), strong.has(node)));
    for (const below of [...node.children.values(), ...node.ends]) {
      const x = below.end ? endsAt : left(below.depth);
      parts.lines.push(elbow(left(node.depth) + broad(node.depth), y(node.row), x, y(below.row), strong.has(below)));
      if (!below.end) visit(below);
    }
  };
  roots.forEach(visit);
  const crossed = roots.filter((root) => strong.has(root));
  if (crossed.length === 2) parts.lines.push(s("path", { class: "edge on beyond", d: `M11 ${y(crossed[0].row)}H4V${y(crossed[1].row)}H11` }, s("title", {}, "between root complexes")));
  const size = { width, height, viewBox: `0 0 ${width} ${height}` };
  return s(
    "svg",
    { class: "tree", role: "group", "aria-label": `PCI tree with ${ends.length} ends and the verdicts of ${crossings.size} pairs`, ...size },
    s("g", { key: "bands" }, ends.filter((end) => nics.length && end.end === "device").map((end) => s("rect", { key: end.name, class: "band", x: endsAt, y: y(end.row) - ROW / 2 + 2, width: width - endsAt, height: ROW - 4, rx: 4 }))),
    s("g", { key: "lines" }, sorted(parts.lines)),
    s("g", { key: "wires" }, wires(ends, nics, crossings.get(chosen), column, endsAt)),
    s("g", { key: "boxes" }, parts.boxes),
    s("g", { key: "ends" }, ends.map((end) => tip(end, endsAt, strong.has(end)))),
    s("g", { key: "heads" }, nics.map((nic) => head(nic, column(nic.name)))),
    s("g", { key: "cells" }, ends.filter((end) => end.end === "device").flatMap((end) => nics.map((nic) => cell(crossings.get(`${end.name}|${nic.name}`), column(nic.name), y(end.row))))),
  );
}

// What is drawn strong lies on top.
const sorted = (lines) => lines.sort((a, b) => a.classList.contains("on") - b.classList.contains("on"));

// The nodes and ends on the way between the ends of a crossing.
function way(crossing, ends) {
  if (!crossing) return new Set();
  const find = (kind, name) => ends.find((end) => end.end === kind && end.name === name);
  const up = (end) => {
    const nodes = [];
    for (let at = end; at; at = at.above) nodes.push(at);
    return nodes;
  };
  const [one, other] = [up(find("device", crossing.device)), up(find("nic", crossing.nic))];
  const turn = one.find((node) => other.includes(node));
  const below = (nodes) => (turn ? nodes.slice(0, nodes.indexOf(turn)) : nodes);
  return new Set([...below(one), ...below(other), ...(turn ? [turn] : [])]);
}

function elbow(x1, y1, x2, y2, on) {
  const middle = x1 + 8;
  const bend = Math.min(6, Math.abs(y2 - y1));
  const turn = y2 > y1 ? bend : -bend;
  const d = y1 === y2 ? `M${x1} ${y1}H${x2}` : `M${x1} ${y1}H${middle - 2}Q${middle} ${y1} ${middle} ${y1 + turn}V${y2 - turn}Q${middle} ${y2} ${middle + bend} ${y2}H${x2}`;
  return s("path", { class: on ? "edge on" : "edge", d });
}

// How broad what stands at a depth is: below a root port switches and their downstream ports take turns.
const broad = (depth) => (depth >= 3 && depth % 2 ? DOT : BOX);

function box(node, x, on) {
  const at = y(node.row);
  if (node.kind === "port") return port(node, x + DOT / 2, at, on);
  const root = node.kind === "root" || node.kind === "memory";
  const acs = node.redirects === true ? "ACS redirects" : node.redirects === null ? "ACS unknown" : "";
  const words = node.kind === "root" ? `NUMA ${node.numa < 0 ? "?" : node.numa}` : node.kind === "memory" ? "" : node.kind;
  const text = node.kind === "memory" ? node.label.split(" ") : [short(node.label.replace(/^pci/, "")), words];
  return s(
    "g",
    { key: node.id, class: `box ${root ? "root" : ""} ${on ? "on" : ""}` },
    s("title", {}, [node.label, words, acs].filter(Boolean).join(", ")),
    s("rect", { x, y: at - 15, width: BOX, height: 30, rx: root ? 2 : 5 }),
    s("text", { x: x + BOX / 2, y: at - 2, class: node.kind === "memory" ? "" : "mono" }, text[0]),
    s("text", { x: x + BOX / 2, y: at + 10, class: node.kind === "memory" ? "" : "small" }, text[1]),
    node.redirects === true ? s("text", { x: x + BOX, y: at - 11, class: "acs" }, "▲") : null,
  );
}

function port(node, x, at, on) {
  const words = ["switch port", node.redirects === true ? "ACS redirects" : node.redirects === null ? "ACS unknown" : ""];
  return s(
    "g",
    { key: node.id, class: `box port ${node.redirects === true ? "up" : ""} ${on ? "on" : ""}` },
    s("title", {}, [node.label, ...words].filter(Boolean).join(", ")),
    s("path", { d: node.redirects === true ? `M${x - 6} ${at + 5}L${x} ${at - 6}L${x + 6} ${at + 5}Z` : `M${x - 4} ${at - 4}h8v8h-8Z` }),
  );
}

function tip(end, x, on) {
  const at = y(end.row);
  const what = end.end === "device" ? `${end.kind} ${end.pci ? short(end.pci) : ""}` : `${end.state || "?"} ${end.pci ? short(end.pci) : "software"}`;
  const vendor = VENDORS[end.function?.id.slice(0, 4)] ?? "";
  const title = [end.name, end.end === "nic" ? "NIC port" : "device", vendor, end.function?.driver, end.why ?? end.error?.message].filter(Boolean).join(", ");
  const state = end.end === "nic" && (end.error || end.state !== "ACTIVE") ? "down" : "";
  return s(
    "g",
    { key: `${end.end} ${end.name}`, class: `tip ${end.end} ${state} ${on ? "on" : ""}` },
    s("title", {}, title),
    s("rect", { x, y: at - 16, width: END, height: 32, rx: end.end === "nic" ? 16 : 3 }),
    end.end === "device" ? s("rect", { class: "mark", x, y: at - 16, width: 5, height: 32 }) : s("circle", { class: "mark", cx: x + 13, cy: at, r: 4 }),
    s("text", { x: x + (end.end === "nic" ? 24 : 13), y: at - 2, class: "name" }, cut(end.name, 15)),
    s("text", { x: x + (end.end === "nic" ? 24 : 13), y: at + 11, class: "small mono" }, cut(what, 17)),
  );
}

function head(nic, x) {
  const down = nic.error || nic.state !== "ACTIVE";
  return s(
    "g",
    { key: nic.name, class: `head ${down ? "down" : ""}` },
    s("title", {}, nic.error ? `${nic.name}: ${nic.error.message}` : nic.name),
    s("text", { x, y: 20, class: "name" }, cut(nic.name, 12)),
    s("text", { x, y: 34, class: "small" }, down ? `✕ ${nic.error ? cut(nic.error.reason.toLowerCase().replaceAll("_", " "), 10) : nic.state}` : bits(nic.rate) || nic.link_layer),
  );
}

// A NIC's own row leads to its column, and the column crosses the rows of the devices.
function wires(ends, nics, crossing, column, endsAt) {
  const rows = ends.filter((end) => end.end === "device").map((end) => y(end.row));
  return nics.map((nic) => {
    const x = column(nic.name);
    const own = y(nic.row);
    const on = crossing?.nic === nic.name;
    const device = on ? y(ends.find((end) => end.end === "device" && end.name === crossing.device).row) : 0;
    return s(
      "g",
      { key: nic.name },
      s("path", { class: "wire", d: `M${endsAt + END} ${own}H${x}M${x} ${top - 12}V${Math.max(own, ...rows)}` }),
      on ? s("path", { class: "wire on", d: `M${endsAt + END} ${own}H${x}V${device}H${endsAt + END}` }) : null,
      s("circle", { class: on ? "joint on" : "joint", cx: x, cy: own, r: 3 }),
    );
  });
}

function cell(crossing, x, at) {
  if (!crossing) return null;
  const { best, kind, id } = crossing;
  const [glyph, words] = KINDS[kind];
  const figure = kind === "down" ? "NIC down" : best.state === "works" ? rate(best.write) : best.state === "fails" ? cut(best.reason.toLowerCase().replaceAll("_", " "), 12) : "not tried";
  const label = `${crossing.device} with ${crossing.nic}: ${words}${best.state === "works" ? `, by ${best.path}, writes ${rate(best.write)}, reads ${rate(best.read)}` : best.message ? `, ${best.message}` : ""}`;
  const on = id === chosen;
  return s(
    "g",
    { key: id, class: `cell ${kind} ${on ? "on" : ""}`, tabindex: on ? "0" : "-1", role: "button", "aria-pressed": `${on}`, "aria-label": label, "data-pair": id },
    s("title", {}, label),
    s("rect", { x: x - CELL / 2 + 3, y: at - 16, width: CELL - 6, height: 32, rx: 4 }),
    s("text", { x, y: at - 2, class: "name" }, `${glyph} ${shortPath(best.path)}`),
    s("text", { x, y: at + 11, class: "small" }, figure),
  );
}

function inspector(crossing, { node }) {
  if (!crossing) {
    const why = node.fabrics.find((each) => each.kind === "verbs")?.error;
    return h("p", { class: "empty" }, "No device has a NIC to be proved with. ", why ? why.message : "", " Bytes cross by tcp all the same.");
  }
  return [
    h("h3", {}, bdi(crossing.device), " and ", bdi(crossing.nic)),
    crossing.verdicts.map((verdict) => {
      const kind = kindOf(verdict, false);
      return h(
        "div",
        { class: "verdict", key: verdict.path },
        h("p", {}, h("span", { class: `badge ${kind}` }, h("span", { class: "glyph", "aria-hidden": "true" }, KINDS[kind][0]), { works: "works", fails: "fails", untried: "not tried" }[verdict.state]), h("b", {}, ` ${verdict.path}`)),
        verdict.state === "works" ? h("dl", { class: "proof" }, figure("4 KiB write", time(verdict.latency)), figure("write", rate(verdict.write)), figure("read", rate(verdict.read))) : null,
        verdict.message ? h("p", { class: "fault" }, h("code", {}, verdict.reason), " ", verdict.message) : null,
        h("p", {}, verdict.detail),
        verdict.advice ? h("p", { class: "advice" }, verdict.advice) : null,
        verdict.state === "untried" ? h("p", { class: "advice" }, "Nothing is believed before bytes moved: ", h("code", {}, `peermemctl preflight --device ${crossing.device}`), " tries it.") : null,
      );
    }),
  ];
}

const figure = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));

function choose(id) {
  chosen = id;
  showMachine(last);
}

drawing.addEventListener("click", (event) => {
  const pair = event.target.closest("[data-pair]")?.dataset.pair;
  if (pair) choose(pair);
});

const MOVES = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };

drawing.addEventListener("keydown", (event) => {
  const move = MOVES[event.key];
  const current = event.target.closest("[data-pair]");
  if (!move || !current) return;
  const cells = [...drawing.querySelectorAll("[data-pair]")];
  const columns = new Set(cells.map((each) => each.dataset.pair.split("|")[1])).size;
  const next = cells[cells.indexOf(current) + move[0] * columns + move[1]];
  event.preventDefault();
  if (next) {
    choose(next.dataset.pair);
    drawing.querySelector('[data-pair][tabindex="0"]').focus();
  }
});
