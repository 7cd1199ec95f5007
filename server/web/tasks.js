// Tasks: where each goes, and how its versions do.
import { get, inRounds } from "./api.js";
import { lay, make, mixture, row, search } from "./dom.js";

const list = document.getElementById("task-list");
const COLUMNS = ["Version", "Requests", "Errors", "First token, ms", "Per token, ms", "Whole, ms", "Quality"];
const LATENCIES = COLUMNS.slice(3, 6);
const NUMBERS = COLUMNS.slice(1, 6);
const cards = new Map(); // name -> its card and what that shows
const known = new Map(); // name -> its figures, the last that came; null for a task that has gone since they were listed
let drawn = "";
let due = 0; // when all are asked for again
let failed = null; // what was wrong with the last time
let outlived = false; // whether the round that is under way began before what `anew` was told of
const sift = search(document.getElementById("task-search"), () => list.querySelectorAll(".task"));

function route({ best, metric, source, min_samples: least, choice }) {
  if (best) return `goes to the best of ${best.join(", ")}, by ${metric} from ${source}, after ${least} samples each`;
  return `goes to ${mixture(choice.map((c) => ({ ...c, version: c.name })))}`;
}

const ms = (seconds) => (seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0);
const latency = ({ p50, p95, p99 }) => (p50 == null ? "none" : [p50, p95, p99].map(ms).join(" / "));

// Scores go from 0 to 1, so that they can be drawn side by side; jobs tell these in units of their own.
const ON_A_SCALE = { loss: "1 − exp(−loss), less is better:", bleu: "bleu of each answer, of 1:", chrf: "chrf of each answer, of 1:" };

// The mean within its interval, drawn from 0 to 1 and said in words.
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

// The same version may have answered on several bases, and leads on the one that is served.
function standing(v, leader, base) {
  if (v.base !== base) return [" ", make("span", { className: "tag", textContent: "on another base" })];
  return v.version === leader ? [" ", make("span", { className: "tag succeeded", textContent: "leads" })] : [];
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
    [v.quality.length ? make("span", {}, ...v.quality.map(score)) : "not scored yet"],
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
  if (best) node.append(make("p", { className: "hint", textContent: `So far: ${best.reason}` }));
  const empty = versions ? "Nobody has asked yet. Requests and scores are listed here, by the version that answered." : "Its figures have not come.";
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

// After a restart, or with another key, what was told before says nothing.
export function anew() {
  due = 0;
  outlived = true;
}

async function look() {
  if (performance.now() < due) {
    if (failed) throw failed; // it still is
    return;
  }
  outlived = false;
  const [{ tasks: defined }, { base: { id } }] = await Promise.all([get("/tasks"), get("/stats")]);
  const names = defined.map((task) => task.name);
  for (const name of known.keys()) {
    if (!names.includes(name) || known.get(name) === null) known.delete(name);
  }
  failed = await inRounds(names, async (name) => { known.set(name, await performanceOf(name)); }).then(() => null, (error) => error);
  due = outlived ? 0 : performance.now() + 100 * names.length; // each is asked for by itself: of hundreds, less often
  show(defined.filter((task) => known.get(task.name) !== null), id);
  if (failed) throw failed;
}

function show(tasks, id) {
  const now = JSON.stringify([tasks, tasks.map((task) => known.get(task.name)), id]);
  if (now === drawn) return;
  drawn = now;
  const none = make("p", { className: "card empty", textContent: "No task yet. PUT /tasks/{name} defines one, or the task.json of an adapter's folder." });
  for (const said of list.querySelectorAll(":scope > .empty")) said.remove();
  lay(list, cards, tasks.map((task) => ({ ...task, known: known.get(task.name), id })), (task) => task, (task) => card(task, task.known, id));
  if (!tasks.length) list.append(none);
  sift();
}
