// Charts of the last ten minutes, from /stats. They are kept in memory only.
/* global uPlot */
import { chart, newest, tile } from "./dom.js";

const KEEP = 600; // seconds
const GAP = 10;
const history = [];
const charts = {};
let last = null;

const SERIES = {
  tokens: [["generated", "--one", (n) => n.generated], ["prompt", "--two", (n) => n.prompt]],
  requests: [["running", "--one", (n) => n.running], ["waiting", "--two", (n) => n.waiting]],
  kv: [["in use", "--one", (n) => n.kv]],
  memory: [["process", "--four", (n) => n.process], ["base", "--one", (n) => n.base], ["KV cache", "--two", (n) => n.cache],
    ["adapters", "--three", (n) => n.adapters]],
};
const OPTIONS = { tokens: {}, requests: { round: true }, kv: { top: 100, digits: 1 }, memory: {} };

export function record(stats) {
  // Engine counters grow with each step; the counters of tasks grow only when answers end.
  const now = { at: Date.now() / 1000, generated: stats.engine.generated, prompt: stats.engine.prompt };
  const seconds = last ? now.at - last.at : 0;
  // After a gap (hidden page, server down) there is no rate. A counter that decreased belongs to a restarted server.
  const seen = seconds > 0 && seconds <= GAP;
  const rate = (name) => (seen && now[name] >= last[name] ? (now[name] - last[name]) / seconds : null);
  const blocks = stats.engine.kv_blocks;
  const mib = (n) => (n ?? 0) / 2 ** 20;
  if (seconds < 0) history.length = 0; // the clock was changed
  if (seconds > GAP) history.push({ at: last.at + 1 });
  history.push({
    at: now.at, generated: rate("generated"), prompt: rate("prompt"), running: stats.engine.running,
    waiting: stats.engine.waiting, kv: blocks.total ? (blocks.used / blocks.total) * 100 : 0, base: mib(stats.memory.base),
    cache: mib(stats.memory.kv_cache), adapters: mib(stats.memory.adapters), process: mib(stats.memory.process),
  });
  while (history[0].at < now.at - KEEP) history.shift();
  last = now;
  if (!document.getElementById("live").hidden) refresh();
}

function data(series) {
  return [history.map((n) => n.at), ...series.map(([, , of]) => history.map((n) => of(n) ?? null))];
}

const shown = (value, digits = 0) => value?.toFixed(digits) ?? "…";

export function redraw() {
  const part = document.getElementById("live");
  part.style.minHeight = `${part.offsetHeight}px`; // keeps the scroll position while charts are replaced
  for (const name of Object.keys(charts)) { charts[name].destroy(); delete charts[name]; }
  if (!part.hidden) refresh();
  part.style.minHeight = "";
}

export function start() {
  addEventListener("resize", redraw);
}

export async function refresh() {
  const n = history.at(-1);
  if (!n) return;
  // uPlot needs two points for a time axis.
  for (const [name, series] of history.length > 1 ? Object.entries(SERIES) : []) {
    const node = document.getElementById(`chart-${name}`);
    if (charts[name]) charts[name].setData(data(series));
    else charts[name] = new uPlot(chart(node, series.map(([label, token]) => [label, token]), OPTIONS[name]), data(series), node);
    newest(charts[name]);
    node.ariaLabel = series.map(([label, , of]) => `${label} ${shown(of(n), OPTIONS[name].digits)}`).join(", ");
  }
  tile(document.getElementById("live-now"), [["tokens per second", shown(n.generated)], ["running", n.running], ["waiting", n.waiting],
    ["of the KV cache", `${n.kv.toFixed(1)} %`], ["process memory", `${n.process.toFixed(0)} MiB`]]);
}
