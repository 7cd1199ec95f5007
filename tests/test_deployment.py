"""Compose file, Dockerfile, Makefile and documents match the code and each other. Docker itself is not run."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from server.cli import app
from server.settings import PREFIX, Settings, flag, load_settings, parse_keys

REPO = Path(__file__).resolve().parents[1]
READ_BY_LOAD = {f"{PREFIX}CONFIG"}
VARIABLES = {
    "MODEL": "org/name@rev",
    "ALLOWED_HOSTS": "models.example,other.example",
    "EXTRAS": "s3,urls",
    "TORCH_INDEX": "https://index.example/cpu",
}
"""Variables of docker-compose.yml, besides PORT."""


def read(name: str) -> str:
    return (REPO / name).read_text(encoding="utf-8")


def filled(text: str, told: Mapping[str, str]) -> str:
    """Substitute variables as Compose does."""

    def value(found: re.Match[str]) -> str:
        plain, name, sign, other = found.groups()
        if sign is None:
            return told.get(plain, "")
        if sign == "-":
            return told.get(name) or other
        return filled(other, told) if told.get(name) else ""

    return re.sub(r"\$(?:(\w+)|\{(\w+):([-+])([^{}]*)\})", value, text)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(read("docker-compose.yml"))
    return loaded


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The secrets that deploy/make-keys creates."""
    deploy = tmp_path_factory.mktemp("checkout") / "deploy"
    deploy.mkdir()
    (deploy / "make-keys").write_text(read("deploy/make-keys"))
    for _ in range(2):
        subprocess.run(["bash", str(deploy / "make-keys")], check=True, timeout=30)
    return deploy / "secrets"


def test_ports_are_published_on_loopback_only(compose: dict[str, Any]) -> None:
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(published) == 4 and all(port.startswith("127.0.0.1:") for port in published)


def test_images_are_pinned_and_unprivileged(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert re.fullmatch(r"[\w./-]+:(v?\d+\.\d+\.\d+|cpu|cuda)", service["image"])
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert re.search(r"^USER (?!root)\w+$", read("Dockerfile"), re.MULTILINE)


@pytest.mark.parametrize(("profile", "image"), [("cpu", "loramux:cpu"), ("gpu", "loramux:cuda")])
def test_each_profile_has_one_server(compose: dict[str, Any], profile: str, image: str) -> None:
    started = [s for s in compose["services"].values() if profile in s.get("profiles", [profile])]
    assert [service["image"] for service in started if "build" in service] == [image]
    published = [port.rpartition(":")[0] for service in started for port in service["ports"]]
    assert len(published) == len(set(published)) == 3


def test_default_profile_is_cpu() -> None:
    assert [line for line in read(".env").splitlines() if not line.startswith("#")] == ["COMPOSE_PROFILES=cpu"]


def test_mounted_folders_exist(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert (REPO / source).is_dir() if source.startswith("./") else source in compose["volumes"]


def test_environment_variables_are_settings(compose: dict[str, Any]) -> None:
    named = set(
        re.findall(rf"\b{PREFIX}[A-Z_]+\b", read("docker-compose.yml") + read("Dockerfile") + read("README.md"))
    )
    assert named - READ_BY_LOAD <= {PREFIX + name.upper() for name in Settings.model_fields}


@pytest.mark.parametrize(
    ("server", "usual", "more"), [("server", "", "s3,urls"), ("server-gpu", "cuda", "cuda,s3,urls")]
)
def test_compose_passes_variables_on(
    compose: dict[str, Any], server: str, usual: str, more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def base_and_hosts(told: Mapping[str, str]) -> tuple[object, ...]:
        for name, text in compose["services"][server]["environment"].items():
            if name.startswith(PREFIX):
                monkeypatch.setenv(name, filled(text, told))
        settings = load_settings()
        return settings.model, *settings.allowed_hosts

    def built(told: Mapping[str, str]) -> dict[str, str]:
        return {name: filled(text, told) for name, text in compose["services"][server]["build"]["args"].items()}

    monkeypatch.chdir(tmp_path)
    assert base_and_hosts({}) == (Settings().model, "loramux")
    assert base_and_hosts(VARIABLES) == (VARIABLES["MODEL"], "loramux", "models.example", "other.example")
    index = {} if usual == "cuda" else {"TORCH_INDEX": VARIABLES["TORCH_INDEX"]}
    assert built({}) == {**dict.fromkeys(index, ""), "EXTRAS": usual}
    assert built(VARIABLES) == {**index, "EXTRAS": more}


def test_image_installs_the_selected_extras() -> None:
    (what,) = re.findall(r'^RUN pip install ("\..*)$', read("Dockerfile"), re.MULTILINE)
    for extras, whole in (("", ".[hub]"), ("cuda,s3", ".[hub,cuda,s3]")):
        told = subprocess.run(["sh", "-c", f"echo {what}"], env={"EXTRAS": extras}, capture_output=True, text=True)
        assert told.stdout == f"{whole}\n"


def test_make_keys_keeps_existing_keys(compose: dict[str, Any], secrets: Path) -> None:
    made = {p.name: p.read_text() for p in secrets.iterdir()}
    assert {s["file"] for s in compose["secrets"].values()} == {f"./deploy/secrets/{name}" for name in made}
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    assert parse_keys(made["metrics_key"]) == {"prometheus": made["prometheus_credentials"]}
    assert len({*parse_keys(made["api_keys"]).values(), *parse_keys(made["admin_keys"]).values()}) == 2
    assert all(len(text) >= 32 for text in made.values())
    subprocess.run(["bash", str(secrets.parent / "make-keys")], check=True, timeout=30)
    assert {p.name: p.read_text() for p in secrets.iterdir()} == made
    for lost in ("prometheus_credentials", "metrics_key"):
        (secrets / lost).unlink()
        subprocess.run(["bash", str(secrets.parent / "make-keys")], check=True, timeout=30)
        assert {p.name: p.read_text() for p in secrets.iterdir()} == made


def test_prometheus_scrapes_the_compose_server(compose: dict[str, Any]) -> None:
    (job,) = yaml.safe_load(read("deploy/prometheus/prometheus.yml"))["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    server = compose["services"]["server"]
    host = target.removesuffix(":8000")
    assert host in server["networks"]["default"]["aliases"]
    assert filled(server["environment"]["LORAMUX_ALLOWED_HOSTS"], {}) == host
    assert Path(job["authorization"]["credentials_file"]).name in compose["services"]["prometheus"]["secrets"]


def test_dockerignore_matches_copied_files() -> None:
    sent = {line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (?!--from)(.*)$", read("Dockerfile"), re.M) for name in line.split()}
    assert sent == copied - {"./"}
    assert all((REPO / name).exists() for name in sent)


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md", "docs/adapters.md", "docs/operations.md"])
def test_documents_name_existing_targets_flags_and_variables(name: str) -> None:
    text = read(name)
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)\b|`make ([a-z-]+)", text, re.MULTILINE)) <= {
        pair for target in targets for pair in ((target, ""), ("", target))
    }
    options = {o for c in get_command(app).commands.values() for p in c.params for o in p.opts}  # type: ignore[attr-defined]
    options |= {flag(name) for name in Settings.model_fields}
    foreign = {"--build-arg", "--cpus", "--detach", "--from-literal", "--help", "--init", "--restart", "--stop-timeout"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= options | foreign
    variables = set(re.findall(rf"\b{PREFIX}[A-Z_]+\b", text))
    assert variables - READ_BY_LOAD <= {PREFIX + name.upper() for name in Settings.model_fields}


def commands(*arguments: str, **environment: str) -> list[str]:
    """The commands that make would run."""
    run = subprocess.run(
        ["make", "--dry-run", *arguments],
        cwd=REPO,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return run.stdout.replace("\\\n", "").splitlines()


def test_make_reinstalls_when_a_compiler_appears(tmp_path: Path) -> None:
    def installs() -> bool:
        return any("pip" in line for line in commands("serve", f"VENV={tmp_path}", CXX=compiler))

    def stamp(*names: str) -> None:
        for name in names:
            (tmp_path / name).touch()
            os.utime(tmp_path / name, (later, later))

    later = time.time() + 60
    stamp(".made", ".torch", ".installed")
    compiler = "no-such-compiler"
    assert not installs()
    compiler = "sh"
    assert installs()
    stamp(".compiler")
    assert not installs()


def test_make_serve_passes_settings() -> None:
    def command(*arguments: str, **environment: str) -> list[str]:
        last = commands("--always-make", "serve", *arguments, **environment)[-1]
        return shlex.split(last.split("loramux ")[1])

    assert command() == ["serve"]
    assert command("PORT=9000", "ARGS=--max-mix 2") == ["serve", "--port", "9000", "--max-mix", "2"]
    assert command(PORT="9001", HOST="this-machine", MODEL="x") == ["serve", "--port", "9001"]
    assert command("MODEL=a b", "STATE_DIR=/s") == ["serve", "--model", "a b", "--state-dir", "/s"]


def test_make_dashboard_passes_only_given_variables() -> None:
    def told(*arguments: str, **environment: str) -> dict[str, str]:
        words = shlex.split(commands("dashboard", *arguments, **environment)[-4])
        assert words[0] == "env"
        words = words[1 : words.index("docker")]
        while words[:1] == ["-u"]:
            kept.pop(words[1], None)
            words = words[2:]
        return dict(word.split("=", 1) for word in words)

    def reaches(*arguments: str, **environment: str) -> dict[str, str]:
        kept.clear()
        kept.update(environment)
        return kept | told(*arguments, **environment)

    kept: dict[str, str] = {}

    assert set(re.findall(r"\$\{(\w+)", read("docker-compose.yml"))) == {"PORT", *VARIABLES}
    assert reaches() == {}
    assert reaches(*(f"{name}={value}" for name, value in VARIABLES.items()), PORT="9000") == {
        "PORT": "9000",
        **VARIABLES,
    }
    assert reaches(**VARIABLES) == {"TORCH_INDEX": VARIABLES["TORCH_INDEX"]}


@pytest.mark.parametrize(("server", "other"), [("server", "server-gpu"), ("server-gpu", "server")])
def test_make_dashboard_removes_the_other_server_after_the_build(server: str, other: str) -> None:
    lines = [line for line in commands("dashboard", f"SERVER={server}") if "docker compose " in line]
    build, end, start = lines
    assert build.endswith(f"docker compose build {server}")
    assert end == f"docker compose rm --stop --force {other}" and start.endswith(f" {server} prometheus grafana")


def test_make_rejects_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = -m ] && mkdir -p "$3"\n')
    old.chmod(0o755)
    venv = tmp_path / "venv"
    run = subprocess.run(
        ["make", f"VENV={venv}", f"PYTHON={old}", f"{venv}/.made"], cwd=REPO, capture_output=True, text=True, timeout=60
    )
    assert run.returncode != 0 and "Python 3.11 or later is required" in run.stderr and not venv.exists()


def test_containers_restart_and_have_time_to_drain(compose: dict[str, Any]) -> None:
    run = shlex.split(re.search(r"^docker run (.*loramux)$", read("docs/quickstart.md").replace("\\\n", ""), re.M)[1])  # type: ignore[index]
    servers = [compose["services"][name] for name in ("server", "server-gpu")]
    assert {server["restart"] for server in servers} == {run[run.index("--restart") + 1]} == {"unless-stopped"}
    assert "--detach" in run
    assert float(run[run.index("--stop-timeout") + 1]) > Settings().drain
