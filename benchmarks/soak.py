"""Soak: many clients on many adapters while adapters come and go, for minutes; every answer is held to its solo answer.

A server of its own, with slots for 8 adapters and RAM for 12, serves 40. Clients ask for mixes of up to four, plain
and streaming, through /generate, /classify and /v1; some go away early, some send what is malformed. Meanwhile
adapters are published again, rolled back and retired. Afterwards a second server without a prefix cache answers each
distinct request alone, and the answers must be equal, character for character: the native kernels are bit-equal in
any batch, and others part only where two tokens are nearly as likely.

A machine that stops for a while (SIGSTOP, a hypervisor) is no hang: the soak's own clock stands still with it.

Run it as `python -m benchmarks.soak --minutes 30`. Exit status 1 means that something that had to hold did not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from adapters.peft_format import read_folder
from benchmarks.counted import TOLD
from benchmarks.embedded_server import REPO, ServerProcess, serving
from benchmarks.pauses import BEAT, Clock
from benchmarks.synthetic import write_adapter
from server.kernels import choose

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
CLIENTS, STEADY, CHURNED, CONTENTS = 32, 32, 8, 3
"""32 adapters that stay, and 8 names that move among 3 contents each."""
SLOTS, IN_RAM, MAX_MIX = 8, 12, 4
RANK, NEW_TOKENS = 16, 12
HANG = 180.0
"""Seconds after which a request counts as hanging."""
PATIENCE = 1800.0
"""Seconds for what changes adapters, and for what is asked before and after: longer than a machine may stand still."""
KV_CACHE = 192
"""MiB, unless a shorter run asks for less."""
FILLED_BY = 4 / 3
"""Prompts of 100 tokens and more for each MiB of that, which touch every block, in two calls of /v1/completions."""
MB_AN_HOUR = 10.0
SHAPES = {
    f"model.layers.{layer}.self_attn.{name}": shape
    for layer in range(30)
    for name, shape in {"q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576), "o_proj": (576, 576)}.items()
}
"""Of the embedded base, SmolLM2-135M."""
PROMPTS = (
    "The lighthouse keeper wrote in his log:", "Two plus three is", "A short list of fruits:\n-", "def mean(values):",
    "Dear Anna,\nthank you for", "The capital of France", "In the year 1911 a ship", "Translate: good morning",
    "Once upon a time", "The soup was cold, and the waiter",
)  # fmt: skip
WEIGHTS = (1.0, 0.5, 0.25, -0.5, 0.75)

Mix = tuple[tuple[str, float], ...]
Key = tuple[str, str, Mix, int]
"""Route, prompt, mix by version, seed (0 is greedy)."""


@dataclass
class Report:
    """What a soak came to. `wrong` lists what had to hold and did not."""

    seconds: float = 0.0
    paused: float = 0.0
    """Seconds for which the machine stood still, which are not among those above."""
    calls: Counter[str] = field(default_factory=Counter)
    distinct: int = 0
    alone: int = 0
    """Distinct requests that were asked again, alone."""
    compared: int = 0
    megabytes_an_hour: float = 0.0
    resident: tuple[int, int] = (0, 0)
    minutes: list[float] = field(default_factory=list)
    """Megabytes in memory by the minute: the median of each."""
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "calls": dict(sorted(self.calls.items()))}


MALFORMED: tuple[tuple[str, Any, int], ...] = (
    ("/generate", b"{", 422),
    ("/generate", {"prompt": "x", "nonsense": 1}, 422),
    ("/generate?task=nowhere", {"prompt": "x"}, 404),
    ("/generate", {"prompt": "x", "adapters": [{"name": "nobody"}]}, 404),
    ("/generate", {"prompt": "x", "adapters": [{"name": "a0", "weight": 1e308}]}, 422),
    ("/generate", b'{"prompt": "x", "adapters": [{"name": "a0", "weight": NaN}]}', 422),
    ("/generate", {"prompt": "x", "adapters": [{"name": "a0"}, {"name": "a0"}]}, 400),
    ("/generate", {"prompt": "x", "max_tokens": 100_000}, 400),
    ("/generate", {"prompt": "word " * 20_000}, 400),
    ("/v1/completions", {"model": "a0", "prompt": "x", "n": 1_000_000}, 400),
    ("/v1/chat/completions", {"model": "a0", "messages": []}, 400),
    ("/adapters", {"name": "a,b", "source": "a0"}, 422),
    ("/adapters", {"name": "x", "source": "../../etc"}, 400),
)


class Soak:
    """One run: its dice, its clients, and all that they saw."""

    def __init__(self, server: ServerProcess, contents: dict[str, list[Path]], kv_cache: int, seed: int = 1) -> None:
        self.server, self.contents, self.kv_cache, self.dice = server, contents, kv_cache, random.Random(seed)
        self.report = Report()
        self.clock = Clock()
        self.seen: dict[Key, str] = {}
        self.versions: dict[str, Path] = {}
        """Folder of each digest that people see."""
        self.moving: Counter[str] = Counter()
        """Names of which requests may be told that they are unknown: they are being retired, or just were."""
        dice = random.Random(2)
        names = list(contents)
        self.choices = [
            [(n, dice.choice(WEIGHTS)) for n in dice.sample(names, dice.choice((0, 1, 1, 2, 3, MAX_MIX)))]
            for _ in range(40)
        ]

    def problem(self, text: str) -> None:
        if len(self.report.wrong) < 20:
            self.report.wrong.append(text[:400])

    async def publish(self, http: httpx.AsyncClient, name: str, folder: Path, method: str) -> str:
        """Upload a content under a name; answers its version."""
        files = {n: (folder / n).read_bytes() for n in (CONFIG, TENSORS)}
        path, data = ("/adapters", {"name": name}) if method == "POST" else (f"/adapters/{name}", {})
        answer = await http.request(method, path, files=files, data=data)
        if answer.status_code not in (200, 201):
            raise RuntimeError(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
        version = str(answer.json()["version"])
        self.versions[version.partition("@")[2]] = folder
        return version

    async def client(self, until: float) -> None:
        async with httpx.AsyncClient(base_url=self.server.url, timeout=HANG) as http:
            while self.clock.now() < until:
                paused = self.clock.paused
                kind = self.dice.choices(("plain", "stream", "chat", "sampled", "gone", "malformed", "classify"),
                                         (40, 20, 8, 8, 10, 8, 6))[0]  # fmt: skip
                self.report.calls[kind] += 1
                try:
                    await getattr(self, f"_{kind}")(http)
                except httpx.TimeoutException:
                    await asyncio.sleep(2 * BEAT)  # the clock is told of a pause by its next beat
                    if self.clock.paused == paused:
                        self.problem(f"{kind}: no answer within {HANG} s")
                    self.report.calls["cut by a pause"] += self.clock.paused != paused
                except httpx.HTTPError as error:
                    self.problem(f"{kind}: {type(error).__name__} {error}")

    def _body(self) -> tuple[str, dict[str, Any]]:
        prompt, choice = self.dice.choice(PROMPTS), self.dice.choice(self.choices)
        adapters = [{"name": n, "weight": w} for n, w in choice]
        return prompt, {"prompt": prompt, "max_tokens": NEW_TOKENS, "adapters": adapters}

    def _keep(self, route: str, prompt: str, adapters: Sequence[dict[str, Any]], seed: int, text: str) -> None:
        mix = tuple((a["version"].partition("@")[2], a["weight"]) for a in adapters)
        key = (route, prompt, mix, seed)
        self.report.compared += 1
        if self.seen.setdefault(key, text) != text:
            self.problem(f"two answers to one request: {key}: {self.seen[key]!r} and {text!r}")

    def _failed(self, status: int, text: str, body: dict[str, Any]) -> None:
        gone = status == 404 and any(self.moving[a["name"]] for a in body.get("adapters", ()))
        if gone:
            self.report.calls["404 of a retired name"] += 1
        else:
            self.problem(f"{status}: {text}")

    async def _plain(self, http: httpx.AsyncClient, drawn: int = 0, /, **more: Any) -> None:
        prompt, body = self._body()
        answer = await http.post("/generate", json={**body, **more})
        if answer.status_code != 200:
            self._failed(answer.status_code, answer.text, body)
            return
        told = answer.json()
        self._keep("/generate", prompt, told["adapters"], drawn, told["text"])

    async def _sampled(self, http: httpx.AsyncClient) -> None:
        seed = self.dice.randrange(1, 4)
        await self._plain(http, seed, seed=seed, temperature=0.9, top_p=0.95)

    async def _stream(self, http: httpx.AsyncClient) -> None:
        prompt, body = self._body()
        text: list[str] = []
        last: dict[str, Any] = {}
        async with http.stream("POST", "/generate", json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                self._failed(answer.status_code, (await answer.aread()).decode(), body)
                return
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        self.problem(f"in a stream: {event}")
                        return
                    text.append(event.get("text", "") if "usage" not in event else "")
                    last = event
        self._keep("/generate", prompt, last["adapters"], 0, "".join(text))

    async def _chat(self, http: httpx.AsyncClient) -> None:
        prompt, body = self._body()
        name = self.dice.choice([n for n in self.contents if n.startswith("a")])
        asked = {"model": name, "messages": [{"role": "user", "content": prompt}], "max_tokens": NEW_TOKENS}
        answer = await http.post("/v1/chat/completions", json={**asked, "temperature": 0})
        if answer.status_code != 200:
            self._failed(answer.status_code, answer.text, body)
            return
        digest = next(d for d, folder in self.versions.items() if folder == self.contents[name][0])
        text = answer.json()["choices"][0]["message"]["content"]
        self._keep("/v1/chat/completions", prompt, [{"version": f"@{digest}", "weight": 1.0}], 0, text)

    async def _classify(self, http: httpx.AsyncClient) -> None:
        prompt, body = self._body()
        asked = {"prompt": prompt, "labels": [" yes", " no", " not sure"], "adapters": body["adapters"]}
        answer = await http.post("/classify", json=asked)
        if answer.status_code != 200:
            self._failed(answer.status_code, answer.text, body)
            return
        told = answer.json()
        self._keep("/classify", prompt, told["adapters"], 0, json.dumps(told["scores"], sort_keys=True))

    async def _gone(self, http: httpx.AsyncClient) -> None:
        """A client that leaves: while it waits, or after a few events."""
        _, body = self._body()
        body["max_tokens"] = 400
        if self.dice.random() < 0.5:
            with contextlib.suppress(httpx.TimeoutException):
                await http.post("/generate", json=body, timeout=self.dice.uniform(0.001, 0.5))
            return
        async with http.stream("POST", "/generate", json={**body, "stream": True}) as answer:
            left = self.dice.randrange(1, 6)
            async for _ in answer.aiter_lines():
                left -= 1
                if not left:
                    break

    async def _malformed(self, http: httpx.AsyncClient) -> None:
        path, body, status = self.dice.choice(MALFORMED)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await http.post(path, content=content, headers={"content-type": "application/json"})
        if answer.status_code != status or set(answer.json()) != {"error"}:
            self.problem(f"{path} {content[:80]!r}: {answer.status_code}, not {status}: {answer.text}")

    async def change(self, until: float) -> None:
        """Publish, roll back, retire and register again, one after the other."""
        names = [n for n in self.contents if n.startswith("c")]
        current: dict[str, list[str]] = {}
        async with httpx.AsyncClient(base_url=self.server.url, timeout=PATIENCE) as http:
            while self.clock.now() < until:
                name = self.dice.choice(names)
                act = self.dice.choices(("publish", "roll back", "retire"), (5, 3, 2))[0]
                self.report.calls[act] += 1
                if act == "publish":
                    version = await self.publish(http, name, self.dice.choice(self.contents[name]), "PUT")
                    current.setdefault(name, []).append(version)
                elif act == "roll back" and current.get(name):
                    version = self.dice.choice(current[name][-2:])
                    answer = await http.put(f"/adapters/{name}", json={"version": version})
                    if answer.status_code != 200:
                        self.problem(f"roll back to {version}: {answer.status_code} {answer.text}")
                elif act == "retire":
                    self.moving[name] += 1
                    answer = await http.delete(f"/adapters/{name}")
                    if answer.status_code != 202:
                        self.problem(f"retire {name}: {answer.status_code} {answer.text}")
                    current[name] = [await self.publish(http, name, self.contents[name][0], "POST")]
                await asyncio.sleep(self.dice.uniform(0.05, 0.3))

    async def run(self, seconds: float) -> None:
        """A tenth of the time to warm up, then a look at what is held, then the rest and a second look."""
        beating = asyncio.create_task(self.clock.run())
        async with httpx.AsyncClient(base_url=self.server.url, timeout=PATIENCE) as http:
            for name, folders in self.contents.items():
                await self.publish(http, name, folders[0], "POST")
            await self._fill(http)
            await self._wake_threads(http)
        await self._load(self.clock.now() + max(3.0, seconds / 10))
        self.report.before = await self._held()
        start = self.clock.now()
        memory: list[tuple[float, int]] = []
        watching = asyncio.create_task(self._watch(memory))
        await self._load(start + seconds)
        watching.cancel()
        self.report.seconds = self.clock.now() - start
        self.report.after = await self._held()
        beating.cancel()
        self.report.paused = self.clock.paused
        by_minute: dict[int, list[int]] = {}
        for t, b in memory:
            by_minute.setdefault(int((t - start) // 60), []).append(b)
        self.report.minutes = [round(statistics.median(values) / 1e6, 1) for values in by_minute.values()]
        late = [(t, b) for t, b in memory if t >= start + self.report.seconds / 3]
        self.report.resident = (late[0][1], late[-1][1])
        self.report.megabytes_an_hour = theil_sen(late) * 3600 / 1e6

    async def _fill(self, http: httpx.AsyncClient) -> None:
        """Touch every block of the KV cache, and the logits of the largest step that there can be.

        Pages that are first touched later would read as growth, such as those of a step of 50 logits, of which there is
        one in a quarter of an hour.
        """
        texts = [" ".join(str(i * n) for n in range(7, 27)) for i in range(1, round(FILLED_BY * self.kv_cache) + 1)]
        # two mixes, since one has no more than its share of the cache
        for model, half in (("smollm2-135m", texts[::2]), (next(iter(self.contents)), texts[1::2])):
            body = {"model": model, "prompt": half, "max_tokens": 1}
            (await http.post("/v1/completions", json=body)).raise_for_status()
        labels = [f" {i} of these words here" for i in range(64)]
        for prompt in PROMPTS:
            (await http.post("/classify", json={"prompt": prompt, "labels": labels})).raise_for_status()

    async def _wake_threads(self, http: httpx.AsyncClient) -> None:
        """Pools start their threads when all that they have are busy: so once all at a time."""
        long = {"prompt": "word " * 20_000}
        await asyncio.gather(*(http.post("/generate", json=long) for _ in range(64)))
        names = [n for n in self.contents if n.startswith("c")]
        await asyncio.gather(*(self.publish(http, name, self.contents[name][0], "PUT") for name in names))

    async def _load(self, until: float) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self.client(until))
            group.create_task(self.change(until))

    async def _watch(self, memory: list[tuple[float, int]]) -> None:
        while True:
            memory.append((self.clock.now(), self.server.resident()))
            await asyncio.sleep(1.0)

    async def _held(self) -> dict[str, Any]:
        """What the server holds once nothing runs: it has a minute to let go."""
        end = time.monotonic() + 60
        while True:
            async with httpx.AsyncClient(base_url=self.server.url, timeout=PATIENCE) as http:
                stats = (await http.get("/stats")).json()
            held = {
                "running": stats["engine"]["running"],
                "waiting": stats["engine"]["waiting"],
                "leases": stats["adapters"]["leases"],
                "slots in use": stats["slots"]["in_use"],
                "blocks in use": stats["engine"]["kv_blocks"]["used"],
            }
            if not any(held.values()) or time.monotonic() > end:
                tensors = await self._tensors()
                await asyncio.sleep(1.5)  # the sockets of clients that have left
                return {
                    **held,
                    "tensors": tensors,
                    "threads": self.server.count("task"),
                    "descriptors": self.server.count("fd"),
                    "failures": stats["engine"]["failures"],
                    "adapter bytes over budget": max(0, stats["adapters"]["bytes"] - stats["adapters"]["budget"]),
                }
            await asyncio.sleep(0.2)

    async def _tensors(self) -> int:
        """How many tensors the server has while its RAM holds the same adapters at each look."""
        async with httpx.AsyncClient(base_url=self.server.url, timeout=PATIENCE) as http:
            for name in [n for n in self.contents if n.startswith("a")][:IN_RAM]:
                (await http.post(f"/adapters/{name}/prefetch")).raise_for_status()
        before = len(self.server.log.read_text(errors="replace").split(TOLD))
        self.server.process.send_signal(signal.SIGUSR1)
        while True:
            told = self.server.log.read_text(errors="replace").split(TOLD)
            if len(told) > before and "\n" in told[-1]:
                return int(told[-1].partition("\n")[0])
            await asyncio.sleep(BEAT)

    def judge(self) -> None:
        """Hold the two looks, and the memory, to what has to be."""
        before, after = self.report.before, self.report.after
        for name, value in after.items():
            if value > (before[name] if name in ("tensors", "threads", "descriptors") else 0):
                self.problem(f"{name}: {before[name]} before, {value} after")
        if self.report.seconds >= 1200 and self.report.megabytes_an_hour > MB_AN_HOUR:
            self.problem(f"memory grows by {self.report.megabytes_an_hour:.1f} MB an hour")
        self.report.distinct = len(self.seen)

    def solo(self, server: ServerProcess, most: int) -> None:
        """Ask for each distinct answer again, alone, and compare; for `most` of them, drawn, if there are more."""
        asked = self.dice.sample(sorted(self.seen.items(), key=repr), min(most, len(self.seen)))
        self.report.alone = len(asked)
        names = {digest: f"s-{digest}" for digest in self.versions}
        with httpx.Client(base_url=server.url, timeout=PATIENCE) as http:
            for digest, folder in self.versions.items():
                files = {n: (folder / n).read_bytes() for n in (CONFIG, TENSORS)}
                answer = http.post("/adapters", files=files, data={"name": names[digest]})
                if answer.status_code not in (200, 201) or not answer.json()["version"].endswith(digest):
                    self.problem(f"the content of {digest} was registered as {answer.text}")
            for (route, prompt, mix, seed), text in asked:
                adapters = [{"name": names[d], "weight": w} for d, w in mix]
                alone = _alone(http, route, prompt, adapters, seed)
                if alone != text:
                    self.problem(f"alone {alone!r}, under load {text!r}: {route} {prompt!r} {mix} {seed}")


def _alone(http: httpx.Client, route: str, prompt: str, adapters: list[dict[str, Any]], seed: int) -> str:
    if route == "/classify":
        asked = {"prompt": prompt, "labels": [" yes", " no", " not sure"], "adapters": adapters}
        return json.dumps(http.post(route, json=asked).json()["scores"], sort_keys=True)
    if route == "/generate":
        more = {"seed": seed, "temperature": 0.9, "top_p": 0.95} if seed else {}
        body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "adapters": adapters, **more}
        return str(http.post(route, json=body).json()["text"])
    messages = [{"role": "user", "content": prompt}]
    body = {"model": adapters[0]["name"], "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0}
    return str(http.post(route, json=body).json()["choices"][0]["message"]["content"])


def theil_sen(points: Sequence[tuple[float, int]]) -> float:
    """The median slope over all pairs of points, in bytes a second: a few outliers do not move it."""
    chosen = points[:: max(1, len(points) // 600)]
    x, y = np.asarray([p[0] for p in chosen]), np.asarray([p[1] for p in chosen], np.float64)
    i, j = np.triu_indices(len(x), 1)
    return float(np.median((y[j] - y[i]) / (x[j] - x[i]))) if len(i) else 0.0


def soak(
    minutes: float,
    folder: Path,
    models: Path,
    flags: Sequence[str] = (),
    *,
    alone: int = 100_000,
    steady: int = STEADY,
    churned: int = CHURNED,
    kv_cache: int = KV_CACHE,
) -> Report:
    """The whole of it; everything that is written goes into `folder`. `alone` bounds the solo answers.

    `kv_cache` is in MiB: filling it is most of what comes before the load.
    """
    contents: dict[str, list[Path]] = {f"a{i}": [folder / f"a{i}"] for i in range(steady)}
    contents |= {f"c{i}": [folder / f"c{i}-{k}" for k in range(CONTENTS)] for i in range(churned)}
    for path in (path for paths in contents.values() for path in paths):
        seed = int(hashlib.sha256(path.name.encode()).hexdigest()[:8], 16)
        write_adapter(path, SHAPES, rank=RANK, seed=seed)
    size = choose(device="cpu").prepare(read_folder(folder / "a0", name="a0"), "int4").nbytes
    # a deadline that no pause of the machine uses up
    common = ["--max-mix", str(MAX_MIX), "--kv-cache", f"{kv_cache}MiB", "--deadline", "1h", *flags]
    most = ["--max-slots", str(SLOTS), "--adapter-ram", str(IN_RAM * size)]
    with serving(folder / "state", models, *most, *common, module="benchmarks.counted") as s:
        run = Soak(s, contents, kv_cache)
        asyncio.run(run.run(minutes * 60))
        run.judge()
    with serving(folder / "solo", models, "--no-prefix-cache", *common) as server:
        run.solo(server, alone)
    return run.report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--models", type=Path, default=REPO / "data" / "models", help="where the base has been fetched")
    parser.add_argument("--alone", type=int, default=100_000, help="solo answers at most, drawn from all")
    given, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(given.minutes, Path(folder), given.models, flags, alone=given.alone)
    print(json.dumps(report.as_dict(), indent=1))
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
