"""Run by the Python of an environment that has mistralrs: reads a job as JSON, prints seconds as JSON.

The job and the answer are those of vllm_cpu.py, with "texts" (the prompts as text). All streams are opened before the
first is read, so that its scheduler may batch them: its Python object takes one call at a time. The base is the
unquantized folder: 0.9.5 refuses adapters on a GGUF of the Llama family, and fails on batches of quantized weights.
"""

import json
import sys
import time


def main() -> None:
    job = json.load(sys.stdin)
    from mistralrs import Architecture, ChatCompletionRequest, LoraAdapter, Runner, Which

    adapters = [LoraAdapter(f"a{n}", folder) for n, folder in enumerate(job["adapters"])]
    if adapters:
        which = Which.Lora(job["base"], adapters=adapters, arch=Architecture.Llama)
    else:
        which = Which.Plain(job["base"], arch=Architecture.Llama)
    runner = Runner(which, max_seqs=32, prefix_cache_n=0)

    def stream(i: int, new_tokens: int):
        n = job["adapter_of"][i]
        return runner.send_chat_completion_request(
            ChatCompletionRequest(
                messages=job["texts"][i],
                model="default",
                max_tokens=new_tokens,
                temperature=0.0,
                ignore_eos=True,
                stream=True,
                adapter=None if n < 0 else f"a{n}",
            )
        )

    def run(new_tokens: int) -> float:
        start = time.perf_counter()
        streams = [stream(i, new_tokens) for i in range(len(job["texts"]))]
        for s in streams:
            last = None
            for last in s:  # noqa: B007
                pass
            if last is None:
                raise SystemExit("a stream ended without a token")
        return time.perf_counter() - start

    run(job["new_tokens"])
    times = [(run(1), run(job["new_tokens"])) for _ in range(job["repeats"])]
    sys.stdout.write("\n" + json.dumps({"first": [t[0] for t in times], "all": [t[1] for t in times]}) + "\n")


if __name__ == "__main__":
    main()
