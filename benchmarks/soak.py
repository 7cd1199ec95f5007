"""Soak test: 32 clients use many adapters while adapters are published, rolled back and retired.

The server has slots for 8 adapters and RAM for 12, and serves 40. Clients request mixes of up to four adapters through
/generate, /classify and /v1, streaming or not. Some disconnect early, some send invalid requests. Afterwards a second
server without prefix cache answers each distinct request alone. Its answers must be equal: the native kernels give the
same bits in any batch. The test also checks for leaks of memory, leases, slots, KV blocks, threads and open files.

    python -m benchmarks.soak --minutes 30

The exit status is 1 if any check failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
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
from benchmarks.server_process import MODELS, ServerProcess, loramux_server
from benchmarks.synthetic import write_adapter
from server.kernels import choose

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
CLIENTS, FIXED, CHANGING, CONTENTS = 32, 32, 8, 3
"""32 adapters with fixed content, and 8 names that switch between 3 contents each."""
SLOTS, IN_RAM, MAX_MIX = 8, 12, 4
RANK, NEW_TOKENS = 16, 12
REQUEST_TIMEOUT = 180.0
ADMIN_TIMEOUT = 1800.0
KV_CACHE = 192
"""MiB."""
PROMPTS_PER_MIB = 4 / 3
"""Prompts of more than 100 tokens per MiB of KV cache that touch every block."""
MAX_MB_PER_HOUR = 10.0
SHAPES = {
    f"model.layers.{layer}.self_attn.{name}": shape
    for layer in range(30)
    for name, shape in {"q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576), "o_proj": (576, 576)}.items()
}
"""Shapes of the attention projections of SmolLM2-135M."""
PROMPTS = (
    "The lighthouse keeper wrote in his log:", "Two plus three is", "A short list of fruits:\n-", "def mean(values):",
    "Dear Anna,\nthank you for", "The capital of France", "In the year 1911 a ship", "Translate: good morning",
    "Once upon a time", "The soup was cold, and the waiter",
)  # fmt: skip
WEIGHTS = (1.0, 0.5, 0.25, -0.5, 0.75)
ACTIONS = {"plain": 40, "stream": 20, "chat": 8, "sampled": 8, "disconnect": 10, "malformed": 8, "classify": 6}
"""What clients do, with relative frequencies."""

Mix = tuple[tuple[str, float], ...]
Key = tuple[str, str, Mix, int]
"""Route, prompt, mix as (digest, weight), seed (0 is greedy)."""


@dataclass
class Report:
    """Result of a soak test. `wrong` lists the failed checks."""

    seconds: float = 0.0
    calls: Counter[str] = field(default_factory=Counter)
    distinct: int = 0
    alone: int = 0
    """Distinct requests that were repeated alone."""
    compared: int = 0
    megabytes_per_hour: float = 0.0
    minutes: list[float] = field(default_factory=list)
    """Median resident megabytes of each minute."""
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
"""Invalid requests and their expected status."""


class Soak:
    """One soak test against `server`; `contents` maps adapter names to their folders."""

    def __init__(self, server: ServerProcess, contents: dict[str, list[Path]], kv_cache: int, seed: int = 1) -> None:
        self.server, self.contents, self.kv_cache, self.random = server, contents, kv_cache, random.Random(seed)
        self.report = Report()
        self.answers: dict[Key, str] = {}
        self.versions: dict[str, Path] = {}
        """Digest -> adapter folder."""
        self.retired: set[str] = set()
        """Names that have been retired at some time; requests for them may get 404."""
        choices = random.Random(2)
        names = list(contents)
        self.mixes = [
            [(n, choices.choice(WEIGHTS)) for n in choices.sample(names, choices.choice((0, 1, 1, 2, 3, MAX_MIX)))]
            for _ in range(40)
        ]

    def problem(self, text: str) -> None:
        if len(self.report.wrong) < 20:
            self.report.wrong.append(text[:400])

    async def publish(self, http: httpx.AsyncClient, name: str, folder: Path, method: str) -> str:
        """Upload an adapter folder under `name`. Returns the version."""
        files = {n: (folder / n).read_bytes() for n in (CONFIG, TENSORS)}
        path, data = ("/adapters", {"name": name}) if method == "POST" else (f"/adapters/{name}", {})
        answer = await http.request(method, path, files=files, data=data)
        if answer.status_code not in (200, 201):
            raise RuntimeError(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
        version = str(answer.json()["version"])
        self.versions[version.partition("@")[2]] = folder
        return version

    async def client(self, until: float) -> None:
        async with httpx.AsyncClient(base_url=self.server.url, timeout=REQUEST_TIMEOUT) as http:
            while time.monotonic() < until:
                (action,) = self.random.choices(list(ACTIONS), list(ACTIONS.values()))
                self.report.calls[action] += 1
                try:
                    await getattr(self, f"_{action}")(http)
                except httpx.TimeoutException:
                    self.problem(f"{action}: no answer after {REQUEST_TIMEOUT} s")
                except httpx.HTTPError as error:
                    self.problem(f"{action}: {type(error).__name__} {error}")

    def _body(self) -> tuple[str, dict[str, Any]]:
        prompt, mix = self.random.choice(PROMPTS), self.random.choice(self.mixes)
        adapters = [{"name": n, "weight": w} for n, w in mix]
        return prompt, {"prompt": prompt, "max_tokens": NEW_TOKENS, "adapters": adapters}

    def _compare(self, route: str, prompt: str, adapters: Sequence[dict[str, Any]], seed: int, text: str) -> None:
        """Record an answer. Equal requests must get equal answers."""
        mix = tuple((a["version"].partition("@")[2], a["weight"]) for a in adapters)
        key = (route, prompt, mix, seed)
        self.report.compared += 1
        if self.answers.setdefault(key, text) != text:
            self.problem(f"different answers to the same request {key}: {self.answers[key]!r} and {text!r}")

    def _failed(self, status: int, text: str, body: dict[str, Any]) -> None:
        if status == 404 and any(a["name"] in self.retired for a in body.get("adapters", ())):
            self.report.calls["404 of a retired name"] += 1
        else:
            self.problem(f"{status}: {text}")

    async def _plain(self, http: httpx.AsyncClient, seed: int = 0, **options: Any) -> None:
        prompt, body = self._body()
        if seed:
            options["seed"] = seed
        answer = await http.post("/generate", json={**body, **options})
        if answer.status_code != 200:
            self._failed(answer.status_code, answer.text, body)
            return
        result = answer.json()
        self._compare("/generate", prompt, result["adapters"], seed, result["text"])

    async def _sampled(self, http: httpx.AsyncClient) -> None:
        await self._plain(http, self.random.randrange(1, 4), temperature=0.9, top_p=0.95)

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
                        self.problem(f"error in a stream: {event}")
                        return
                    text.append(event.get("text", "") if "usage" not in event else "")
                    last = event
        self._compare("/generate", prompt, last["adapters"], 0, "".join(text))

    async def _chat(self, http: httpx.AsyncClient) -> None:
        prompt, body = self._body()
        name = self.random.choice([n for n in self.contents if n.startswith("a")])
        chat = {"model": name, "messages": [{"role": "user", "content": prompt}], "max_tokens": NEW_TOKENS}
        answer = await http.post("/v1/chat/completions", json={**chat, "temperature": 0})
        if answer.status_code != 200:
            self._failed(answer.status_code, answer.text, body)
            return
        digest = next(d for d, folder in self.versions.items() if folder == self.contents[name][0])
        text = answer.json()["choices"][0]["message"]["content"]
        self._compare("/v1/chat/completions", prompt, [{"version": f"@{digest}", "weight": 1.0}], 0, text)

    async def _classify(self, http: httpx.AsyncClient) -> None:
        prompt, body = self._body()
        request = {"prompt": prompt, "labels": [" yes", " no", " not sure"], "adapters": body["adapters"]}
        answer = await http.post("/classify", json=request)
        if answer.status_code != 200:
            self._failed(answer.status_code, answer.text, body)
            return
        result = answer.json()
        self._compare("/classify", prompt, result["adapters"], 0, json.dumps(result["scores"], sort_keys=True))

    async def _disconnect(self, http: httpx.AsyncClient) -> None:
        """Disconnect while waiting for the answer, or after a few events."""
        _, body = self._body()
        body["max_tokens"] = 400
        if self.random.random() < 0.5:
            with contextlib.suppress(httpx.TimeoutException):
                await http.post("/generate", json=body, timeout=self.random.uniform(0.001, 0.5))
            return
        async with http.stream("POST", "/generate", json={**body, "stream": True}) as answer:
            events = self.random.randrange(1, 6)
            async for _ in answer.aiter_lines():
                events -= 1
                if not events:
                    break

    async def _malformed(self, http: httpx.AsyncClient) -> None:
        path, body, status = self.random.choice(MALFORMED)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await http.post(path, content=content, headers={"content-type": "application/json"})
        if answer.status_code != status or set(answer.json()) != {"error"}:
            self.problem(f"{path} {content[:80]!r}: status {answer.status_code}, expected {status}: {answer.text}")

    async def change_adapters(self, until: float) -> None:
        """Publish, roll back, retire and register adapters again."""
        names = [n for n in self.contents if n.startswith("c")]
        published: dict[str, list[str]] = {}
        async with httpx.AsyncClient(base_url=self.server.url, timeout=ADMIN_TIMEOUT) as http:
            while time.monotonic() < until:
                name = self.random.choice(names)
                (action,) = self.random.choices(("publish", "roll back", "retire"), (5, 3, 2))
                self.report.calls[action] += 1
                if action == "publish":
                    version = await self.publish(http, name, self.random.choice(self.contents[name]), "PUT")
                    published.setdefault(name, []).append(version)
                elif action == "roll back" and published.get(name):
                    version = self.random.choice(published[name][-2:])
                    answer = await http.put(f"/adapters/{name}", json={"version": version})
                    if answer.status_code != 200:
                        self.problem(f"roll back to {version}: {answer.status_code} {answer.text}")
                elif action == "retire":
                    self.retired.add(name)
                    answer = await http.delete(f"/adapters/{name}")
                    if answer.status_code != 202:
                        self.problem(f"retire {name}: {answer.status_code} {answer.text}")
                    published[name] = [await self.publish(http, name, self.contents[name][0], "POST")]
                await asyncio.sleep(self.random.uniform(0.05, 0.3))

    async def run(self, seconds: float) -> None:
        """Warm up for a tenth of the time, record the resources in use, apply load, and record them again."""
        async with httpx.AsyncClient(base_url=self.server.url, timeout=ADMIN_TIMEOUT) as http:
            for name, folders in self.contents.items():
                await self.publish(http, name, folders[0], "POST")
            await self._touch_all_memory(http)
        await self._load(time.monotonic() + max(3.0, seconds / 10))
        self.report.before = await self._resources()
        start = time.monotonic()
        memory: list[tuple[float, int]] = []
        sampling = asyncio.create_task(self._sample_memory(memory))
        await self._load(start + seconds)
        sampling.cancel()
        self.report.seconds = time.monotonic() - start
        self.report.after = await self._resources()
        by_minute: dict[int, list[int]] = {}
        for at, size in memory:
            by_minute.setdefault(int((at - start) // 60), []).append(size)
        self.report.minutes = [round(statistics.median(values) / 1e6, 1) for values in by_minute.values()]
        late = [(at, size) for at, size in memory if at >= start + self.report.seconds / 3]
        self.report.megabytes_per_hour = theil_sen(late) * 3600 / 1e6

    async def _touch_all_memory(self, http: httpx.AsyncClient) -> None:
        """Use every KV block, the largest logits and every pool thread: later first use would look like a leak."""
        texts = [
            " ".join(str(i * n) for n in range(7, 27)) for i in range(1, round(PROMPTS_PER_MIB * self.kv_cache) + 1)
        ]
        for model, half in (("smollm2-135m", texts[::2]), (next(iter(self.contents)), texts[1::2])):
            body = {"model": model, "prompt": half, "max_tokens": 1}
            (await http.post("/v1/completions", json=body)).raise_for_status()
        labels = [f" {i} of these words here" for i in range(64)]
        for prompt in PROMPTS:
            (await http.post("/classify", json={"prompt": prompt, "labels": labels})).raise_for_status()
        long = {"prompt": "word " * 20_000}
        await asyncio.gather(*(http.post("/generate", json=long) for _ in range(64)))
        names = [n for n in self.contents if n.startswith("c")]
        await asyncio.gather(*(self.publish(http, name, self.contents[name][0], "PUT") for name in names))

    async def _load(self, until: float) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self.client(until))
            group.create_task(self.change_adapters(until))

    async def _sample_memory(self, memory: list[tuple[float, int]]) -> None:
        while True:
            memory.append((time.monotonic(), self.server.resident()))
            await asyncio.sleep(1.0)

    async def _resources(self) -> dict[str, Any]:
        """Resources in use once the server is idle; it gets a minute to become idle."""
        deadline = time.monotonic() + 60
        while True:
            async with httpx.AsyncClient(base_url=self.server.url, timeout=ADMIN_TIMEOUT) as http:
                stats = (await http.get("/stats")).json()
            used = {
                "running": stats["engine"]["running"],
                "waiting": stats["engine"]["waiting"],
                "leases": stats["adapters"]["leases"],
                "slots in use": stats["slots"]["in_use"],
                "blocks in use": stats["engine"]["kv_blocks"]["used"],
            }
            if not any(used.values()) or time.monotonic() > deadline:
                await asyncio.sleep(1.5)  # sockets of disconnected clients are still open
                return {
                    **used,
                    "threads": self.server.count("task"),
                    "descriptors": self.server.count("fd"),
                    "failures": stats["engine"]["failures"],
                    "adapter bytes over budget": max(0, stats["adapters"]["bytes"] - stats["adapters"]["budget"]),
                }
            await asyncio.sleep(0.2)

    def check_resources(self) -> None:
        """Compare the resources before and after the load, and check the growth of memory."""
        before, after = self.report.before, self.report.after
        for name, value in after.items():
            if value > (before[name] if name in ("threads", "descriptors") else 0):
                self.problem(f"{name}: {before[name]} before, {value} after")
        if self.report.seconds >= 1200 and self.report.megabytes_per_hour > MAX_MB_PER_HOUR:
            self.problem(f"memory grows by {self.report.megabytes_per_hour:.1f} MB per hour")
        self.report.distinct = len(self.answers)

    def compare_alone(self, server: ServerProcess, limit: int) -> None:
        """Repeat up to `limit` distinct requests alone on `server`, and compare the answers."""
        requests = self.random.sample(sorted(self.answers.items(), key=repr), min(limit, len(self.answers)))
        self.report.alone = len(requests)
        names = {digest: f"s-{digest}" for digest in self.versions}
        with httpx.Client(base_url=server.url, timeout=ADMIN_TIMEOUT) as http:
            for digest, folder in self.versions.items():
                files = {n: (folder / n).read_bytes() for n in (CONFIG, TENSORS)}
                answer = http.post("/adapters", files=files, data={"name": names[digest]})
                if answer.status_code not in (200, 201) or not answer.json()["version"].endswith(digest):
                    self.problem(f"the content of {digest} was registered as {answer.text}")
            for (route, prompt, mix, seed), text in requests:
                adapters = [{"name": names[d], "weight": w} for d, w in mix]
                alone = _answer_alone(http, route, prompt, adapters, seed)
                if alone != text:
                    self.problem(f"alone {alone!r}, under load {text!r}: {route} {prompt!r} {mix} {seed}")


def _answer_alone(http: httpx.Client, route: str, prompt: str, adapters: list[dict[str, Any]], seed: int) -> str:
    if route == "/classify":
        body: dict[str, Any] = {"prompt": prompt, "labels": [" yes", " no", " not sure"], "adapters": adapters}
        return json.dumps(http.post(route, json=body).json()["scores"], sort_keys=True)
    if route == "/generate":
        sampling = {"seed": seed, "temperature": 0.9, "top_p": 0.95} if seed else {}
        body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "adapters": adapters, **sampling}
        return str(http.post(route, json=body).json()["text"])
    messages = [{"role": "user", "content": prompt}]
    body = {"model": adapters[0]["name"], "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0}
    return str(http.post(route, json=body).json()["choices"][0]["message"]["content"])


def theil_sen(points: Sequence[tuple[float, int]]) -> float:
    """Median slope over all pairs of points, in bytes per second. It is robust against outliers."""
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
    fixed: int = FIXED,
    changing: int = CHANGING,
    kv_cache: int = KV_CACHE,
) -> Report:
    """Run the whole test.

    Args:
        minutes: duration of the load.
        folder: working directory.
        models: folder with the downloaded base.
        flags: additional flags for both servers.
        alone: maximum number of requests that are repeated alone.
        fixed: number of adapters with fixed content.
        changing: number of adapters that are published again and retired.
        kv_cache: size in MiB.
    """
    contents: dict[str, list[Path]] = {f"a{i}": [folder / f"a{i}"] for i in range(fixed)}
    contents |= {f"c{i}": [folder / f"c{i}-{k}" for k in range(CONTENTS)] for i in range(changing)}
    for path in (path for paths in contents.values() for path in paths):
        seed = int(hashlib.sha256(path.name.encode()).hexdigest()[:8], 16)
        write_adapter(path, SHAPES, rank=RANK, seed=seed)
    size = choose(device="cpu").prepare(read_folder(folder / "a0", name="a0"), "int4").nbytes
    common = ["--max-mix", str(MAX_MIX), "--kv-cache", f"{kv_cache}MiB", "--deadline", "1h", *flags]
    limits = ["--max-slots", str(SLOTS), "--adapter-ram", str(IN_RAM * size)]
    with loramux_server(folder / "state", models, *limits, *common) as server:
        run = Soak(server, contents, kv_cache)
        asyncio.run(run.run(minutes * 60))
        run.check_resources()
    with loramux_server(folder / "alone", models, "--no-prefix-cache", *common) as server:
        run.compare_alone(server, alone)
    return run.report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--models", type=Path, default=MODELS, help="folder with the downloaded base")
    parser.add_argument("--alone", type=int, default=100_000, help="maximum number of requests repeated alone")
    options, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(options.minutes, Path(folder), options.models, flags, alone=options.alone)
    print(json.dumps(report.as_dict(), indent=1))
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
