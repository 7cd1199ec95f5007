// Elements and the looks that several parts share. Knows nothing of the server.

export function make(tag, given = {}, ...children) {
  const node = Object.assign(document.createElement(tag), given);
  node.append(...children);
  return node;
}

// Rows of a table that becomes a list on a narrow screen: the roles stay, and each cell carries its column's name.
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

// One node for each item, in order and in place: what has not changed keeps its focus, its selection and a click that
// has begun. `known` is the caller's Map of name -> node and what that shows; `shown` is what a node is drawn anew for.
export function lay(body, known, items, shown, draw) {
  const names = new Set(items.map((item) => item.name));
  for (const [name, { node }] of known) { // first, so that what stood behind it is in its place
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

// To where a form was sent from or a button pressed, or what stands there now, unless its user has gone on.
export function refocus(button, to = button) {
  if ([document.body, button].includes(document.activeElement)) to.focus();
}

const entered = (form) => [...form.elements].map((part) => part.files?.[0] ?? part.value);

// Called as a form is sent. What it answers empties the form, unless something in it has been changed since.
export function emptying(form) {
  const sent = entered(form);
  return () => {
    if (entered(form).every((value, i) => value === sent[i])) form.reset();
  };
}

// What a list of choices has: `none` first, if that may be chosen too. A choice that is gone stays chosen, and the server
// says so: nothing else may be taken in its place.
export function offer(select, names, none = null, chosen = select.value) {
  const choices = [...(none ? [["", none]] : []), ...names.map((name) => [name, name])];
  if (chosen && !names.includes(chosen)) choices.push([chosen, `${chosen} (gone)`]);
  if (JSON.stringify(choices) === JSON.stringify([...select.options].map((o) => [o.value, o.textContent]))) return;
  select.replaceChildren(...choices.map(([value, textContent]) => make("option", { value, textContent })));
  if (chosen) select.value = chosen;
}

const MANY = 8; // what one finds without searching

// A field to search a list that may have hundreds, by what each node's `data-found-by` says: what has not all of its words
// is hidden. Answers what is to be called when the list has changed.
export function search(field, nodes) {
  const label = field.closest("label");
  const none = make("p", { className: "empty", textContent: "Nothing here has that in it.", hidden: true, role: "status" });
  label.after(none);
  const sift = () => {
    const words = field.value.toLowerCase().split(/\s+/);
    const all = [...nodes()];
    for (const node of all) {
      const has = node.dataset.foundBy.toLowerCase();
      node.hidden = !words.every((word) => has.includes(word));
    }
    label.hidden = all.length < MANY && !field.value;
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
  return adapters.map((a) => (a.weight === 1 ? a.version : `${a.version} × ${a.weight}`)).join(" + ") || "the base alone";
}

// While nothing is pointed at, the legend tells the newest values.
export function newest(plot) {
  if (plot.cursor.left >= 0) return;
  const last = (values) => values.findLastIndex((v) => v != null);
  plot.setLegend({ idxs: plot.data.map(last) });
}

const short = (v) => v.toLocaleString("en", { maximumSignificantDigits: 3 });

// What every chart has in common: colours of the theme, times of day over a minute or more, whole numbers, no drawing
// under the pointer's y.
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
