"""The `loramux bench` commands."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import pytest
import typer
from click.testing import Result
from rich.table import Table
from typer.testing import CliRunner

from adapters.peft_format import read_folder
from benchmarks import command, compare, online, report, roofline
from benchmarks.client import NoAnswer
from benchmarks.compare import PeerFailed, Rates
from benchmarks.slora import Client
from server.errors import BadSetting
from server.kernels import choose, cuda
from tests.benchmarks.conftest import FakeServer, events

if TYPE_CHECKING:
    from server.model.loader import Base

LOAD = ("--requests", "6", "--concurrency", "2", "--new-tokens", "3", "--prompt-tokens", "5")


def bench(*arguments: str) -> Result:
    return CliRunner(env={"LORAMUX_API_KEYS": "", "OPENAI_API_KEY": ""}).invoke(command.app, arguments)


def read_result(folder: Path, name: str) -> dict[str, Any]:
    """A JSON result without its description of the machine."""
    result: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    machine = result.pop("machine")
    assert machine["cores"] >= 1 and machine["processor"] and machine["date"].startswith("20")
    assert machine["python"] == ".".join(map(str, sys.version_info[:3]))
    return result


def test_base_has_the_settings_of_serve_on_the_cpu(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    for name, value in (("MODEL", tiny_folder), ("STATE_DIR", tmp_path), ("QUANTIZATION", "none"), ("HOST", "0.0.0.0")):
        monkeypatch.setenv(f"LORAMUX_{name}", str(value))
    base = command._load_base(command._settings(None, None, "reference"))
    assert base.name == tiny_folder.name and base.quantization["scheme"] == "none"
    monkeypatch.setenv("LORAMUX_KERNELS", "cuda")
    assert command._load_base(command._settings(None, None)).backend.name in ("native", "aten")


def test_results_are_valid_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result: dict[str, Any] = {"rate": float("nan"), "runs": [{"p99": float("inf"), "requests": 3}]}
    report.show(result, Table(), True, tmp_path, "x")
    expected = {"rate": None, "runs": [{"p99": None, "requests": 3}]}
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "x.json").read_text()) == expected


def test_missing_packages_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    report.check_extra()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadSetting, match=rf"{re.escape(sys.executable)} -m pip install 'loramux\[bench\]'"):
        report.check_extra()


@pytest.mark.parametrize(
    "arguments",
    [
        ("load", "http://x", "--model", "a", "--concurrency", "0"),
        ("load", "http://x", "--model", "a", "--prompt-tokens", "70000"),
        ("load", "http://x", "--model", "a", "--vocab", "100"),
        ("peers", "peers.toml", "--requests", "0"),
        ("steps", "--repeats", "0"),
        ("slora", "http://x", "--few", "0"),
    ],
)
def test_options_out_of_range(arguments: tuple[str, ...]) -> None:
    result = bench(*arguments)
    assert result.exit_code == 2 and f"Invalid value for '{arguments[-2]}'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("slora", "--few", "5", "--many", "3"), "--many"),
        (("slora", "--prompt", "8"), "--prompt must be LOW:HIGH"),
        (("slora", "--output", "8:8"), "--output must be LOW:HIGH"),
        (("slora", "--output", "0:8"), "--output must be LOW:HIGH"),
        (("slora", "--prompt", "1:99999"), "--prompt must be LOW:HIGH"),
        (("slora", "--cv", "0"), "--cv must be above 0"),
        (("slora", "--share", "0.5", "--rate", "2"), "not both"),
        (("load", "--model", "a", "--rate", "0"), "--rate must be above 0"),
        (("load", "--model", "a", "--slo", "0"), "--slo must be above 0"),
        (("load", "--model", "a", "--cv", "1e200"), "--cv must be above 0"),
        (("load", "--model", "a", "--requests", "100000000000"), "--requests must be above 0"),
    ],
)
def test_invalid_options_send_no_request(fake_server: FakeServer, arguments: tuple[str, ...], message: str) -> None:
    result = bench(arguments[0], fake_server.url, *arguments[1:])
    assert isinstance(result.exception, BadSetting) and message in result.exception.message
    assert fake_server.requests == []


def test_steps(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline.Meter, "median", lambda meter: roofline.Ceilings(2e9, 1e9))
    result = bench(
        "steps", "--model", str(tiny_folder), "--state-dir", str(tmp_path / "state"), "--threads", "1",
        "--repeats", "1", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
    found = read_result(tmp_path / "out", "steps")
    assert (found["asked"]["threads"], found["asked"]["repeats"], len(found["asked"]["ranks"])) == (1, 1, 21)
    for step in found["steps"]:
        minimum = max(step["bytes"] / 2e9, step["operations"] / 1e9)
        assert step["roofline"] == pytest.approx(minimum / (step["ms"] / 1e3))


def test_peers(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that fails in the second round."""
    (tmp_path / "peers.toml").write_text(f"peft = '{sys.executable}'\nvllm = '{sys.executable}'")
    calls: list[str] = []

    def peer(kind: str, python: str, base: Path, threads: int) -> compare.Contestant:
        assert (base / "model.safetensors").is_file()

        def measure(job: compare.Job) -> Rates:
            calls.append(kind)
            if calls.count("peft") == 2 and kind == "peft":
                raise PeerFailed("crashed")
            return Rates(3.0, 2.0)

        return measure

    monkeypatch.setattr(compare, "script_peer", peer)
    monkeypatch.setattr(roofline.Meter, "take", lambda meter: roofline.Ceilings(2e9, 1e9))
    result = bench(
        "peers", str(tmp_path / "peers.toml"), "--model", str(tiny_folder), "--state-dir", str(tmp_path / "state"),
        "--threads", "1", "--rounds", "3", "--requests", "2", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert result.exit_code == 1, result.exception
    assert "the peer peft failed: crashed" in " ".join(result.stderr.split()) and "peft failed" in result.stdout
    found = read_result(tmp_path / "out", "peers-2-2")
    assert [len(found["rates"][name]["rounds"]) for name in ("loramux", "peft", "vllm")] == [3, 1, 3]
    assert found["failed"] == {"peft": "crashed"} and set(found["ratios"]) == {"peft", "vllm"}
    base = command._load_base(command._settings(str(tiny_folder), tmp_path / "state"))
    folders = [tmp_path / "state" / "bench" / f"peer{i}" for i in range(2)]
    own = [base.prepare(read_folder(path, name=path.name, shapes=base.shapes())) for path in folders]
    costs = [roofline.decode_cost(base, [context] * 2, [[each] for each in own]) for context in range(129, 192)]
    minimum = sum(cost.seconds(roofline.Ceilings(2e9, 1e9)) for cost in costs)
    seconds = [2 * 63 / rates["decode"] for rates in found["rates"]["loramux"]["rounds"]]
    assert found["roofline"] == pytest.approx([minimum / each for each in seconds])
    assert found["kernels"] == choose("auto", "cpu").name and found["asked"]["ranks"] == [8, 16]


def write_padded_gguf(path: Path, base: Base, rows: int) -> None:
    """Write `base` as a GGUF file whose embedding table has more rows than the tokenizer has tokens."""
    config, tokenizer = base.config, json.loads(base.vocabulary.tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    padding = [f"[PAD{i}]" for i in range(rows - len(tokens))]
    kinds = [3 if token in base.vocabulary.special else 1 for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *padding])
    writer.add_token_types([*kinds, *[5] * len(padding)])  # 5: unused
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    weights = {path: base.backend.dequantize(weight).float().numpy() for path, weight in base.weights.items()}
    weights["model.embed_tokens"] = gguf.np.resize(weights["model.embed_tokens"], (rows, config.hidden_size))
    weights |= {name.removesuffix(".weight"): tensor.float().numpy() for name, tensor in base.tensors.items()}
    for name, values in weights.items():
        writer.add_tensor(f"{names.get_name(name)}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_peers_with_a_padded_gguf(tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_padded_gguf(tmp_path / "padded.gguf", tiny_base, 4096)
    (tmp_path / "peers.toml").write_text(f"vllm = '{sys.executable}'")
    monkeypatch.setattr(compare, "script_peer", lambda *_: lambda job: Rates(3.0, 2.0))
    monkeypatch.setattr(roofline.Meter, "take", lambda meter: roofline.Ceilings(2e9, 1e9))
    result = bench(
        "peers", str(tmp_path / "peers.toml"), "--no-adapters", "--model", str(tmp_path / "padded.gguf"),
        "--state-dir", str(tmp_path / "state"), "--threads", "1", "--rounds", "1", "--requests", "2", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout)["rates"]["loramux"]["decode"] > 0


def test_load(fake_server: FakeServer, tmp_path: Path) -> None:
    fake_server.reply = lambda body: (429, ["full"]) if body["model"] == "b" else (200, events(body["max_tokens"]))
    command_line = ("load", f"{fake_server.url}/v1", "--model", "a", "--model", "b", *LOAD, "--out", str(tmp_path))
    result = bench(*command_line, "--api-key", "first:one,second:two")
    assert result.exit_code == 0, result.exception
    found = read_result(tmp_path, "load")
    seed = found["asked"]["prompt_seed"]
    assert found["asked"] == {
        "url": f"{fake_server.url}/v1", "models": ["a", "b"], "concurrency": 2, "slo": 6.0, "requests": 6,
        "vocab": 40_000, "text": False, "prompt_tokens": 5, "new_tokens": 3, "llama": False, "prompt_seed": seed,
        "chat": False, "ignore_eos": True,
    }  # fmt: skip
    assert (found["failed"], found["reasons"], found["ttft_p99"]) == (3, ["429: full"], None)
    assert "429: full" in result.stdout and "infinite" in result.stdout and " nan" not in result.stdout
    assert {key for _, key, _ in fake_server.requests} == {"Bearer first:one"}
    prompts = [[body["prompt"] for *_, body in fake_server.requests]]
    for options in ((), ("--prompt-seed", str(seed))):
        del fake_server.requests[:]
        bench(*command_line, *options)
        prompts.append([body["prompt"] for *_, body in fake_server.requests])
    assert not any(prompt in prompts[0] for prompt in prompts[1]) and sorted(prompts[2]) == sorted(prompts[0])


def test_load_at_a_rate_is_an_open_loop(fake_server: FakeServer, tmp_path: Path) -> None:
    together = threading.Barrier(4)

    def reply(body: dict[str, Any]) -> tuple[int, list[str]]:
        together.wait(timeout=30)
        return 200, events(body["max_tokens"])

    fake_server.reply = reply
    result = bench(
        "load", fake_server.url, "--model", "a", "--requests", "4", "--rate", "40", "--cv", "0.5", "--slo", "25",
        "--new-tokens", "3", "--out", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
    found = read_result(tmp_path, "load")
    assert (found["asked"]["rate"], found["finished"], found["slo_attainment"]) == (40, 4, 1.0)
    assert "concurrency" not in found["asked"]


def test_load_without_any_answer(fake_server: FakeServer) -> None:
    fake_server.reply = lambda body: (401, ["no key"])
    result = bench("load", fake_server.url, "--model", "a", "--requests", "2")
    assert isinstance(result.exception, NoAnswer) and "--api-key" in result.exception.message


def test_output_folder_is_checked_first(fake_server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = bench("load", fake_server.url, "--model", "a", "--requests", "1", "--out", str(tmp_path / "file"))
    assert isinstance(result.exception, OSError) and not fake_server.requests


def test_words_and_chats(fake_server: FakeServer, tmp_path: Path) -> None:
    """For servers without token ids, without completions, or without `ignore_eos`. Tables wrap on narrow terminals."""
    fake_server.reply = lambda body: (200, events(2)) if isinstance(body["prompt"], str) else (422, ["no ids"])
    for arguments in (("load", "--model", "a"), ("load", "--model", "0", "--llama")):
        command_line = [arguments[0], fake_server.url, *arguments[1:], "--requests", "2", "--text"]
        result = CliRunner(env={"COLUMNS": "40"}).invoke(command.app, command_line)
        assert result.exit_code == 0, result.exception
        assert "…" not in result.stdout and re.search(r"ttft_p99 +│ [0-9.]+ s", result.stdout)

    def chat(body: dict[str, Any]) -> tuple[int, list[str]]:
        if "ignore_eos" in body or "prompt" in body:
            return 400, ["unknown field"]
        deltas = [{"role": "assistant", "content": ""}, {"content": "x"}, {"content": "y"}]
        return 200, [json.dumps({"choices": [{"delta": delta}]}) for delta in deltas] + ["[DONE]"]

    fake_server.reply = chat
    options = ("--model", "a", "--requests", "3", "--chat", "--no-ignore-eos", "--out", str(tmp_path))
    assert bench("load", fake_server.url, *options).exit_code == 0
    found = read_result(tmp_path, "load")
    assert (found["finished"], found["failed"], found["tokens"]) == (3, 0, 6)


@pytest.mark.parametrize(
    ("variables", "sent"),
    [
        ({"LORAMUX_API_KEYS": "a:b", "OPENAI_API_KEY": "sk"}, "Bearer a:b"),
        ({"LORAMUX_ADMIN_KEYS": "c:d\ne:f"}, "Bearer c:d"),
        ({"OPENAI_API_KEY": "sk-1"}, "Bearer sk-1"),
        ({}, None),
    ],
)
def test_key_from_the_environment(
    fake_server: FakeServer, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sent: str | None
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(command.app, ["load", fake_server.url, "--model", "a", "--requests", "1"])
    assert result.exit_code == 0, result.exception
    assert [key for _, key, _ in fake_server.requests] == [sent]


def test_own_keys_are_not_sent_to_other_machines() -> None:
    chosen: list[str] = []
    app = typer.Typer()

    @app.command()
    def choose_key(
        context: typer.Context, url: str, api_key: online.ApiKey = "", local_key: online.LocalKey = ""
    ) -> None:
        chosen.append(online._choose_key(context, api_key, local_key, url))

    for url in ("http://localhost:1", "https://example.org/v1"):
        for options in ([], ["--api-key", "mine"]):
            variables = {"LORAMUX_ADMIN_KEYS": "own", "OPENAI_API_KEY": "sk"}
            CliRunner(env=variables).invoke(app, [url, *options], catch_exceptions=False)
    assert chosen == ["own", "mine", "sk", "mine"]


def test_slora_with_failures(fake_server: FakeServer, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> tuple[int, list[str]]:
        warm_up = len(fake_server.requests) <= 9
        return (200, events(body["max_tokens"])) if warm_up or body["model"] == "s0" else (503, ["restarting"])

    fake_server.reply = reply
    result = bench(
        "slora", fake_server.url, "--few", "1", "--many", "9", "--requests", "20", "--rate", "400", "--alpha", "1",
        "--prompt", "3:6", "--output", "2:4", "--cv", "0.5", "--seed", "9", "--slo", "2", "--repeats", "2",
        "--out", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
    found = read_result(tmp_path, "slora")
    [row] = found["ratios"]
    assert (row["throughput"], row["ttft_p99"], found["capacity"], row["share"]) == (None, None, None, None)
    assert row["failed"]["few"] == 0 and row["failed"]["many"] > 0
    assert [run["adapters"] for run in found["runs"]] == [1, 9, 9, 1]
    parameters = found["asked"]
    assert (parameters["cv"], parameters["seed"], parameters["slo"], parameters["repeats"]) == (0.5, 9, 2.0, 2)
    assert (parameters["prompt"], parameters["output"], parameters["rates"]) == ([3, 6], [2, 4], [400.0])
    assert f"{row['failed']['many']} with" in result.stdout and "failed: 503: restarting" in result.stderr


@pytest.mark.parametrize(("versions", "found_tokens", "warnings"), [(2, 0, 0), (1, 7, 2)])
def test_slora_warns_of_differences_to_the_paper(
    fake_server: FakeServer, versions: int, found_tokens: int, warnings: int
) -> None:
    fake_server.stats = {
        "adapters": {"versions": versions}, "engine": {"prefix_cache": {"found_tokens": found_tokens}}
    }  # fmt: skip
    options = ("--few", "1", "--many", "2", "--requests", "2", "--rate", "100", "--repeats", "1", "--output", "2:4")
    result = bench("slora", fake_server.url, *options)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("(see --") == warnings


def test_slora_defaults_are_those_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Any] = []

    def compare(client: Client, plan: Any, log: Any) -> None:
        plans.append(plan)
        raise NoAnswer("enough")

    monkeypatch.setattr("benchmarks.slora.compare", compare)
    bench("slora", "http://x")
    [plan] = plans
    assert (plan.few, plan.many, plan.requests, plan.alphas, plan.shares) == (5, 1000, 1000, (1.0, 0.3), (0.7, 1.2))
    assert (plan.cv, plan.prompt, plan.output, plan.seed, plan.slo) == (1.0, (8, 128), (8, 128), 42, 6.0)


def test_synthetic_adapters(tiny_folder: Path, tmp_path: Path) -> None:
    options = ("--count", "5", "--model", str(tiny_folder), "--state-dir", str(tmp_path / "state"))
    assert bench("adapters", str(tmp_path / "many"), *options).exit_code == 0
    ranks = [read_folder(tmp_path / "many" / f"s{i}", name="s").ranks for i in range(5)]
    assert ranks == [[64], [32], [16], [8], [64]]
