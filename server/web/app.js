// The page's frame: tabs, key, theme, status, and which part is refreshed when.
import { get, key } from "./api.js";
import * as adapters from "./adapters.js";
import * as jobs from "./jobs.js";
import * as live from "./live.js";
import * as playground from "./playground.js";
import * as tasks from "./tasks.js";

const parts = { playground, adapters, tasks, live, jobs };
const tabs = [...document.querySelectorAll('[role="tab"]')];
const alert = document.getElementById("alert");
const status = document.getElementById("status");

export function complain(error) {
  alert.textContent = error ? error.message : "";
  alert.hidden = !error;
}

export const current = () => tabs.find((t) => t.ariaSelected === "true").getAttribute("aria-controls");

async function show(name) {
  for (const tab of tabs) {
    const chosen = tab.getAttribute("aria-controls") === name;
    tab.ariaSelected = String(chosen);
    tab.tabIndex = chosen ? 0 : -1;
    document.getElementById(tab.getAttribute("aria-controls")).hidden = !chosen;
  }
  history.replaceState(null, "", `#${name}`);
  await refresh();
}

async function refresh() {
  try {
    await parts[current()].refresh();
    complain(null);
  } catch (error) {
    complain(error);
  }
}

tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => show(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(i + step + tabs.length) % tabs.length];
    next.focus();
    show(next.getAttribute("aria-controls"));
  });
});

const field = document.getElementById("key");
field.value = key.get();
field.addEventListener("change", () => { key.set(field.value.trim()); refresh(); });

const root = document.documentElement;
root.dataset.theme = localStorage.getItem("theme") ?? "";
document.getElementById("theme").addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = root.dataset.theme || (dark ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
  live.redraw();
});

async function beat() {
  try {
    const stats = await get("/stats");
    status.textContent = `${stats.base.name} · ${stats.base.kernels} · ${stats.engine.running} running, ${stats.engine.waiting} waiting`;
    status.dataset.ready = "";
    live.note(stats);
    if (["adapters", "tasks", "jobs"].includes(current())) await refresh();
  } catch (error) {
    delete status.dataset.ready;
    status.textContent = error.status ? error.message : "the server does not answer";
  }
}

for (const part of Object.values(parts)) part.start({ complain, refresh });
show(tabs.some((t) => `#${t.getAttribute("aria-controls")}` === location.hash) ? location.hash.slice(1) : "playground");
beat();
setInterval(() => { if (!document.hidden) beat(); }, 2000);
