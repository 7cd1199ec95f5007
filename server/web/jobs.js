// The Jobs tab: progress, loss curves, actions, and the form that starts a training job.
/* global uPlot */
import { get, inRounds, latest, send } from "./api.js";
import { chart, emptying, make, mixture, newest, offer, refocus } from "./dom.js";

const $ = (id) => document.getElementById(id);
const list = $("job-list");
const cards = new Map(); // id -> Card; cards are kept, so that buttons keep their focus
let frame;

const TRAINING = (id) => `/v1/fine_tuning/jobs/${encodeURIComponent(id)}`;
const JOB = (id) => `/jobs/${encodeURIComponent(id)}`;
const RUNS = ["queued", "validating_files", "running"];
const CURVES = [["train_loss", "training loss", "--one"], ["valid_loss", "validation loss", "--two"]];
const MOST = 200; // the server lists this many jobs
const WORDS = { validating_files: "reading files" };
const BY_NAME = "same name as the adapter, if any"; // the server's default task
let offered = false; // whether the list of tasks is loaded

class Card {
  constructor(job) {
    this.node = make("article", { className: "job" });
    this.node.dataset.job = job.id;
    this.title = make("h2", { className: "titled", tabIndex: -1 }); // gets the focus when a button is removed
    this.bar = make("progress", { max: 1 });
    this.bar.setAttribute("aria-label", `Progress of ${job.name}`);
    this.text = make("p", { className: "hint" });
    this.wrong = make("p", { className: "wrong", hidden: true });
    this.does = make("div", { className: "row" });
    this.chart = make("div", { className: "chart" });
    this.chart.setAttribute("role", "img");
    this.chart.ariaLabel = `Losses of ${job.name} by step`;
    this.node.append(this.title, this.bar, this.text, this.wrong, this.does);
    if (job.kind === "training") this.node.append(this.chart);
    this.drawn = "";
    this.plot = null;
  }

  button(label, job, route) {
    const button = make("button", { type: "button", textContent: label });
    button.ariaLabel = `${label} ${job.name}`;
    button.addEventListener("click", async () => {
      button.disabled = true;
      try {
        await send("POST", route);
        frame.notify(`${label} ${job.name}: requested.`);
        await frame.refresh();
      } catch (error) {
        frame.showError(error);
      } finally {
        button.disabled = false;
        refocus(button, this.does.querySelector(`[aria-label="${CSS.escape(button.ariaLabel)}"]`) ?? this.title);
      }
    });
    return button;
  }

  show(job) {
    const status = job.pausing ? "pausing" : job.status;
    this.bar.value = job.progress;
    this.text.textContent = figures(job);
    this.wrong.hidden = !job.error;
    this.wrong.textContent = job.error?.message ?? "";
    if (this.status !== status) {
      this.status = status;
      const state = make("span", { className: `state tag ${status}`, textContent: WORDS[status] ?? status });
      this.title.replaceChildren(job.name, state, make("code", { textContent: `${job.kind} ${job.id}` }));
      const runs = RUNS.includes(status);
      const buttons = [];
      if (job.kind === "training") {
        if (runs) buttons.push(this.button("Pause", job, `${TRAINING(job.id)}/pause`));
        if (["pausing", "paused", "failed"].includes(status)) buttons.push(this.button("Resume", job, `${TRAINING(job.id)}/resume`));
      }
      const kept = status === "failed" && job.kind === "training"; // can be resumed until it is cancelled
      if (runs || kept || ["pausing", "paused"].includes(status)) buttons.push(this.button("Cancel", job, `${JOB(job.id)}/cancel`));
      const focused = this.does.contains(document.activeElement) && document.activeElement.ariaLabel;
      this.does.replaceChildren(...buttons);
      if (focused) (buttons.find((button) => button.ariaLabel === focused) ?? this.title).focus({ preventScroll: true });
      this.does.hidden = !buttons.length;
    }
  }

  async follow(job) {
    const now = JSON.stringify(job);
    if (now === this.drawn || job.kind !== "training" || !job.step) return;
    this.curves = (await get(JOB(job.id))).curves;
    if (!this.node.isConnected) return; // it was removed from the list
    this.draw(this.curves);
    this.drawn = now; // last, so that a failed request is repeated
  }

  draw(curves) {
    const shown = CURVES.filter(([name]) => curves[name].length);
    const points = Math.max(0, ...shown.map(([name]) => curves[name].length));
    if (points < 2) return;
    const data = uPlot.join(shown.map(([name]) => [curves[name].map((p) => p[0]), curves[name].map((p) => p[1])]));
    if (this.plot && this.shown === shown.length) {
      this.plot.setData(data);
      newest(this.plot);
      return;
    }
    this.clear();
    this.shown = shown.length;
    this.width = this.chart.clientWidth;
    const series = shown.map(([name, label, token]) => [label, token, { spanGaps: true, points: { show: name === "valid_loss", size: 6 } }]);
    this.plot = new uPlot(chart(this.chart, series, { time: false, digits: 4 }), data, this.chart);
  }

  clear() {
    this.plot?.destroy();
    this.plot = null;
    this.chart.replaceChildren();
  }

  // Draw again if the width has changed.
  fit() {
    if (this.plot && this.chart.clientWidth !== this.width) this.redraw();
  }

  // Draw again with new colours or a new width.
  redraw() {
    this.clear();
    if (this.curves) this.draw(this.curves);
  }
}

function figures(job) {
  const text = [];
  if (job.steps) text.push(`${job.step} of ${job.steps} ${job.kind === "training" ? "steps" : "examples"}`);
  if (job.loss != null) text.push(`loss ${job.loss.toFixed(4)}`);
  if (job.seconds > 0) text.push(`${(job.tokens / job.seconds).toFixed(0)} tokens/s`);
  const { evaluation, candidates, metric, version } = job.result;
  if (evaluation) {
    const before = evaluation.replaced == null ? "" : `, previous version ${evaluation.replaced.toFixed(4)}`;
    text.push(`${evaluation.metric} ${evaluation.score.toFixed(4)} of ${evaluation.samples}${before}`);
  }
  if (version) text.push(`published as ${version}`);
  else if (job.kind === "training" && job.status === "succeeded") text.push("not published");
  for (const one of candidates ?? []) {
    text.push(`${mixture(one.adapters)}: ${metric} ${one.score.toFixed(4)}`);
  }
  return text.join(" · ");
}

async function upload(file) {
  const form = new FormData();
  form.append("purpose", "fine-tune");
  form.append("file", file);
  return (await send("POST", "/v1/files", form)).id;
}

async function begin() {
  // Read the whole form first: the user may edit it during the upload.
  const body = {
    suffix: $("train-name").value,
    hyperparameters: { n_epochs: Number($("train-epochs").value) },
    lora: { r: Number($("train-rank").value), publish: $("train-publish").value },
  };
  if ($("train-task").value) body.lora.task = $("train-task").value;
  const chosen = [["training_file", "train-file"], ["validation_file", "train-validation"]]
    .flatMap(([field, input]) => [...$(input).files].map((file) => [field, file]));
  body.model = (await get("/stats")).base.name;
  const files = [];
  try {
    for (const [field, file] of chosen) {
      body[field] = await upload(file);
      files.push(body[field]);
    }
    await send("POST", "/v1/fine_tuning/jobs", body);
  } catch (error) { // delete the files of a refused job
    for (const id of files) await send("DELETE", `/v1/files/${encodeURIComponent(id)}`).catch(() => {});
    throw error;
  }
}

export function start(given) {
  frame = given;
  let still;
  addEventListener("resize", () => {
    clearTimeout(still);
    still = setTimeout(redraw, 200);
  });
  $("train-task").addEventListener("focus", () => {
    shown();
    frame.refresh();
  });
  $("train").addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = $("train").querySelector("button");
    const empty = emptying($("train"));
    button.disabled = true;
    try {
      await begin();
      frame.notify("The job is queued.");
      empty();
      await frame.refresh();
    } catch (error) {
      frame.showError(error);
    } finally {
      button.disabled = false;
      refocus(button);
    }
  });
}

export function redraw() {
  for (const card of cards.values()) card.redraw();
}

// Load the task names once, not every two seconds: definitions are long.
async function offerTasks() {
  if (offered) return;
  offer($("train-task"), (await get("/tasks")).tasks.map((task) => task.name), BY_NAME);
  offered = true;
}

// Load the tasks again when the tab is shown or the select gets the focus.
export function shown() {
  offered = false;
}

const look = latest(() => get("/jobs"), show);

// A failure to load the tasks does not hide the jobs.
export async function refresh() {
  const failed = (await Promise.allSettled([look(), offerTasks()])).find((one) => one.status === "rejected");
  if (failed) throw failed.reason;
}

async function show({ jobs }) {
  for (const [id, card] of cards) {
    if (!jobs.some((job) => job.id === id)) {
      card.node.remove();
      card.clear();
      cards.delete(id);
    }
  }
  jobs.forEach((job, place) => {
    if (!cards.has(job.id)) cards.set(job.id, new Card(job));
    const { node } = cards.get(job.id);
    if (list.children[place] !== node) list.insertBefore(node, list.children[place] ?? null);
  });
  list.querySelector(".empty")?.remove();
  if (jobs.length === MOST) list.append(make("p", { className: "card empty", textContent: `The newest ${MOST} jobs are shown; see GET /jobs/{id} for older ones.` }));
  if (!jobs.length) list.append(make("p", { className: "card empty", textContent: "No jobs yet. Training and evaluation jobs are shown here with their progress." }));
  for (const card of cards.values()) card.fit();
  for (const job of jobs) cards.get(job.id).show(job);
  await inRounds(jobs, (job) => cards.get(job.id)?.follow(job));
}
