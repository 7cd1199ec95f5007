// The page's frame: tabs, key, theme, status, and which part is refreshed when.
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

// What failed stays until it is closed or the next action works; a poll that works takes only its own message away.
let polled = false;

function complain(error, fromPoll = false) {
  if (!error && fromPoll && !polled) return;
  if ([401, 403].includes(error?.status)) document.getElementById("key-form").hidden = false;
  field.ariaInvalid = String(error?.status === 401);
  if (error && fromPoll && !polled && !alert.hidden) return;
  polled = Boolean(error) && (fromPoll || error.status === 401); // whether a key is known, the next poll finds out too
  const told = error?.status === 401 && !key.get() ? "A key is needed: give it under Key." : error?.message ?? "";
  // The same words stay as they are: screen readers say what is put in, and a poll fails every two seconds.
  if (alert.firstElementChild.textContent !== told) alert.firstElementChild.textContent = told;
  alert.hidden = !error;
}

// What went well is said for a moment, to the eye and to screen readers.
const notice = document.getElementById("notice");
let quiet;

function say(text) {
  complain(null);
  notice.textContent = text;
  clearTimeout(quiet);
  quiet = setTimeout(() => { notice.textContent = ""; }, 4000);
}

alert.querySelector("button").addEventListener("click", () => {
  complain(null);
  document.getElementById("main").focus(); // the button is gone
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
  history.replaceState(null, "", `#/${name}`); // no id: the browser would move the focus there
  parts[name].shown?.();
  await refresh();
}

let stale = false; // whether what is shown could not be asked for

async function refresh() {
  const part = current();
  const failed = await parts[part].refresh().then(() => null, (error) => error);
  if (part !== current()) return; // which says nothing of what is shown now
  stale = failed !== null;
  complain(failed, true);
}

tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => { location.hash = `#/${tab.getAttribute("aria-controls")}`; }); // back leads back
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
  complain(null);
  if (!key.get()) return location.reload(); // nothing of what the key has shown stays
  tasks.anew();
  refresh();
  beat();
});
document.getElementById("key-form").addEventListener("submit", (event) => event.preventDefault());

// A link cannot carry the key, so with one the page of routes is fetched and shown here.
document.getElementById("docs").addEventListener("click", async (event) => {
  if (!key.get()) return;
  event.preventDefault();
  try {
    const text = (await getText("/docs")).replace(/<style>.*?<\/style>/s, ""); // which the policy of this page refuses
    const page = new DOMParser().parseFromString(text, "text/html");
    const dialog = document.getElementById("api-page");
    for (const link of page.querySelectorAll("a")) link.replaceWith(...link.childNodes); // nor can those in it
    dialog.lastElementChild.replaceChildren(...page.querySelector("main").childNodes);
    dialog.showModal();
  } catch (error) {
    complain(error);
  }
});

// A comma is a decimal point to many; a browser may drop it, and 1,5 would be 15.
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

async function beat() {
  try {
    const stats = await get("/stats");
    const woke = status.dataset.ready === undefined;
    const failing = stats.engine.state === "failing" ? " · steps fail, the log says why" : "";
    status.textContent = `${stats.base.name} · ${stats.base.kernels} · ${stats.engine.running} running, ${stats.engine.waiting} waiting${failing}`;
    if (failing) delete status.dataset.ready;
    else status.dataset.ready = "";
    live.note(stats);
    if (!woke && !stale && !["adapters", "tasks", "jobs"].includes(current())) return;
    const asked = refresh();
    if (current() !== "tasks") await asked; // of hundreds of these it takes a while, and all else goes on
  } catch (error) {
    delete status.dataset.ready;
    tasks.anew();
    status.textContent = { 0: "not connected", 401: key.get() ? "key not known" : "no key", 503: "not ready" }[error.status] ?? error.message;
    complain(error, true);
  }
}

async function beatOn() {
  if (!document.hidden) await beat();
  setTimeout(beatOn, 2000);
}

for (const part of Object.values(parts)) part.start?.({ complain, say, refresh });
addEventListener("hashchange", () => show(named() ?? current()));
show(named() ?? "playground");
beatOn();
