// The Tasks tab: routes, and the performance of versions.
import { get, inRounds } from "./api.js";
import { lay, make, mixture, row, search } from "./dom.js";

const list = document.getElementById("task-list");
const COLUMNS = ["Version", "Requests", "Errors", "First token, ms", "Per token, ms", "Whole, ms", "Quality"];
const LATENCIES = COLUMNS.slice(3, 6);
const NUMBERS = COLUMNS.slice(1, 6);
const cards = new Map(); // name -> {node, shows}; see lay()
const known = new Map(); // name -> last performance; null if the task was deleted after it was listed
let drawn = "";
let due = 0; // time of the next requests
let failed = null; // the error of the last round
let outdated = false; // whether `invalidate` was called during the running round
const sift = search(document.getElementById("task-search"), () => list.querySelectorAll(".task"));

function route({ best, metric, source, min_samples: least, choice }) {
  if (best) return `routes to the best of ${best.join(", ")}, by ${metric} from ${source}, after ${least} samples each`;
  return `routes to ${mixture(choice.map((c) => ({ ...c, version: c.name })))}`;
}

const ms = (seconds) => (seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0);
const latency = ({ p50, p95, p99 }) => (p50 == null ? "none" : [p50, p95, p99].map(ms).join(" / "));

// Scores are shown from 0 to 1; jobs report these metrics in their own units.
const ON_A_SCALE = { loss: "1 − exp(−loss), less is better:", bleu: "bleu of each answer, of 1:", chrf: "chrf of each answer, of 1:" };

// The mean and its interval, as a bar from 0 to 1 and as text.
function score(q) {
  const range = make("i");
  range.style.left = `${q.low * 100}%`;
  range.style.right = `${(1 - q.high) * 100}%`;
  const mean = make("b");
  mean.style.left = `${q.mean * 100}%`;
  const bar = make("span", { className: "span" }, range, mean);
  bar.ariaHidden = "true";
  const words = `${ON_A_SCALE[q.metric] ?? q.metric} ${q.mean.toFixed(3)} (${q.low.toFixed(3)} to ${q.high.toFixed(3)}), ${q.samples.toLocaleString("en")} by ${q.source}`;
  return make("span", { className: "score" }, words, bar);
}

// A version may have records on several bases; the leader is that of the served base.
function standing(v, leader, base) {
  if (v.base !== base) return [" ", make("span", { className: "tag", textContent: "other base" })];
  return v.version === leader ? [" ", make("span", { className: "tag succeeded", textContent: "leader" })] : [];
}

function table(task, versions, leader, base) {
  const node = make("table", { className: "stacks" });
  node.setAttribute("role", "table");
  node.ariaLabel = `Versions of ${task.name}`;
  const head = make("tr");
  head.setAttribute("role", "row");
  for (const name of COLUMNS) {
    const th = make("th", { scope: "col", className: NUMBERS.includes(name) ? "num" : "", textContent: name });
    th.setAttribute("role", "columnheader");
    if (LATENCIES.includes(name)) th.append(make("small", { textContent: " p50 / p95 / p99" }));
    head.append(th);
  }
  node.createTHead().append(head);
  const labels = COLUMNS.map((name) => (LATENCIES.includes(name) ? `${name}, p50 / p95 / p99` : name));
  node.createTBody().append(...versions.map((v) => row(labels, [
    [make("span", {}, make("code", { textContent: mixture(v.adapters) }), ...standing(v, leader, base))],
    [v.requests.toLocaleString("en"), "num"], [v.errors.toLocaleString("en"), "num"],
    [latency(v.ttft), "num"], [latency(v.tpot), "num"], [latency(v.e2e), "num"],
    [v.quality.length ? make("span", {}, ...v.quality.map(score)) : "no scores"],
  ])));
  for (const part of [node.tHead, node.tBodies[0]]) part.setAttribute("role", "rowgroup");
  return node;
}

function card(task, { versions, best } = {}, base) {
  const title = make("div", { className: "titled" }, make("h2", { textContent: task.name }), make("small", { textContent: route(task.route) }));
  const node = make("article", { className: "card task" }, title);
  node.dataset.task = task.name;
  node.dataset.foundBy = [task.name, ...task.labels, route(task.route)].join(" ");
  const labels = task.labels.flatMap((label, i) => [i ? ", " : "Labels: ", make("bdi", { textContent: label })]);
  if (labels.length) node.append(make("p", { className: "hint" }, ...labels));
  if (best) node.append(make("p", { className: "hint", textContent: `Best route: ${best.reason}` }));
  const empty = versions ? "No requests yet. Requests and scores are listed here by adapter version." : "Figures not loaded yet.";
  node.append(versions?.length ? table(task, versions, best?.version, base) : make("p", { className: "empty", textContent: empty }));
  return node;
}

async function performanceOf(name) {
  try {
    return await get(`/tasks/${encodeURIComponent(name)}/performance`);
  } catch (error) {
    if (error.status !== 404) throw error;
    return null;
  }
}

let round = null;

export const refresh = () => (round ??= look().finally(() => { round = null; }));

// Discard the loaded figures, after a restart or a new key.
export function invalidate() {
  due = 0;
  outdated = true;
}

async function look() {
  if (performance.now() < due) {
    if (failed) throw failed; // until the next round
    return;
  }
  outdated = false;
  const [{ tasks: defined }, { base: { id } }] = await Promise.all([get("/tasks"), get("/stats")]);
  const names = defined.map((task) => task.name);
  for (const name of known.keys()) {
    if (!names.includes(name) || known.get(name) === null) known.delete(name);
  }
  failed = await inRounds(names, async (name) => { known.set(name, await performanceOf(name)); }).then(() => null, (error) => error);
  due = outdated ? 0 : performance.now() + 100 * names.length; // one request per task: less often with many tasks
  show(defined.filter((task) => known.get(task.name) !== null), id);
  if (failed) throw failed;
}

function show(tasks, id) {
  const now = JSON.stringify([tasks, tasks.map((task) => known.get(task.name)), id]);
  if (now === drawn) return;
  drawn = now;
  const none = make("p", { className: "card empty", textContent: "No tasks yet. Define one with PUT /tasks/{name} or a task.json in an adapter folder." });
  for (const said of list.querySelectorAll(":scope > .empty")) said.remove();
  lay(list, cards, tasks.map((task) => ({ ...task, known: known.get(task.name), id })), (task) => task, (task) => card(task, task.known, id));
  if (!tasks.length) list.append(none);
  sift();
}
