// The head of the page, its numbers, and the tables.

import { bdi, fill, h } from "./dom.js";
import { age, bits, clock, count, place, rate, shortPath, size, time } from "./words.js";

const at = (id) => document.getElementById(id);

export function showHead({ node, at: now }) {
  const mark = node.ready ? badge("good", "✓", "ready") : badge("bad", "✕", "not ready");
  fill(
    at("head"),
    h("span", { class: "word" }, "peermem"),
    h("h1", {}, bdi(node.name)),
    mark,
    h(
      "dl",
      { class: "facts" },
      fact("up", age(now - node.started_at), `since ${new Date(node.started_at * 1000).toLocaleString()}`),
      fact("version", node.version),
      fact("epoch", node.epoch, "identifies this run of the daemon", "mono"),
      fact("gRPC", node.address || "–", "where other nodes connect", "mono"),
      h("div", { class: "fabrics" }, h("dt", {}, "fabrics"), h("dd", {}, node.fabrics.map(fabric))),
    ),
    h("span", { class: "heard", title: "time of what is shown" }, clock(now)),
  );
}

const fact = (name, value, title, kind) => h("div", { key: name, title }, h("dt", {}, name), h("dd", { class: kind }, value));

const fabric = ({ kind, error }) =>
  badge(error ? "off" : "good", error ? "✕" : "✓", kind, error ? `${error.reason}: ${error.message}` : "works");

const badge = (kind, glyph, text, title) =>
  h("span", { class: `badge ${kind}`, title }, h("span", { class: "glyph", "aria-hidden": "true" }, glyph), text);

export function showTiles({ node, history, transfers }) {
  const last = history.at.length - 1;
  const moving = Object.values(history.bandwidth).reduce((sum, column) => sum + column[last], 0);
  const failed = (history.ended.failed ?? []).reduce((sum, each) => sum + each, 0) * history.step;
  const tile = (name, value, note) => h("div", { key: name }, h("dt", {}, name), h("dd", {}, value), h("dd", { class: "note" }, note));
  fill(
    at("tiles"),
    tile("Moving", rate(moving || 0), "now"),
    tile("Transfers", `${transfers.total}`, failed ? `${count(Math.round(failed), "failure")} in 5 min` : "running"),
    tile("Regions", `${node.regions}`, size(node.region_bytes)),
    tile("Links", `${node.links}`, "opened and accepted"),
    tile("Grants", `${node.grants_given + node.grants_held}`, `${node.grants_given} given, ${node.grants_held} held`),
    tile("Sessions", `${node.sessions}`, "of local jobs"),
  );
}

// A table whose cells carry the heads of their columns, for screens on which rows are cards.
function table(name, heads, rows) {
  const cells = (row) => row.cells.map((cell, index) => h("td", { class: heads[index][1], "data-head": heads[index][0] }, cell));
  return h(
    "div",
    { class: rows.length > 16 ? "scroll tall" : "scroll", key: "table", tabindex: "0", role: "region", "aria-label": name },
    h(
      "table",
      { class: "cards" },
      h("thead", {}, h("tr", {}, heads.map(([text, kind]) => h("th", { scope: "col", class: kind }, text)))),
      h("tbody", {}, rows.map((row) => h("tr", { key: row.key, class: row.class }, cells(row)))),
    ),
  );
}

const empty = (...lines) => h("p", { class: "empty", key: "empty" }, lines);
const code = (text) => h("code", {}, text);
const more = (part, what) => (part.total > part.listed.length ? h("p", { class: "more", key: "more" }, `and ${count(part.total - part.listed.length, `more ${what}`)}`) : null);
const sub = (...text) => h("span", { class: "sub" }, text);

export function showTransfers({ at: now, node, transfers, files }, before) {
  at("transfers-count").textContent = `${transfers.total} running`;
  const speed = speeds(now, transfers, before);
  const running = transfers.listed.map((each) => ({
    key: each.name,
    cells: [
      [bdi(route(each, node), { class: "strong" }), sub(each.name, each.segments > 1 ? `, ${each.segments} segments` : "")],
      [progress(each), sub(`${each.state === "RUNNING" ? "" : `${each.state.toLowerCase()}, `}${size(each.done)} of ${size(each.total)}`)],
      speed.has(each.name) ? rate(speed.get(each.name)) : "–",
      [way(each), sub(each.direction)],
      [bdi(each.owner), sub(age(now - each.created_at))],
    ],
  }));
  const moves = files.map((each, index) => ({
    key: `file ${index}`, // parts of one file may move at the same time
    cells: [[bdi(`${each.order} ${each.region}`, { class: "strong" }), sub(bdi(each.file))], [progress(each), sub(`${size(each.done)} of ${size(each.total)}`)], "–", each.way ?? "–", bdi(each.owner)],
  }));
  const heads = [["From and to"], ["Progress", "bar"], ["Rate", "number"], ["Way"], ["Owner and age"]];
  fill(
    at("transfers"),
    running.length + moves.length ? table("Running transfers", heads, [...running, ...moves]) : empty("Nothing moves now. ", code(`peermemctl transfer REGION nodes/NODE/regions/REGION`), " starts a transfer."),
    more(transfers, "transfer"),
    transfers.ended.length ? h("h3", { key: "h" }, "Ended last") : null,
    transfers.ended.length ? h("ul", { class: "ended", key: "ended" }, transfers.ended.map((each) => ended(each, node))) : null,
  );
}

const route = (each, node) => `${place(each.source, node.name)} → ${place(each.destination, node.name)}`;
const way = (each) => each.state === "PENDING" ? "–" : [each.fabric ?? "–", each.path ? ` ${shortPath(each.path)}` : ""].join("");

function progress(each) {
  const share = each.total ? each.done / each.total : 0;
  return [h("progress", { max: "1", value: share.toFixed(4), "aria-label": "progress" }), h("span", { class: "percent" }, `${Math.floor(share * 100)} %`)];
}

function speeds(now, transfers, before) {
  const known = new Map((before?.transfers.listed ?? []).map((each) => [each.name, each.done]));
  const seconds = now - (before?.at ?? now);
  const moving = transfers.listed.filter((each) => known.has(each.name) && seconds > 0);
  return new Map(moving.map((each) => [each.name, Math.max(0, each.done - known.get(each.name)) / seconds]));
}

const OUTCOMES = { SUCCEEDED: ["good", "✓"], FAILED: ["bad", "✕"], CANCELLED: ["off", "–"] };

function ended(each, node) {
  const [kind, glyph] = OUTCOMES[each.state];
  const speed = each.duration && each.state === "SUCCEEDED" ? `, ${rate(each.total / each.duration)}` : "";
  const detail = each.error ? h("span", { class: "why", title: each.error.message }, h("b", { class: kind }, each.error.reason), " ", each.error.message) : null;
  return h(
    "li",
    { key: each.name },
    badge(kind, glyph, each.state.toLowerCase()),
    bdi(route(each, node), { class: "strong" }),
    h("span", { class: "sub" }, `${size(each.done)}${each.done === each.total ? "" : ` of ${size(each.total)}`} in ${time(each.duration)}${speed}, ${way(each)}`),
    detail,
  );
}

export function showNodes({ node, nodes, links }) {
  at("nodes-count").textContent = `${count(nodes.total, "node")}, ${count(links.total, "link")}`;
  const by = Map.groupBy ? Map.groupBy(links.listed, (link) => link.node) : group(links.listed);
  const strangers = [...by.keys()].filter((name) => !nodes.listed.some((each) => each.name === name));
  const rows = [...nodes.listed, ...strangers.map((name) => ({ name, address: by.get(name)[0].address }))].map((each) => ({
    key: each.name,
    class: each.name === node.name ? "self" : null,
    cells: [
      [bdi(each.name, { class: "strong" }), each.name === node.name ? sub("this node") : null],
      h("span", { class: "mono" }, each.address || "not in the directory"),
      by.has(each.name) ? gathered(by.get(each.name)).map(link) : sub("none now"),
    ],
  }));
  const alone = nodes.total <= 1 && !links.total;
  fill(
    at("nodes"),
    rows.length ? table("Nodes", [["Node"], ["gRPC"], ["Links"]], rows) : empty("This node has not joined the directory."),
    more(nodes, "node"),
    alone ? empty("No other node is known. Name them in ", code("[directory.nodes]"), ".") : null,
  );
}

function group(listed) {
  const by = new Map();
  for (const each of listed) by.set(each.node, [...(by.get(each.node) ?? []), each]);
  return by;
}

// A node may have several links over one fabric, each for another subject: they are told together.
function gathered(links) {
  const by = new Map();
  for (const each of links) {
    const id = `${each.side} ${each.fabric}`;
    const known = by.get(id) ?? { side: each.side, words: id, links: 0, grants: 0, down: 0 };
    by.set(id, { ...known, links: known.links + 1, grants: known.grants + each.grants, down: known.down + each.rails_down });
  }
  return [...by.values()];
}

function link({ side, words, links, grants, down }) {
  const parts = [`${words}${links > 1 ? ` ×${links}` : ""}`, count(grants, "grant"), down ? `${count(down, "rail")} down` : ""];
  return badge(down ? "fair" : "plain", down ? "▲" : side === "opened" ? "→" : "←", parts.filter(Boolean).join(", "));
}

export function showDevices({ devices }) {
  at("devices-count").textContent = count(devices.total, "device");
  const rows = devices.listed.map((each) => ({
    key: each.name,
    cells: [
      [bdi(each.name, { class: "strong" }), sub(each.kind)],
      shortPath(each.path),
      [h("progress", { max: "1", class: "held", value: (each.size ? 1 - each.available / each.size : 0).toFixed(4), "aria-label": "held" }), sub(`${size(each.size - each.available)} of ${size(each.size)}, ${count(each.regions, "region")}`)],
      h("span", { class: "why", title: each.why }, each.nics.length ? h("b", {}, each.nics.join(", ")) : each.why),
    ],
  }));
  const heads = [["Device"], ["Path"], ["Held", "bar"], ["NICs, or why none"]];
  fill(at("devices"), rows.length ? table("Devices", heads, rows) : empty("No device. Add a ", code("[[device]]"), " to the configuration."), more(devices, "device"));
}

export function showNics({ node, nics }) {
  at("nics-count").textContent = count(nics.total, "port");
  const rows = nics.listed.map((each) => ({
    key: each.name,
    cells: [
      [bdi(each.name, { class: "strong" }), sub(each.netdev)],
      [each.state || "no state", sub([each.link_layer, bits(each.rate)].filter(Boolean).join(", "))],
      h("span", { class: "mono" }, each.pci || "software"),
      each.error ? [badge("bad", "✕", each.error.reason), h("span", { class: "why", title: each.error.message }, each.error.message)] : badge("good", "✓", "works"),
    ],
  }));
  const verbs = node.fabrics.find((each) => each.kind === "verbs");
  const why = verbs ? (verbs.error ? [" ", verbs.error.message] : []) : " The daemon is configured to use none.";
  fill(
    at("nics"),
    rows.length ? table("NICs", [["Port"], ["State"], ["PCI"], ["Verdict"]], rows) : empty("No RDMA NIC is seen here, so bytes cross by tcp.", why, " ", code("peermemctl preflight"), " tells more."),
    more(nics, "port"),
  );
}

const STATES = { READY: ["good", "✓"], DRAINING: ["fair", "▲"], REVOKED: ["bad", "✕"] };

export function showRegions({ at: now, regions, node }) {
  at("regions-count").textContent = `${count(regions.total, "region")}, ${size(node.region_bytes)}`;
  const rows = regions.listed.map((each) => ({
    key: each.name,
    cells: [
      bdi(each.name, { class: "strong" }),
      size(each.length),
      bdi(each.device),
      h("span", { title: each.why }, shortPath(each.path), each.nics.length ? sub(each.nics.join(", ")) : null),
      badge(...(STATES[each.state] ?? ["plain", "·"]), each.state.toLowerCase()),
      bdi(each.owner),
      [Object.entries(each.labels).map(([key, value]) => h("span", { class: "label", key }, bdi(`${key}=${value}`))), each.more_labels ? sub(`and ${each.more_labels} more`) : null],
      lease(each, now),
      each.users ? h("b", {}, `${each.users}`) : "0",
      age(now - each.created_at),
    ],
  }));
  const heads = [["Region"], ["Length", "number"], ["Device"], ["Path"], ["State"], ["Owner"], ["Labels", "labels"], ["Lease"], ["Uses", "number"], ["Age", "number"]];
  fill(
    at("regions"),
    rows.length ? table("Regions", heads, rows) : empty("No region yet. ", code("peermemctl regions create --device DEVICE --length 64MiB --name NAME"), " makes one."),
    more(regions, "region"),
  );
}

function lease(each, now) {
  if (each.lease === "ttl") return `${age(each.expires_at - now)} left`;
  return each.lease === "session" ? "session" : "none";
}
