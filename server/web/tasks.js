// Tasks with their routes, latency and quality by version.
import { Failure, get } from "./api.js";

const rows = document.getElementById("task-rows");

export function start() {}

function route(task) {
  const way = task.route ?? {};
  if (way.best) return `best of ${way.best.join(", ")} by ${way.metric}`;
  const choice = way.choice ?? [];
  return choice.map((c) => (c.weight === 1 ? c.name : `${c.name} × ${c.weight}`)).join(" + ") || "the base alone";
}

async function performance(name) {
  try {
    return await get(`/tasks/${encodeURIComponent(name)}/performance`);
  } catch (error) {
    if (error instanceof Failure && error.status === 404) return null;
    throw error;
  }
}

const ms = (seconds) => (seconds == null ? "" : `${(seconds * 1000).toFixed(0)} ms`);

function quality(version) {
  return (version.quality ?? []).map((q) => `${version.version}: ${q.metric} ${q.mean.toFixed(3)} ` +
    `[${q.low.toFixed(3)}, ${q.high.toFixed(3)}] of ${q.samples} (${q.source})`);
}

export async function refresh() {
  const [{ tasks }, stats] = await Promise.all([get("/tasks"), get("/stats")]);
  const known = await Promise.all(tasks.map((t) => performance(t.name)));
  rows.replaceChildren(...tasks.map((task, i) => {
    const counted = stats.tasks[task.name] ?? {};
    const versions = known[i]?.versions ?? [];
    const first = versions[0] ?? {};
    const tr = document.createElement("tr");
    const cells = [
      [task.name], [route(task)], [(task.labels ?? []).join(", ")], [String(counted.requests ?? 0), "num"],
      [String(counted.errors ?? 0), "num"], [ms(first.ttft?.p50 ?? counted.ttft_seconds), "num"],
      [ms(first.e2e?.p95), "num"], [versions.flatMap(quality).join("\n") || "no record yet"],
      [known[i]?.best ? `${known[i].best.name ?? known[i].best.version ?? ""} ${known[i].best.reason ?? ""}` : ""],
    ];
    for (const [text, kind] of cells) {
      tr.append(Object.assign(document.createElement("td"), { textContent: text, className: kind ?? "lines" }));
    }
    return tr;
  }));
}
