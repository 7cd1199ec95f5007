"""The peers' scripts, run beside packages that only note what they are asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import SCRIPTS

PEERS = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"

MISTRALRS = """
import json, os
from pathlib import Path
from types import SimpleNamespace

NOTED = {"rayon": os.environ.get("RAYON_NUM_THREADS"), "cores": len(os.sched_getaffinity(0))}

class Architecture:
    Llama = "llama"

class ChatCompletionRequest:
    def __init__(self, **given):
        self.given = given

def LoraAdapter(name, folder):
    return [name, folder]

class Which:
    @staticmethod
    def Plain(base, **given):
        return {"base": base, **given}

    @staticmethod
    def Lora(base, **given):
        return {"base": base, **given}

class Runner:
    def __init__(self, which, *, jinja_explicit, **given):
        NOTED.update(which=which, template=Path(jinja_explicit).read_text(), asked=[], **given)

    def send_chat_completion_request(self, request):
        NOTED["asked"].append(request.given)
        Path(os.environ["NOTED"]).write_text(json.dumps(NOTED))
        def chunk(text, usage=None):
            return SimpleNamespace(choices=[SimpleNamespace(delta=SimpleNamespace(content=text))], usage=usage)
        yield chunk("")
        yield chunk("a")
        yield chunk("b", SimpleNamespace(prompt_tokens=7, completion_tokens=3))
"""

VLLM = """
import json, os, sys
from pathlib import Path

SamplingParams = None

def LLM(base, **given):
    Path(os.environ["NOTED"]).write_text(json.dumps(given))
    sys.exit(3)
"""


def run(kind: str, packages: Path, job: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What the script printed, and what its package noted."""
    noted = packages / "noted.json"
    environment = {**os.environ, "PYTHONPATH": str(packages), "NOTED": str(noted)}
    command = [sys.executable, str(PEERS / SCRIPTS[kind])]
    done = subprocess.run(
        command, input=json.dumps(job), env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert noted.exists(), done.stderr
    return done.stdout, json.loads(noted.read_text())


def test_mistralrs_reads_the_prompt_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mistralrs.py").write_text(MISTRALRS)
    job = {"base": "b", "adapters": ["x", "y"], "texts": ["one", "two", "three"], "adapter_of": [0, 1, -1]}
    told, noted = run("mistralrs", tmp_path, {**job, "new_tokens": 3, "threads": 1, "repeats": 2})
    answer = json.loads(told.strip().splitlines()[-1])
    assert answer["prompt_tokens"] == [21, 21] and answer["new_tokens"] == [9, 9]
    assert len(answer["first"]) == 2 and all(0 <= a <= b for a, b in zip(answer["first"], answer["all"], strict=True))
    assert "{{ message['content'] }}" in noted["template"] and "system" not in noted["template"]
    assert [(one["messages"][0]["content"], one["adapter"]) for one in noted["asked"][:3]] == [
        ("one", "a0"),
        ("two", "a1"),
        ("three", None),
    ]
    assert (noted["rayon"], noted["cores"]) == ("1", 1), "as many threads as the others have"


@pytest.mark.parametrize(
    ("ranks", "room"),
    [
        ([], None),
        ([8, 16, 24, 32] * 4, {"max_loras": 16, "max_cpu_loras": 16, "max_lora_rank": 32}),
        ([4], {"max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": 8}),
        ([33] * 40, {"max_loras": 40, "max_cpu_loras": 40, "max_lora_rank": 64}),
    ],
)
def test_vllm_has_room_for_the_adapters_of_the_job(
    tmp_path: Path, ranks: list[int], room: dict[str, int] | None
) -> None:
    (tmp_path / "vllm" / "lora").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text(VLLM)
    (tmp_path / "vllm" / "lora" / "__init__.py").touch()
    (tmp_path / "vllm" / "lora" / "request.py").write_text("LoRARequest = None")
    folders = []
    for i, rank in enumerate(ranks):
        (tmp_path / f"a{i}").mkdir()
        (tmp_path / f"a{i}" / "adapter_config.json").write_text(json.dumps({"r": rank}))
        folders.append(str(tmp_path / f"a{i}"))
    job = {"base": "b", "adapters": folders, "prompts": [[1]] * 40, "adapter_of": [-1] * 40}
    _, noted = run("vllm", tmp_path, {**job, "new_tokens": 2, "threads": 1, "repeats": 1})
    assert noted["max_num_seqs"] == 40
    assert {k: v for k, v in noted.items() if "lora" in k} == ({} if room is None else {"enable_lora": True, **room})


API_SERVER = """
import json, os, sys
from pathlib import Path

assert __name__ == "__main__"
noted = {"argv": sys.argv[1:], "threads": os.environ["VLLM_CPU_OMP_THREADS_BIND"].split(",")}
Path(os.environ["NOTED"]).write_text(json.dumps(noted))
"""


def test_the_server_of_vllm_has_the_settings_of_its_engine(tmp_path: Path) -> None:
    entrypoints = tmp_path / "vllm" / "entrypoints" / "openai"
    entrypoints.mkdir(parents=True)
    for folder in (entrypoints, *list(entrypoints.parents)[:2]):
        (folder / "__init__.py").touch()
    (entrypoints / "api_server.py").write_text(API_SERVER)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text('{"r": 24}')
    job = {"base": "b", "name": "n", "adapters": {"s0": str(tmp_path / "a")}, "requests": 40, "threads": 1, "port": 7}
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NOTED": str(tmp_path / "noted.json")}
    command = [sys.executable, str(PEERS / "vllm_server.py"), json.dumps(job)]
    subprocess.run(command, env=environment, timeout=60, check=True)
    noted = json.loads((tmp_path / "noted.json").read_text())
    assert len(noted["threads"]) == 1
    argv = noted["argv"]
    wanted = {"model": "b", "served-model-name": "n", "port": "7", "max-num-seqs": "40", "max-lora-rank": "32"}
    wanted |= {"max-loras": "1", "max-cpu-loras": "1", "lora-modules": f"s0={tmp_path / 'a'}"}
    assert {name: argv[argv.index(f"--{name}") + 1] for name in wanted} == wanted
    assert "--enable-lora" in argv and "--no-enable-prefix-caching" in argv
