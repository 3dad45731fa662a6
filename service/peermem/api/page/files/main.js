// Asks for the document once a second, and has every part of the page show it.

import { fill, h } from "./dom.js";
import { showMachine } from "./machine.js";
import { showPlots } from "./plots.js";
import { showDevices, showHead, showNics, showNodes, showRegions, showTiles, showTransfers } from "./tables.js";
import { age, clock } from "./words.js";

const STEP = 1000;
const PATIENCE = 5000;
const STALE = 3000; // milliseconds without an answer after which what is shown is called old
const PARTS = [showHead, showTiles, showPlots, showTransfers, showNodes, showMachine, showDevices, showNics, showRegions];

let shown = null;
let shownAt = 0;
let problem = "";

async function ask() {
  const answer = await fetch("/page/facts.json", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
  if (!answer.ok) throw new Error((await answer.text()).slice(0, 300));
  return answer.json();
}

async function refresh() {
  try {
    const facts = await ask();
    problem = "";
    for (const show of PARTS) show(facts, shown);
    shown = facts;
    shownAt = performance.now();
    document.title = `${facts.node.name} · peermem`;
  } catch (error) {
    problem = error.name === "TimeoutError" ? "it takes too long" : error.message;
    if (error instanceof TypeError && error.message === "Failed to fetch") problem = "the connection failed";
    else if (!(error instanceof DOMException)) console.warn(error.message);
  }
  const quiet = performance.now() - shownAt;
  document.body.classList.toggle("stale", problem !== "" && quiet > STALE);
  fill(document.getElementById("banner"), banner(quiet));
}

function banner(quiet) {
  if (problem !== "" && quiet > STALE) {
    const since = shown === null ? "Nothing has been heard of it yet." : `What is shown is of ${clock(shown.at)}, ${age(quiet / 1000)} ago.`;
    return h("p", { class: "banner bad" }, h("strong", {}, "✕ The daemon does not answer"), `: ${problem}. ${since}`);
  }
  const node = shown?.node;
  return (node ? [...node.reasons.map((text) => ["bad", "✕ Not ready", text]), ...node.notes.map((text) => ["fair", "▲ Note", text])] : []).map(
    ([kind, word, text]) => h("p", { class: `banner ${kind}` }, h("strong", {}, word), `: ${text}`),
  );
}

async function run() {
  for (;;) {
    if (!document.hidden) await refresh();
    await new Promise((done) => {
      const timer = setTimeout(done, STEP);
      if (document.hidden) document.addEventListener("visibilitychange", () => (clearTimeout(timer), done()), { once: true });
    });
  }
}

run();
