// The adapters that are registered, what they cost, and what can be done with each.
import { get, send } from "./api.js";

const $ = (id) => document.getElementById(id);
let frame;
let drawn = "";

function cell(content, kind = "") {
  const td = document.createElement("td");
  td.className = kind;
  td.append(content);
  return td;
}

export function bytes(n) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (n < 1024 || unit === "GiB") return `${unit === "B" ? n : n.toFixed(1)} ${unit}`;
    n /= 1024;
  }
}

function button(label, name, does) {
  const b = Object.assign(document.createElement("button"), { type: "button", textContent: label });
  b.ariaLabel = `${label} ${name}`;
  b.addEventListener("click", async () => {
    b.disabled = true;
    try {
      await does();
      frame.complain(null);
      drawn = "";
      await frame.refresh();
      document.querySelector(`[aria-label="${CSS.escape(b.ariaLabel)}"]`)?.focus();
    } catch (error) {
      frame.complain(error);
    } finally {
      b.disabled = false;
    }
  });
  return b;
}

function tier(adapter) {
  return Object.assign(document.createElement("span"), {
    className: `tier ${adapter.tier}`, textContent: adapter.tier + (adapter.pinned ? ", pinned" : ""),
  });
}

function row(adapter) {
  const path = `/adapters/${encodeURIComponent(adapter.name)}`;
  const version = Object.assign(document.createElement("code"), { textContent: adapter.version.split("@")[1] });
  const does = document.createElement("td");
  does.append(
    adapter.pinned ? button("Unpin", adapter.name, () => send("POST", `${path}/unpin`)) : button("Pin", adapter.name, () => send("POST", `${path}/pin`)),
    button("Load", adapter.name, () => send("POST", `${path}/prefetch`)),
    button("Retire", adapter.name, async () => {
      if (confirm(`Retire ${adapter.name}? Running requests finish; new ones no longer find it.`)) await send("DELETE", path);
    }),
  );
  const tr = document.createElement("tr");
  tr.append(
    cell(adapter.name), cell(version), cell(adapter.ranks.join(", ")), cell(adapter.targets.map((t) => t.replace("_proj", "")).join(" ")),
    cell(bytes(adapter.bytes), "num"), cell(tier(adapter)),
    cell(String(adapter.leases), "num"), cell((adapter.tasks ?? []).join(", ")), does,
  );
  return tr;
}

export function start(given) {
  frame = given;
  $("upload").addEventListener("submit", async (event) => {
    event.preventDefault();
    const form = new FormData();
    form.append("name", $("upload-name").value);
    form.append("adapter_config.json", $("upload-config").files[0]);
    form.append("adapter_model.safetensors", $("upload-weights").files[0]);
    try {
      await send("POST", "/adapters", form);
      frame.complain(null);
      $("upload").reset();
      drawn = "";
      await frame.refresh();
    } catch (error) {
      frame.complain(error);
    }
  });
}

export async function refresh() {
  const { adapters, rejected } = await get("/adapters");
  const now = JSON.stringify([adapters, rejected]);
  if (now === drawn) return; // so that a button keeps its focus
  drawn = now;
  const focused = document.activeElement?.ariaLabel;
  $("adapter-rows").replaceChildren(...adapters.map(row));
  if (focused) $("adapter-rows").querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
  $("rejected").hidden = !rejected.length;
  $("rejected-rows").replaceChildren(...rejected.map((r) => {
    const tr = document.createElement("tr");
    const since = typeof r.since === "number" ? new Date(r.since * 1000).toLocaleString() : r.since;
    tr.append(cell(r.path), cell(r.reason), cell(since ?? ""));
    return tr;
  }));
}
