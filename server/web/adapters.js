// The Adapters tab: list, pin, load, remove and upload.
import { get, latest, send } from "./api.js";
import { bytes, emptying, headings, lay, make, refocus, row, search } from "./dom.js";

const $ = (id) => document.getElementById(id);
const ORDER = ["q", "k", "v", "o", "gate", "up", "down"];
let frame;
let drawn = "";
const sift = search($("adapter-search"), () => $("adapter-rows").rows);
const rows = new Map(); // name -> {node, shows}; see lay()

function button(label, name, said, does, className = "") {
  const b = make("button", { type: "button", textContent: label, className: `small ${className}` });
  b.ariaLabel = `${label} ${name}`;
  b.addEventListener("click", async () => {
    b.disabled = true;
    try {
      if (await does() === false) return;
      frame.notify(said);
      drawn = "";
      await frame.refresh();
      const next = $("adapter-rows").querySelector(`[aria-label="${CSS.escape(b.ariaLabel)}"]:enabled`)
        ?? $("adapter-rows").querySelector(`[aria-label$=" ${CSS.escape(name)}"]:enabled`) ?? $("adapters-title");
      refocus(b, next);
    } catch (error) {
      frame.showError(error);
    } finally {
      b.disabled = false;
      refocus(b);
    }
  });
  return b;
}

function targets(names) {
  const short = names.map((t) => t.replace("_proj", ""));
  return [...ORDER.filter((t) => short.includes(t)), ...short.filter((t) => !ORDER.includes(t))].join(" ");
}

// The first three names of a list.
function few(names) {
  return names.slice(0, 3).join(", ") + (names.length > 3 ? ` and ${names.length - 3} more` : "");
}

function described(adapter) {
  const { name } = adapter;
  const path = `/adapters/${encodeURIComponent(name)}`;
  const pin = adapter.pinned
    ? button("Unpin", name, `${name} may be evicted from memory.`, () => send("POST", `${path}/unpin`))
    : button("Pin", name, `${name} stays in memory.`, () => send("POST", `${path}/pin`));
  const load = button("Load", name, `${name} is in memory.`, () => send("POST", `${path}/prefetch`));
  load.disabled = adapter.tier !== "disk";
  const retire = button("Remove", name, `${name} is removed.`, async () => {
    if (!confirm(`Remove ${name}? Running requests finish; new ones get an error.`)) return false;
    return send("DELETE", path);
  }, "danger");
  const tier = make("span", { className: `tag ${adapter.tier}`, textContent: adapter.tier + (adapter.pinned ? ", pinned" : "") });
  const node = row(headings($("adapter-rows").parentNode), [
    [name], [make("code", { textContent: adapter.version.split("@")[1] })], [adapter.ranks.join(", ")], [targets(adapter.targets)],
    [bytes(adapter.bytes), "num"], [tier], [make("span", { className: "leases" }), "num"], [few(adapter.tasks)], [make("span", {}, pin, load, retire), "acts"],
  ]);
  node.dataset.foundBy = [name, adapter.tier, ...adapter.tasks].join(" ");
  return node;
}

// Leases change all the time, so they do not redraw the row.
function draw(adapters) {
  lay($("adapter-rows"), rows, adapters, (adapter) => ({ ...adapter, leases: null }), described);
  for (const { name, leases } of adapters) rows.get(name).node.querySelector(".leases").textContent = leases;
}

export function start(given) {
  frame = given;
  $("upload").addEventListener("submit", async (event) => {
    event.preventDefault();
    const submit = $("upload").querySelector("button");
    const form = new FormData();
    const empty = emptying($("upload"));
    form.append("name", $("upload-name").value);
    form.append("adapter_config.json", $("upload-config").files[0]);
    form.append("adapter_model.safetensors", $("upload-weights").files[0]);
    submit.disabled = true;
    submit.textContent = "Uploading…";
    try {
      const { version } = await send("POST", "/adapters", form);
      frame.notify(`${version} is served.`);
      empty();
      drawn = "";
      await frame.refresh();
    } catch (error) {
      frame.showError(error);
    } finally {
      submit.disabled = false;
      submit.textContent = "Upload";
      refocus(submit);
    }
  });
}

export const refresh = latest(() => Promise.all([get("/adapters"), get("/stats")]), show);

function show([{ adapters, rejected }, { adapters: room }]) {
  const now = JSON.stringify([adapters, rejected, room]);
  if (now === drawn) return; // keeps the focus of buttons
  drawn = now;
  const focused = document.activeElement?.ariaLabel;
  $("room").textContent = `${bytes(room.bytes)} of ${bytes(room.budget)} in memory. ` +
    `One more adapter takes about ${bytes(room.one_more)}, and ${room.more_fit.toLocaleString("en")} more fit.`;
  draw(adapters);
  sift();
  $("adapter-rows").parentNode.hidden = !adapters.length;
  $("no-adapters").hidden = adapters.length > 0;
  if (focused && document.activeElement?.ariaLabel !== focused) {
    $("adapter-rows").querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  }
  $("rejected").hidden = !rejected.length;
  const columns = headings($("rejected-rows").parentNode);
  $("rejected-rows").replaceChildren(...rejected.map((r) => row(columns, [
    [r.path], [r.reason], [new Date(r.since * 1000).toLocaleString()],
  ])));
}
