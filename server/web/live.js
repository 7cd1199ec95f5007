// Charts of the last minutes, from /stats, in the browser's memory alone.
/* global uPlot */

const KEEP = 300;
const history = [];
const charts = {};
let last = null;

const SHOWN = {
  tokens: [["generated", (n) => n.generated], ["prompt", (n) => n.prompt]],
  requests: [["running", (n) => n.running], ["waiting", (n) => n.waiting]],
  kv: [["in use", (n) => n.kv]],
  memory: [["base", (n) => n.base], ["KV cache", (n) => n.cache], ["adapters", (n) => n.adapters], ["process", (n) => n.process]],
};
const FIXED = { tokens: 0, requests: 0, kv: 3, memory: 0 };
const COLOURS = ["#3b82f6", "#f59e0b", "#10b981", "#a855f7"];

function totals(stats) {
  const all = Object.values(stats.tasks);
  const sum = (name) => all.reduce((n, t) => n + (t[name] ?? 0), 0);
  return { at: Date.now() / 1000, generated: sum("generated_tokens"), prompt: sum("prompt_tokens") };
}

export function note(stats) {
  const now = totals(stats);
  const seconds = last ? now.at - last.at : 0;
  const rate = (name) => (seconds ? Math.max(0, (now[name] - last[name]) / seconds) : 0);
  const blocks = stats.engine.kv_blocks;
  const mib = (n) => (n ?? 0) / 2 ** 20;
  history.push({
    at: now.at, generated: rate("generated"), prompt: rate("prompt"), running: stats.engine.running,
    waiting: stats.engine.waiting, kv: blocks.total ? blocks.used / blocks.total : 0, base: mib(stats.memory.base),
    cache: mib(stats.memory.kv_cache), adapters: mib(stats.memory.adapters), process: mib(stats.memory.process),
  });
  if (history.length > KEEP) history.shift();
  last = now;
  if (!document.getElementById("live").hidden) refresh();
}

function data(series) {
  return [history.map((n) => n.at), ...series.map(([, of]) => history.map(of))];
}

function make(name, series) {
  const style = getComputedStyle(document.documentElement);
  const line = { stroke: style.getPropertyValue("--line"), width: 1 };
  const axis = { stroke: style.getPropertyValue("--soft"), grid: line, ticks: line };
  const node = document.getElementById(`chart-${name}`);
  const options = {
    width: node.clientWidth || 480, height: 190, cursor: { y: false }, axes: [axis, { ...axis, size: 60 }],
    scales: { y: { range: (_, low, high) => [0, Math.max(high * 1.1, 1)] } },
    series: [{ value: "{HH}:{mm}:{ss}" }, ...series.map(([label], i) => ({
      label, stroke: COLOURS[i], width: 1.5, points: { show: false }, value: (_, v) => (v == null ? "" : v.toFixed(FIXED[name])),
    }))],
    legend: { live: true },
  };
  node.replaceChildren();
  charts[name] = new uPlot(options, data(series), node);
}

export function redraw() {
  for (const name of Object.keys(charts)) { charts[name].destroy(); delete charts[name]; }
  if (!document.getElementById("live").hidden) refresh();
}

export function start() {
  addEventListener("resize", redraw);
}

export async function refresh() {
  for (const [name, series] of Object.entries(SHOWN)) {
    if (charts[name]) charts[name].setData(data(series));
    else make(name, series);
  }
  const n = history.at(-1);
  if (!n) return;
  const rows = [["tokens a second", n.generated.toFixed(0)], ["running", n.running], ["waiting", n.waiting],
    ["of the KV cache", `${(n.kv * 100).toFixed(1)} %`], ["process memory", `${n.process.toFixed(0)} MiB`]];
  document.getElementById("live-now").replaceChildren(...rows.map(([name, value]) => {
    const tile = document.createElement("div");
    tile.append(Object.assign(document.createElement("dt"), { textContent: name }),
      Object.assign(document.createElement("dd"), { textContent: String(value) }));
    return tile;
  }));
}
