// Tabs, API key, theme, server status, and periodic refresh.
import { get, getText, key, theme } from "./api.js";
import * as adapters from "./adapters.js";
import * as jobs from "./jobs.js";
import * as live from "./live.js";
import * as playground from "./playground.js";
import * as tasks from "./tasks.js";

const parts = { playground, adapters, tasks, live, jobs };
const tabs = [...document.querySelectorAll('[role="tab"]')];
const alert = document.getElementById("alert");
const status = document.getElementById("status");
const field = document.getElementById("key");

// An error stays until it is closed or the next action succeeds. A successful poll clears only errors of polls.
let polled = false;

function showError(error, fromPoll = false) {
  if (!error && fromPoll && !polled) return;
  if ([401, 403].includes(error?.status)) document.getElementById("key-form").hidden = false;
  field.ariaInvalid = String(error?.status === 401);
  if (error && fromPoll && !polled && !alert.hidden) return;
  polled = Boolean(error) && (fromPoll || error.status === 401); // the next poll checks the key as well
  const text = error?.status === 401 && !key.get() ? "A key is needed: enter it in the Key field." : error?.message ?? "";
  // Do not repeat the same text every two seconds: screen readers announce each change.
  if (alert.firstElementChild.textContent !== text) alert.firstElementChild.textContent = text;
  alert.hidden = !error;
}

// Success messages disappear after a moment; screen readers announce them.
const notice = document.getElementById("notice");
let quiet;

function notify(text) {
  showError(null);
  notice.textContent = text;
  clearTimeout(quiet);
  quiet = setTimeout(() => { notice.textContent = ""; }, 4000);
}

alert.querySelector("button").addEventListener("click", () => {
  showError(null);
  document.getElementById("main").focus(); // the button is hidden now
});

const named = () => tabs.map((t) => t.getAttribute("aria-controls")).find((name) => location.hash === `#/${name}`);

const current = () => tabs.find((t) => t.ariaSelected === "true").getAttribute("aria-controls");

async function show(name) {
  for (const tab of tabs) {
    const chosen = tab.getAttribute("aria-controls") === name;
    tab.ariaSelected = String(chosen);
    tab.tabIndex = chosen ? 0 : -1;
    document.getElementById(tab.getAttribute("aria-controls")).hidden = !chosen;
    if (chosen) document.title = `${tab.textContent} · loramux`;
  }
  history.replaceState(null, "", `#/${name}`); // not an element id: the browser would move the focus
  parts[name].shown?.();
  await refresh();
}

let stale = false; // whether the last refresh failed

async function refresh() {
  const part = current();
  const failed = await parts[part].refresh().then(() => null, (error) => error);
  if (part !== current()) return; // another tab is shown by now
  stale = failed !== null;
  showError(failed, true);
}

tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => { location.hash = `#/${tab.getAttribute("aria-controls")}`; }); // adds a history entry
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = tabs[(to + tabs.length) % tabs.length];
    next.focus();
    show(next.getAttribute("aria-controls"));
  });
});

field.value = key.get();
document.getElementById("key-form").hidden = !key.get();
field.addEventListener("change", () => {
  key.set(field.value.trim());
  showError(null);
  if (!key.get()) return location.reload(); // removes everything that the key gave access to
  tasks.invalidate();
  refresh();
  poll();
});
document.getElementById("key-form").addEventListener("submit", (event) => event.preventDefault());

// A link cannot send the key, so /docs is fetched and shown in a dialog.
document.getElementById("docs").addEventListener("click", async (event) => {
  if (!key.get()) return;
  event.preventDefault();
  try {
    const text = (await getText("/docs")).replace(/<style>.*?<\/style>/s, ""); // the Content-Security-Policy refuses inline styles
    const page = new DOMParser().parseFromString(text, "text/html");
    const dialog = document.getElementById("api-page");
    for (const link of page.querySelectorAll("a")) link.replaceWith(...link.childNodes); // links cannot send the key either
    dialog.lastElementChild.replaceChildren(...page.querySelector("main").childNodes);
    dialog.showModal();
  } catch (error) {
    showError(error);
  }
});

// Accept a decimal comma: browsers may drop it, and 1,5 would become 15.
document.addEventListener("beforeinput", (event) => {
  if (event.target.step !== "any" || !event.data?.includes(",")) return;
  event.preventDefault();
  document.execCommand("insertText", false, event.data.replaceAll(",", "."));
});

const root = document.documentElement;
root.dataset.theme = theme.get();
document.getElementById("theme").addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = root.dataset.theme || (dark ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
  theme.set(root.dataset.theme);
  redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

function redraw() {
  live.redraw();
  jobs.redraw();
  refresh();
}

async function poll() {
  try {
    const stats = await get("/stats");
    const wasDown = status.dataset.ready === undefined;
    const failing = stats.engine.state === "failing" ? " · steps are failing, see the log" : "";
    status.textContent = `${stats.base.name} · ${stats.base.kernels} · ${stats.engine.running} running, ${stats.engine.waiting} waiting${failing}`;
    if (failing) delete status.dataset.ready;
    else status.dataset.ready = "";
    live.record(stats);
    if (!wasDown && !stale && !["adapters", "tasks", "jobs"].includes(current())) return;
    const refreshing = refresh();
    if (current() !== "tasks") await refreshing; // hundreds of tasks take a while; do not wait for them
  } catch (error) {
    delete status.dataset.ready;
    tasks.invalidate();
    status.textContent = { 0: "not connected", 401: key.get() ? "unknown key" : "no key", 503: "not ready" }[error.status] ?? error.message;
    showError(error, true);
  }
}

async function pollLoop() {
  if (!document.hidden) await poll();
  setTimeout(pollLoop, 2000);
}

for (const part of Object.values(parts)) part.start?.({ showError, notify, refresh });
addEventListener("hashchange", () => show(named() ?? current()));
show(named() ?? "playground");
pollLoop();
