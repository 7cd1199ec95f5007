"""Run by the Python of an environment that has mistralrs: reads a job as JSON, prints seconds as JSON.

The job and the answer are those of vllm_cpu.py, with "texts" (the prompts as text) in and, out, what its usage tells of
each repeat: "prompt_tokens" and "new_tokens" of all requests. All streams are opened before the first is read, so that
its scheduler may batch them: its Python object takes one call at a time. Only chats can be streamed, so the chat
template is one that adds nothing: the prompt is then the ids that the others are given. The base is the unquantized
folder: 0.9.5 refuses adapters on a GGUF of the Llama family, and fails on batches of quantized weights.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

BARE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def main() -> None:
    job = json.load(sys.stdin)
    # Its pools are made as it is imported, as large as this process's affinity and the variable let them be.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["threads"]])
    os.environ["RAYON_NUM_THREADS"] = str(job["threads"])
    from mistralrs import Architecture, ChatCompletionRequest, LoraAdapter, Runner, Which

    adapters = [LoraAdapter(f"a{n}", folder) for n, folder in enumerate(job["adapters"])]
    if adapters:
        which = Which.Lora(job["base"], adapters=adapters, arch=Architecture.Llama, max_adapters=max(16, len(adapters)))
    else:
        which = Which.Plain(job["base"], arch=Architecture.Llama)
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "bare.jinja"
        template.write_text(BARE, encoding="utf-8")
        runner = Runner(which, max_seqs=max(32, len(job["texts"])), prefix_cache_n=0, jinja_explicit=str(template))

    def stream(i: int):
        n = job["adapter_of"][i]
        return runner.send_chat_completion_request(
            ChatCompletionRequest(
                messages=[{"role": "user", "content": job["texts"][i]}],
                model="default",
                max_tokens=job["new_tokens"],
                temperature=0.0,
                ignore_eos=True,
                stream=True,
                adapter=None if n < 0 else f"a{n}",
            )
        )

    def run() -> tuple[float, float, int, int]:
        """Seconds until all had their first token, and to the last, in one run as vllm_cpu.py has them; the tokens that
        were read, and those that were made."""
        start = time.perf_counter()
        streams = [iter(stream(i)) for i in range(len(job["texts"]))]
        usages = [None] * len(streams)
        for n, s in enumerate(streams):
            for chunk in s:
                usages[n] = chunk.usage or usages[n]
                if chunk.choices and chunk.choices[0].delta.content:
                    break
        first = time.perf_counter() - start
        for n, s in enumerate(streams):
            for chunk in s:
                usages[n] = chunk.usage or usages[n]
        last = time.perf_counter() - start
        if not all(usages):
            raise SystemExit("a stream ended without telling its usage")
        return first, last, sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)

    run()
    times = [run() for _ in range(job["repeats"])]
    names = ("first", "all", "prompt_tokens", "new_tokens")
    answer = {name: list(values) for name, values in zip(names, zip(*times, strict=True), strict=True)}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
