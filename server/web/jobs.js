// Training and evaluation jobs: progress, and the loss as it went.
/* global uPlot */
import { Failure, get } from "./api.js";

const list = document.getElementById("job-list");
let drawn = "";

export function start() {}

export function redraw() {
  drawn = "";
}

async function losses(id) {
  try {
    const { data } = await get(`/v1/fine_tuning/jobs/${encodeURIComponent(id)}/events?limit=1000`);
    return data.filter((e) => e.type === "metrics" && e.data?.train_loss != null)
      .map((e) => [e.data.step, e.data.train_loss]).sort((a, b) => a[0] - b[0]);
  } catch (error) {
    if (error instanceof Failure) return []; // an evaluation has no such events, and a key may not open them
    throw error;
  }
}

async function card(job) {
  const node = Object.assign(document.createElement("article"), { className: "job" });
  const title = Object.assign(document.createElement("h2"), { textContent: `${job.id} · ${job.kind ?? "job"} · ${job.status}` });
  const bar = Object.assign(document.createElement("progress"), { max: 1, value: job.progress ?? 0 });
  bar.setAttribute("aria-label", `Progress of ${job.id}`);
  node.append(title, bar);
  if (job.error) node.append(Object.assign(document.createElement("p"), { textContent: job.error.message ?? String(job.error) }));
  const points = await losses(job.id);
  if (points.length > 1) {
    const plot = document.createElement("div");
    node.append(plot);
    const style = getComputedStyle(document.documentElement);
    const axis = { stroke: style.getPropertyValue("--soft"), grid: { stroke: style.getPropertyValue("--line") } };
    new uPlot({ width: 640, height: 180, scales: { x: { time: false } }, axes: [axis, axis],
      series: [{ label: "step" }, { label: "training loss", stroke: "#3b82f6", width: 1.5 }] },
    [points.map((p) => p[0]), points.map((p) => p[1])], plot);
  }
  return node;
}

export async function refresh() {
  let jobs = [];
  try {
    ({ jobs } = await get("/jobs"));
  } catch (error) {
    if (!(error instanceof Failure) || error.status !== 404) throw error;
  }
  const now = JSON.stringify(jobs);
  if (now === drawn && list.childElementCount) return;
  drawn = now;
  const cards = await Promise.all(jobs.map(card));
  const none = Object.assign(document.createElement("p"), { className: "empty", textContent: "No job has been started. POST /v1/fine_tuning/jobs starts one." });
  list.replaceChildren(...(cards.length ? cards : [none]));
}
