"""Run by the Python of an environment that has transformers and peft: reads a job as JSON, prints seconds as JSON.

The job and the answer are those of vllm_cpu.py; the batch is PEFT's mixed one (`adapter_names`), in bfloat16.
"""

import json
import os
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    job = json.load(sys.stdin)
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job.get("threads", 2))
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.bfloat16).eval()
    for n, folder in enumerate(job["adapters"]):
        if n == 0:
            model = PeftModel.from_pretrained(model, folder, adapter_name="a0").eval()
        else:
            model.load_adapter(folder, adapter_name=f"a{n}")
    if job["adapters"]:
        model.eval().to(torch.bfloat16)
    ids = torch.tensor(job["prompts"])
    names = ["__base__" if n < 0 else f"a{n}" for n in job["adapter_of"]]
    mixed = {"adapter_names": names} if job["adapters"] else {}

    def run(new_tokens: int) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                **mixed,
            )
        return time.perf_counter() - start

    run(2)
    times = [(run(1), run(job["new_tokens"])) for _ in range(job["repeats"])]
    sys.stdout.write("\n" + json.dumps({"first": [t[0] for t in times], "all": [t[1] for t in times]}) + "\n")


if __name__ == "__main__":
    main()
