// DOM helpers and chart options shared by all tabs.

export function make(tag, given = {}, ...children) {
  const node = Object.assign(document.createElement(tag), given);
  node.append(...children);
  return node;
}

// A table row. On narrow screens rows become lists, so each cell carries the name of its column.
export function row(headings, cells) {
  const tr = make("tr");
  tr.setAttribute("role", "row");
  cells.forEach(([content, className = ""], i) => {
    const td = make("td", { className }, content);
    td.setAttribute("role", "cell");
    td.dataset.label = headings[i];
    tr.append(td);
  });
  return tr;
}

export function headings(table) {
  return [...table.tHead.rows[0].cells].map((th) => th.textContent.trim());
}

// Update the children of `body` to one node per item, in order. Unchanged items keep their nodes, and so their focus and
// selection. `known` is a Map of name -> {node, shows}; an item is drawn again when `shown(item)` changes.
export function lay(body, known, items, shown, draw) {
  const names = new Set(items.map((item) => item.name));
  for (const [name, { node }] of known) { // first, so that the nodes after it are in place
    if (names.has(name)) continue;
    node.remove();
    known.delete(name);
  }
  items.forEach((item, place) => {
    const shows = JSON.stringify(shown(item));
    if (known.get(item.name)?.shows !== shows) {
      known.get(item.name)?.node.remove();
      known.set(item.name, { node: draw(item), shows });
    }
    const { node } = known.get(item.name);
    if (body.children[place] !== node) body.insertBefore(node, body.children[place] ?? null);
  });
}

// Focus `to` after an action, unless the user has moved the focus elsewhere.
export function refocus(button, to = button) {
  if ([document.body, button].includes(document.activeElement)) to.focus();
}

const entered = (form) => [...form.elements].map((part) => part.files?.[0] ?? part.value);

// Call when a form is sent. The returned function resets the form, unless it was edited in the meantime.
export function emptying(form) {
  const sent = entered(form);
  return () => {
    if (entered(form).every((value, i) => value === sent[i])) form.reset();
  };
}

// Set the options of a select; `none` is the label of an empty first option. A selected value that no longer exists stays
// selected, so that nothing else is used instead.
export function offer(select, names, none = null, chosen = select.value) {
  const choices = [...(none ? [["", none]] : []), ...names.map((name) => [name, name])];
  if (chosen && !names.includes(chosen)) choices.push([chosen, `${chosen} (gone)`]);
  if (JSON.stringify(choices) === JSON.stringify([...select.options].map((o) => [o.value, o.textContent]))) return;
  select.replaceChildren(...choices.map(([value, textContent]) => make("option", { value, textContent })));
  if (chosen) select.value = chosen;
}

const SEARCH_FROM = 8; // items from which a list has a search field

// A search field for a list: hides nodes whose `data-found-by` lacks one of the words. Call the returned function when the
// list has changed.
export function search(field, nodes) {
  const label = field.closest("label");
  const none = make("p", { className: "empty", textContent: "No matches.", hidden: true, role: "status" });
  label.after(none);
  const sift = () => {
    const words = field.value.toLowerCase().split(/\s+/);
    const all = [...nodes()];
    for (const node of all) {
      const has = node.dataset.foundBy.toLowerCase();
      node.hidden = !words.every((word) => has.includes(word));
    }
    label.hidden = all.length < SEARCH_FROM && !field.value;
    none.hidden = !all.length || all.some((node) => !node.hidden);
  };
  field.addEventListener("input", sift);
  return sift;
}

export function tile(list, pairs) {
  list.replaceChildren(...pairs.map(([name, value]) => make("div", {},
    make("dt", { textContent: name }), make("dd", { textContent: String(value) }))));
}

export function bytes(n) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (n < 1024 || unit === "GiB") return `${unit === "B" ? n : n.toFixed(1)} ${unit}`;
    n /= 1024;
  }
}

export function mixture(adapters) {
  return adapters.map((a) => (a.weight === 1 ? a.version : `${a.version} × ${a.weight}`)).join(" + ") || "base only";
}

// Without a pointer on the chart, the legend shows the newest values.
export function newest(plot) {
  if (plot.cursor.left >= 0) return;
  const last = (values) => values.findLastIndex((v) => v != null);
  plot.setLegend({ idxs: plot.data.map(last) });
}

const short = (v) => v.toLocaleString("en", { maximumSignificantDigits: 3 });

// uPlot options shared by all charts: theme colours, a time axis of at least a minute, and an x cursor only.
export function chart(node, series, { time = true, top = null, round = false, digits = 0 } = {}) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const font = "12px system-ui, sans-serif";
  const axis = { stroke: colour("--soft"), font, grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
  const whole = [0, 1, 2, 3, 4, 5].flatMap((power) => [1, 2, 5].map((n) => n * 10 ** power));
  const clock = (u, at) => at.map((t) => new Date(t * 1000).toTimeString().slice(0, 8));
  return {
    hooks: { ready: [newest] },
    width: Math.max(260, node.clientWidth || 480), height: 190, cursor: { y: false }, legend: { live: true },
    axes: [{ ...axis, size: 26, ...(time ? { values: clock, space: 90 } : { incrs: whole }) },
      { ...axis, size: (_, shown) => Math.max(52, 14 + 7 * Math.max(0, ...(shown ?? []).map((v) => v.length))), incrs: round ? whole : undefined, values: time ? undefined : (_, at) => at.map(short) }],
    scales: {
      x: { time, ...(time ? { range: (_, low, high) => [Math.min(low, high - 60), high] } : {}) },
      y: { range: (_, low, high) => [0, top ?? (high > 0 && !time ? high * 1.1 : Math.max(high * 1.1, 1))] },
    },
    series: [
      time ? { label: "at", value: (_, t) => (t == null ? "" : new Date(t * 1000).toTimeString().slice(0, 8)) } : { label: "step" },
      ...series.map(([label, token, extra]) => ({
        label, stroke: colour(token), width: 2, points: { show: false },
        value: (_, v) => (v == null ? "" : v > 0 && v < 10 ** -digits && !time ? short(v) : v.toFixed(digits)), ...extra,
      })),
    ],
  };
}
