// Prompts, mixes and streamed answers, one or two side by side.
import { get, send, stream } from "./api.js";

const $ = (id) => document.getElementById(id);
let names = [];
let tasks = [];
let running = null;
let frame;

function option(value, text = value) {
  return Object.assign(document.createElement("option"), { value, textContent: text });
}

class Side {
  constructor() {
    this.node = $("side").content.firstElementChild.cloneNode(true);
    this.part = (name) => this.node.querySelector(`.${name}`);
    this.part("add").addEventListener("click", () => this.add());
    this.part("up").addEventListener("click", () => this.feedback(1));
    this.part("down").addEventListener("click", () => this.feedback(0));
    for (const button of this.node.querySelectorAll(".copy")) {
      button.addEventListener("click", () => this.copy(button));
    }
    this.fill();
  }

  fill() {
    const select = this.part("task");
    const chosen = select.value;
    select.replaceChildren(option("", "none (raw prompt)"), ...tasks.map((t) => option(t)));
    if (tasks.includes(chosen)) select.value = chosen;
    for (const member of this.members()) this.offer(member.querySelector("select"));
  }

  offer(select) {
    const chosen = select.value;
    select.replaceChildren(...names.map((n) => option(n)));
    if (names.includes(chosen)) select.value = chosen;
  }

  members() {
    return [...this.part("mix").children];
  }

  add() {
    const item = $("member").content.firstElementChild.cloneNode(true);
    const [select, range, number, remove] = item.children;
    this.offer(select);
    const taken = this.members().map((m) => m.children[0].value);
    select.value = names.find((n) => !taken.includes(n)) ?? names[0] ?? "";
    range.addEventListener("input", () => { number.value = range.value; });
    number.addEventListener("input", () => { range.value = number.value; });
    remove.addEventListener("click", () => item.remove());
    this.part("mix").append(item);
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

  async run(signal) {
    const answer = this.part("answer");
    const figures = this.part("figures");
    this.sent = { path: this.path(), body: this.body(), task: this.part("task").value };
    answer.textContent = "";
    answer.classList.remove("failed");
    figures.textContent = "";
    this.part("after").hidden = true;
    const start = performance.now();
    let first = null;
    try {
      for await (const event of stream(this.sent.path, this.sent.body, signal)) {
        if (event.text) {
          first ??= performance.now();
          answer.textContent += event.text;
        }
        if (event.finish_reason) this.finish(event, first === null ? null : first - start);
      }
    } catch (error) {
      if (error.name === "AbortError") {
        figures.textContent = "stopped";
      } else {
        answer.textContent = error.message;
        answer.classList.add("failed");
      }
    }
  }

  finish(event, first) {
    this.id = event.id;
    const timings = event.timings;
    const served = event.adapters.map((a) => `${a.version} × ${a.weight}`).join(" + ") || "the base alone";
    const ttft = timings.ttft_ms ?? first;
    this.part("figures").textContent =
      `first token ${ttft.toFixed(1)} ms · ${timings.tokens_per_second.toFixed(0)} tokens/s · ` +
      `${event.usage.completion_tokens} tokens (${event.finish_reason}) · ${served}`;
    this.part("after").hidden = false;
    for (const name of ["up", "down"]) {
      this.part(name).hidden = !this.sent.task;
      this.part(name).disabled = false;
    }
  }

  async feedback(score) {
    try {
      await send("POST", `/tasks/${encodeURIComponent(this.sent.task)}/feedback`, { id: this.id, score });
      this.part("up").disabled = score === 1;
      this.part("down").disabled = score === 0;
      frame.complain(null);
    } catch (error) {
      frame.complain(error);
    }
  }

  async copy(button) {
    const text = snippet(button.dataset.as, this.sent);
    await navigator.clipboard.writeText(text);
    const label = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = label; }, 1200);
  }
}

function snippet(kind, { path, body, task }) {
  const url = location.origin;
  const json = JSON.stringify(body);
  if (kind === "curl") {
    return `curl -s '${url}${path}' -H 'content-type: application/json' -d '${json.replaceAll("'", "'\\''")}'`;
  }
  // In Python, a JSON string is a string, and no number, list or object of this body reads differently.
  const literal = JSON.stringify(body, null, 4);
  if (kind === "python") {
    return `import httpx\n\nanswer = httpx.post("${url}${path}", json=${literal}, timeout=60)\nprint(answer.json()["text"])\n`;
  }
  const { prompt, adapters, ...rest } = body;
  const settings = Object.entries(rest).map(([k, v]) => `    ${k}=${JSON.stringify(v)},\n`).join("");
  const extra = adapters ? `    extra_body=${JSON.stringify({ adapters })},\n` : "";
  const call = task ? "chat.completions" : "completions";
  const input = task ? `    messages=[{"role": "user", "content": ${JSON.stringify(prompt)}}],\n` : `    prompt=${JSON.stringify(prompt)},\n`;
  const text = task ? "message.content" : "text";
  return `from openai import OpenAI\n\nclient = OpenAI(base_url="${url}/v1", api_key="none")\n` +
    `answer = client.${call}.create(\n    model=${JSON.stringify(task || "base")},\n${input}${settings}${extra})\nprint(answer.choices[0].${text})\n`;
}

const sides = [];

export function start(given) {
  frame = given;
  sides.push(new Side(), new Side());
  $("sides").append(sides[0].node);
  $("two").addEventListener("change", () => {
    if ($("two").checked) $("sides").append(sides[1].node);
    else sides[1].node.remove();
  });
  $("ask").addEventListener("submit", async (event) => {
    event.preventDefault();
    running = new AbortController();
    $("run").disabled = true;
    $("stop").disabled = false;
    const shown = $("two").checked ? sides : sides.slice(0, 1);
    await Promise.all(shown.map((side) => side.run(running.signal)));
    $("run").disabled = false;
    $("stop").disabled = true;
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
  });
}

export async function refresh() {
  const [known, defined] = await Promise.all([get("/adapters"), get("/tasks")]);
  names = known.adapters.map((a) => a.name);
  tasks = defined.tasks.map((t) => t.name);
  for (const side of sides) side.fill();
}
