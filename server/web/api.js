// HTTP client for the server of this page.

// Base URL of all paths: a proxy may add a prefix.
export const home = new URL(".", document.baseURI).href.slice(0, -1);

export class Failure extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = error?.code ?? null;
  }
}

// A stored value. Accessing blocked storage throws; the value is then kept for this page only.
function kept(storage, name) {
  let here = "";
  try {
    here = storage().getItem(name) ?? "";
  } catch { /* storage is blocked */ }
  const set = (value) => {
    here = value;
    try {
      storage().setItem(name, value);
    } catch { /* storage is blocked */ }
  };
  return { get: () => here, set };
}

export const key = kept(() => sessionStorage, "key");
export const theme = kept(() => localStorage, "theme");

function headers(json) {
  const all = json ? { "content-type": "application/json" } : {};
  if (/[^\x20-\x7e]/.test(key.get())) throw new Failure(401, { message: "the key contains invalid characters" });
  return key.get() ? { ...all, authorization: `Bearer ${key.get()}` } : all;
}

const noResponse = () => new Failure(0, { message: "the server does not respond", code: "silent" });
const TIMEOUT = 10_000; // milliseconds

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(home + path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw noResponse();
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw new Failure(answer.status, body?.error);
}

async function read(path, how) {
  const signal = AbortSignal.timeout(TIMEOUT);
  try {
    return await how(await ask(path, { headers: headers(false), signal }));
  } catch (error) {
    throw signal.aborted || ["TimeoutError", "TypeError"].includes(error.name) ? noResponse() : error; // timed out or disconnected
  }
}

const AT_ONCE = 5; // browsers open six connections to a server; keep one for other requests

// Call `ask` for each item, a few at a time. The first failure is thrown at the end; if the server does not respond, the
// rest is skipped.
export async function inRounds(items, ask) {
  const settled = [];
  for (let i = 0; i < items.length && !settled.some((one) => one.reason?.status === 0); i += AT_ONCE) {
    settled.push(...await Promise.allSettled(items.slice(i, i + AT_ONCE).map(ask)));
  }
  const failed = settled.find((one) => one.status === "rejected");
  if (failed) throw failed.reason;
}

// Draw the result of `ask`, unless it was called again in the meantime: then wait for the newer result.
export function latest(ask, draw) {
  let last;
  return () => {
    const mine = ask().then((found) => (mine === last ? draw(found) : last));
    return (last = mine);
  };
}

export const get = (path) => read(path, (answer) => answer.json());
export const getText = (path) => read(path, (answer) => answer.text());

// Browsers refuse to send a file that changed after it was chosen, without saying why. Check that first.
async function unchanged(form) {
  for (const part of form.values()) {
    if (!(part instanceof File)) continue;
    await part.slice(0, 1).arrayBuffer().catch(() => {
      throw new Failure(0, { message: `${part.name} has changed; choose it again` });
    });
  }
}

export async function send(method, path, body) {
  const form = body instanceof FormData;
  if (form) await unchanged(body);
  const answer = await ask(path, {
    method,
    headers: headers(!form && body !== undefined),
    body: form || body === undefined ? body : JSON.stringify(body),
  });
  return answer.status === 204 ? null : answer.json().catch(() => null);
}

// Yield each event of a streamed answer. Throws a Failure for an error before or within the stream.
export async function* stream(path, body, signal) {
  const answer = await ask(path, {
    method: "POST", headers: headers(true), body: JSON.stringify({ ...body, stream: true }), signal,
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new Failure(0, { message: "the connection closed before the answer was complete" });
    rest += value;
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Failure(answer.status, event.error);
      yield event;
    }
  }
}
