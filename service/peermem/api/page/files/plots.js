// The last minutes as plots, by uPlot (see uplot.LICENSE).

import { fill, h } from "./dom.js";
import { clock, rate, time } from "./words.js";

const HEIGHT = 168;
const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3]];
const BINARY = Array.from({ length: 50 }, (_, power) => 2 ** power);

const PLOTS = [
  {
    id: "bandwidth",
    words: (value) => rate(value ?? 0),
    least: 1 << 20,
    incrs: BINARY,
    pick: ({ bandwidth }) => Object.entries(bandwidth),
    names: ["local", "tcp", "verbs"],
    empty: "Nothing has moved in the last five minutes.",
  },
  {
    id: "latency",
    words: time,
    log: true,
    pick: ({ p50, p99 }) => [["p50", p50], ["p99", p99]],
    names: ["p50", "p99"],
    empty: "No transfer has succeeded in the last five minutes.",
  },
  {
    id: "ended",
    words: (value) => `${+(value ?? 0).toFixed(1)}/s`,
    least: 1,
    pick: ({ ended }) => Object.entries(ended),
    names: ["succeeded", "failed", "cancelled"],
    empty: "No transfer has ended in the last five minutes.",
  },
];

const drawn = new Map();

export function showPlots({ history, at }) {
  for (const plot of PLOTS) show(plot, history, at);
}

function show(plot, history, now) {
  const known = new Map(plot.pick(history));
  const columns = plot.names.map((name) => known.get(name) ?? history.at.map(() => (plot.log ? null : 0)));
  const data = [history.at, ...columns];
  let mine = drawn.get(plot.id);
  if (!mine) drawn.set(plot.id, (mine = make(plot)));
  mine.now = now;
  mine.span = history.step * 300;
  mine.data = data;
  mine.chart.setData(data);
  mine.host.classList.toggle("idle", columns.every((column) => column.every((value) => !value)));
  mine.host.setAttribute("aria-label", `${plot.id}: ${plot.names.map((name, index) => `${name} ${plot.words(columns[index].at(-1))}`).join(", ")}`);
  legend(plot, mine);
}

function legend(plot, mine) {
  const index = mine.chart.cursor.idx ?? mine.data[0].length - 1;
  const hovered = mine.chart.cursor.idx !== null && mine.chart.cursor.idx !== undefined;
  const item = (name, number) => h("span", { key: name, class: `item line-${number}` }, h("i", { "aria-hidden": "true" }), `${name} `, h("b", {}, plot.words(mine.data[number + 1][index])));
  fill(document.getElementById(`${plot.id}-legend`), plot.names.map(item), hovered ? h("span", { key: "when" }, clock(mine.data[0][index])) : null);
}

function make(plot) {
  const host = document.getElementById(plot.id);
  host.setAttribute("role", "img");
  host.dataset.empty = plot.empty;
  const mine = { host, now: 0, span: 300, data: [[]] };
  mine.chart = chart(plot, mine);
  new ResizeObserver(() => mine.chart.setSize({ width: host.clientWidth, height: HEIGHT })).observe(host);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    mine.chart.destroy();
    mine.chart = chart(plot, mine);
  });
  return mine;
}

function chart(plot, mine) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const font = `11px ${style.getPropertyValue("--sans")}`;
  const axis = { stroke: colour("--soft"), font, grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
  const series = plot.names.map((name, index) => ({
    label: name,
    stroke: colour(`--line-${index}`),
    fill: plot.id === "bandwidth" ? `${colour(`--line-${index}`)}22` : undefined,
    width: 1.5,
    dash: DASHES[index],
    points: { show: plot.log, size: 4 },
  }));
  const highest = (_, least, most) => [0, Math.max(plot.least, (most ?? 0) * 1.12)];
  return new uPlot(
    {
      width: mine.host.clientWidth || 300,
      height: HEIGHT,
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false }, points: { size: 5 } },
      scales: { x: { range: () => [mine.now - mine.span, mine.now] }, y: plot.log ? { distr: 3, range: decades } : { range: highest } },
      axes: [
        { ...axis, size: 24, space: 48, values: (_, splits) => splits.map(short) },
        { ...axis, size: 66, space: 34, incrs: plot.incrs, splits: plot.log ? powers : undefined, values: (_, splits) => splits.map((value) => (value === null ? "" : plot.words(value))) },
      ],
      series: [{}, ...series],
      hooks: { setCursor: [() => mine.chart && legend(plot, mine)] },
    },
    mine.data,
    mine.host,
  );
}

const short = (unix) => new Date(unix * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false });

const powers = (_, __, least, most) => {
  const first = Math.round(Math.log10(least));
  return Array.from({ length: Math.round(Math.log10(most)) - first + 1 }, (_, power) => 10 ** (first + power));
};

// Whole decades around what there is; some where there is nothing.
function decades(_, least, most) {
  if (!least || !most) return [1e-4, 1];
  return [10 ** Math.floor(Math.log10(least)), 10 ** Math.ceil(Math.log10(most) + 1e-9)];
}
