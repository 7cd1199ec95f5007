// Talks to the server that this page came from. Knows the contract's one error shape and nothing of the page.

// What the contract's paths begin with: a proxy may have put all of them under a prefix.
export const home = new URL(".", document.baseURI).href.slice(0, -1);

export class Failure extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = error?.code ?? null;
  }
}

// What is kept for the next visit, or for this page alone where the browser keeps nothing: merely asking for a storage
// that is blocked throws.
function kept(storage, name) {
  let here = "";
  try {
    here = storage().getItem(name) ?? "";
  } catch { /* it is kept here */ }
  const set = (value) => {
    here = value;
    try {
      storage().setItem(name, value);
    } catch { /* the same */ }
  };
  return { get: () => here, set };
}

export const key = kept(() => sessionStorage, "key");
export const theme = kept(() => localStorage, "theme");

function headers(json) {
  const all = json ? { "content-type": "application/json" } : {};
  if (/[^\x20-\x7e]/.test(key.get())) throw new Failure(401, { message: "the key has characters that no key can have" });
  return key.get() ? { ...all, authorization: `Bearer ${key.get()}` } : all;
}

const silence = () => new Failure(0, { message: "the server does not answer", code: "silent" });
const PATIENCE = 10_000; // milliseconds: a server that hangs keeps its connections

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(home + path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw silence();
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw new Failure(answer.status, body?.error);
}

async function read(path, how) {
  const signal = AbortSignal.timeout(PATIENCE);
  try {
    return await how(await ask(path, { headers: headers(false), signal }));
  } catch (error) {
    throw signal.aborted || ["TimeoutError", "TypeError"].includes(error.name) ? silence() : error; // too late, or cut off
  }
}

const AT_ONCE = 5; // one of a browser's six connections to a server stays for what else is asked

// Asks of each, a few at a time, as each has its ten seconds from when it is asked. A failure is thrown once all have
// been asked; but where nobody answers the others would wait as long.
export async function inRounds(items, ask) {
  const settled = [];
  for (let i = 0; i < items.length && !settled.some((one) => one.reason?.status === 0); i += AT_ONCE) {
    settled.push(...await Promise.allSettled(items.slice(i, i + AT_ONCE).map(ask)));
  }
  const failed = settled.find((one) => one.status === "rejected");
  if (failed) throw failed.reason;
}

// Draws what `ask` brings, unless it is asked again meanwhile: then that is waited for, which is newer.
export function latest(ask, draw) {
  let last;
  return () => {
    const mine = ask().then((found) => (mine === last ? draw(found) : last));
    return (last = mine);
  };
}

export const get = (path) => read(path, (answer) => answer.json());
export const getText = (path) => read(path, (answer) => answer.text());

// A browser does not send a file that is another one than was chosen, and says of that only that nothing was sent.
async function unchanged(form) {
  for (const part of form.values()) {
    if (!(part instanceof File)) continue;
    await part.slice(0, 1).arrayBuffer().catch(() => {
      throw new Failure(0, { message: `${part.name} has changed since it was chosen; choose it again` });
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

// Yields each event of a streamed answer. Throws a Failure for an error before or within the stream.
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
    if (done) throw new Failure(0, { message: "the connection closed before the answer was whole" });
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
