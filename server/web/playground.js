// The Playground tab: prompts, mixes and streamed answers, one or two.
import { get, home, key, send, stream } from "./api.js";
import { make, mixture, offer, tile } from "./dom.js";

const $ = (id) => document.getElementById(id);
let names = [];
let tasks = [];
let base = ""; // model name of the base
let running = false;
let frame;

const MAX_TEMPLATE = 200; // shown characters of a template
const DEFAULT = "default"; // the task of requests without a task, if it is defined
const answering = ({ best, choice }) => {
  if (best) return `The best of ${best.join(", ")} answers`;
  if (!choice.length) return "The base answers";
  return choice.length > 1 ? `A mix of ${choice.map((part) => part.name).join(", ")} answers` : `The adapter ${choice[0].name} answers`;
};
const named = (name) => tasks.find((t) => t.name === (name || DEFAULT));

class Side {
  constructor(label) {
    this.node = $("side").content.firstElementChild.cloneNode(true);
    this.node.ariaLabel = label;
    this.part = (name) => this.node.querySelector(`.${name}`);
    this.part("add").addEventListener("click", () => {
      this.add();
      frame.refresh(); // adapters may have been published in the meantime
    });
    this.part("task").addEventListener("change", () => this.hint());
    this.part("up").addEventListener("click", () => this.feedback(1));
    this.part("down").addEventListener("click", () => this.feedback(0));
    for (const button of this.node.querySelectorAll(".copy")) {
      button.addEventListener("click", () => this.copy(button));
    }
    this.fill();
  }

  fill() {
    const select = this.part("task");
    const chosen = this.filled ? select.value : tasks[0]?.name; // at first, select the first task
    offer(select, tasks.map((t) => t.name), named("") ? "none (default answers)" : "none (raw prompt)", chosen);
    this.filled ||= Boolean(base);
    for (const member of this.members()) offer(member.querySelector("select"), names);
    this.part("add").disabled = !names.length;
    this.hint();
  }

  // Show what will answer, and the template of the task.
  hint() {
    const chosen = this.part("task").value;
    const task = named(chosen);
    const alone = task ? answering(task.route) : chosen ? "The task no longer exists" : "The base model continues the prompt";
    const who = this.members().length && (task || !chosen) ? "This mix answers" : alone;
    const whole = task?.prompt.replace("{input}", "").trim().replace(/\s+/g, " ") ?? "";
    const frame = whole.length > MAX_TEMPLATE ? `${whole.slice(0, MAX_TEMPLATE)}…` : whole;
    this.part("hint").replaceChildren(...(frame ? [`${who}: “`, make("bdi", { textContent: frame }), "”"] : [`${who}.`]));
  }

  members() {
    return [...this.part("mix").children];
  }

  add() {
    const item = $("member").content.firstElementChild.cloneNode(true);
    const label = () => {
      range.ariaLabel = `Weight of ${select.value}`;
      number.ariaLabel = `Weight of ${select.value} as a number`;
      remove.ariaLabel = `Remove ${select.value}`;
    };
    const [select, range, number, remove] = item.children;
    offer(select, names);
    const taken = this.members().map((m) => m.children[0].value);
    select.value = names.find((n) => !taken.includes(n)) ?? names[0] ?? "";
    label();
    select.addEventListener("change", label);
    range.addEventListener("input", () => { number.value = range.value; });
    number.addEventListener("input", () => { range.value = number.value; });
    remove.addEventListener("click", () => {
      item.remove();
      this.hint();
      this.part("add").focus();
    });
    this.part("mix").append(item);
    this.hint();
    select.focus();
  }

  path() {
    const task = this.part("task").value;
    return task ? `/generate?task=${encodeURIComponent(task)}` : "/generate";
  }

  body() {
    const body = {
      prompt: $("prompt").value,
      max_tokens: Number($("max-tokens").value),
      temperature: Number($("temperature").value),
    };
    const mix = this.members().map((m) => ({ name: m.children[0].value, weight: Number(m.children[2].value) }));
    if (mix.length) body.adapters = mix;
    return body;
  }

  async run() {
    this.asking = new AbortController();
    const { signal } = this.asking;
    const answer = this.part("answer");
    this.sent = { path: this.path(), body: this.body() };
    answer.textContent = "";
    answer.className = "answer";
    answer.ariaBusy = "true"; // screen readers announce the complete answer only
    this.figures([]);
    this.part("after").hidden = true;
    const start = performance.now();
    let first = null;
    let steps = 0;
    try {
      for await (const event of stream(this.sent.path, this.sent.body, signal)) {
        if (event.text) {
          first ??= performance.now();
          steps += 1;
          answer.append(event.text);
          const seconds = (performance.now() - first) / 1000;
          this.figures([["first token (measured here)", `${(first - start).toFixed(0)} ms`],
            ["steps per second", seconds > 0 && steps > 1 ? ((steps - 1) / seconds).toFixed(0) : "…"]]);
        }
        if (event.finish_reason) this.finish(event);
      }
      answer.classList.add("done");
    } catch (error) {
      if (error.name === "AbortError") {
        this.figures([["stopped after", `${((performance.now() - start) / 1000).toFixed(1)} s`]]);
      } else {
        answer.classList.add("failed");
        answer.append(`${answer.textContent ? "\n" : ""}${error.message}`);
        frame.showError(error, error.code === "silent"); // the answer shows the message too
      }
    } finally {
      answer.ariaBusy = "false";
    }
  }

  figures(pairs) {
    tile(this.part("figures"), pairs);
  }

  finish({ id, task, timings, usage, adapters, finish_reason: reason }) {
    this.id = id;
    this.sent.task = task;
    const ms = (value) => (value == null ? "none" : `${value.toFixed(1)} ms`);
    const cached = usage.cached_tokens ? `, ${usage.cached_tokens} cached` : "";
    this.figures([
      ["first token", ms(timings.ttft_ms)],
      ["tokens per second", timings.tokens_per_second?.toFixed(0) ?? "none"],
      ["total", ms(timings.total_ms)],
      ["tokens", `${usage.prompt_tokens}${cached} → ${usage.completion_tokens} (${reason})`],
      ["answered by", mixture(adapters)],
    ]);
    this.part("after").hidden = false;
    for (const name of ["up", "down"]) {
      this.part(name).hidden = !this.sent.task;
      this.part(name).ariaPressed = "false";
    }
  }

  async feedback(score) {
    const { id, sent } = this;
    try {
      await send("POST", `/tasks/${encodeURIComponent(sent.task)}/feedback`, { id, score });
      if (this.sent === sent) { // another answer may be shown by now
        this.part("up").ariaPressed = String(score === 1);
        this.part("down").ariaPressed = String(score === 0);
      }
      frame.notify(`Recorded as a ${score ? "good" : "bad"} answer of ${sent.task}.`);
    } catch (error) {
      frame.showError(error);
    }
  }

  async copy(button) {
    const text = snippet(button.dataset.as, this.sent);
    try {
      await write(text);
    } catch {
      frame.showError(new Error("the browser does not allow copying"));
      return;
    }
    frame.notify(`Copied as ${button.textContent}.`);
  }
}

// The clipboard API needs HTTPS or localhost; execCommand does not.
async function write(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = Object.assign(document.createElement("textarea"), { value: text });
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused.focus();
  if (!done) throw new Error("not copied");
}

function snippet(kind, { path, body, task }) {
  const json = JSON.stringify(body);
  if (kind === "curl") {
    const auth = key.get() ? ' -H "authorization: Bearer $API_KEY"' : "";
    return `curl -s '${home}${path}' -H 'content-type: application/json'${auth} -d '${json.replaceAll("'", "'\\''")}'`;
  }
  // The JSON of this body is also valid Python.
  const literal = JSON.stringify(body, null, 4);
  if (kind === "python") {
    const auth = key.get() ? ', headers={"authorization": f"Bearer {os.environ[\'API_KEY\']}"}' : "";
    return `${auth ? "import os\n\n" : ""}import httpx\n\nanswer = httpx.post("${home}${path}", json=${literal}${auth}, timeout=300)\nprint(answer.json()["text"])\n`;
  }
  const { prompt, adapters, ...rest } = body;
  const settings = Object.entries(rest).map(([k, v]) => `    ${k}=${JSON.stringify(v)},\n`).join("");
  const extra = adapters ? `    extra_body=${JSON.stringify({ adapters })},\n` : "";
  const call = task ? "chat.completions" : "completions";
  const input = task ? `    messages=[{"role": "user", "content": ${JSON.stringify(prompt)}}],\n` : `    prompt=${JSON.stringify(prompt)},\n`;
  const text = task ? "message.content" : "text";
  const secret = key.get() ? 'os.environ["API_KEY"]' : '"none"';
  return `${key.get() ? "import os\n\n" : ""}from openai import OpenAI\n\nclient = OpenAI(base_url="${home}/v1", api_key=${secret})\n` +
    `answer = client.${call}.create(\n    model=${JSON.stringify(task || base)},\n${input}${settings}${extra})\nprint(answer.choices[0].${text})\n`;
}

// Disable one button and enable the other. The focus moves along.
function turn(out, on) {
  const focused = document.activeElement === out;
  on.disabled = false;
  out.disabled = true;
  if (focused) on.focus({ preventScroll: true });
}

const sides = [];

// Removing the second side aborts its request.
function shown() {
  if ($("two").checked) return $("sides").append(sides[1].node);
  sides[1].asking?.abort();
  sides[1].node.remove();
}

export function start(given) {
  frame = given;
  sides.push(new Side("First answer"), new Side("Second answer"));
  $("sides").append(sides[0].node);
  $("two").addEventListener("change", shown);
  addEventListener("pageshow", shown); // browsers restore the checkbox when going back
  $("ask").addEventListener("submit", async (event) => {
    event.preventDefault();
    if ($("run").disabled) return; // Ctrl+Enter submits even if the button is disabled
    running = true;
    turn($("run"), $("stop"));
    frame.showError(null);
    await Promise.all(sides.filter((side) => side.node.isConnected).map((side) => side.run()));
    running = false;
    turn($("stop"), $("run"));
    frame.refresh();
  });
  $("stop").addEventListener("click", () => sides.forEach((side) => side.asking?.abort()));
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
  });
}

export async function refresh() {
  const [known, defined, stats] = await Promise.all([get("/adapters"), get("/tasks"), get("/stats")]);
  base = stats.base.name;
  names = known.adapters.map((a) => a.name);
  tasks = defined.tasks;
  for (const side of sides) side.fill();
  if (!running) $("run").disabled = false; // enabled once tasks and adapters are known
}
