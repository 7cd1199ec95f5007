"""The files that run outside Python agree with the code and with one another: Compose, Dockerfile, Makefile, README.

Docker is not run here; what can be read is checked.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
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
TOLD = {
    "MODEL": "org/name@rev",
    "ALLOWED_HOSTS": "models.example,other.example",
    "EXTRAS": "s3,urls",
    "TORCH_INDEX": "https://index.example/cpu",
}
"""What Compose can be told, beside a port."""


def read(name: str) -> str:
    return (REPO / name).read_text(encoding="utf-8")


def filled(text: str, told: Mapping[str, str]) -> str:
    """As Compose fills in variables."""

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
    """What deploy/make-keys makes, in a copy of the folder."""
    deploy = tmp_path_factory.mktemp("checkout") / "deploy"
    deploy.mkdir()
    (deploy / "make-keys").write_text(read("deploy/make-keys"))
    for _ in range(2):
        subprocess.run(["bash", str(deploy / "make-keys")], check=True, timeout=30)
    return deploy / "secrets"


def test_published_on_this_machine_only(compose: dict[str, Any]) -> None:
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(published) == 4 and all(port.startswith("127.0.0.1:") for port in published)


def test_images_are_pinned_and_ours_hold_no_rights(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert re.fullmatch(r"[\w./-]+:(v?\d+\.\d+\.\d+|cpu|cuda)", service["image"])
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert re.search(r"^USER (?!root)\w+$", read("Dockerfile"), re.MULTILINE)


@pytest.mark.parametrize(("profile", "image"), [("cpu", "loramux:cpu"), ("gpu", "loramux:cuda")])
def test_each_profile_has_one_server(compose: dict[str, Any], profile: str, image: str) -> None:
    """The servers share a port and a state directory."""
    started = [s for s in compose["services"].values() if profile in s.get("profiles", [profile])]
    assert [service["image"] for service in started if "build" in service] == [image]
    published = [port.rpartition(":")[0] for service in started for port in service["ports"]]
    assert len(published) == len(set(published)) == 3


def test_where_no_profile_is_named_it_is_the_one_without_a_gpu() -> None:
    assert [line for line in read(".env").splitlines() if not line.startswith("#")] == ["COMPOSE_PROFILES=cpu"]


def test_what_is_mounted_is_there(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert (REPO / source).is_dir() if source.startswith("./") else source in compose["volumes"]


def test_variables_are_settings(compose: dict[str, Any]) -> None:
    named = set(
        re.findall(rf"\b{PREFIX}[A-Z_]+\b", read("docker-compose.yml") + read("Dockerfile") + read("README.md"))
    )
    assert named - READ_BY_LOAD <= {PREFIX + name.upper() for name in Settings.model_fields}


@pytest.mark.parametrize(
    ("server", "usual", "more"), [("server", "", "s3,urls"), ("server-gpu", "cuda", "cuda,s3,urls")]
)
def test_compose_is_told_base_hosts_and_what_is_built(
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
    assert base_and_hosts(TOLD) == (TOLD["MODEL"], "loramux", "models.example", "other.example")
    index = {} if usual == "cuda" else {"TORCH_INDEX": TOLD["TORCH_INDEX"]}  # may have builds for a CPU alone
    assert built({}) == {**dict.fromkeys(index, ""), "EXTRAS": usual}
    assert built(TOLD) == {**index, "EXTRAS": more}


def test_images_hold_the_hubs_client_and_the_extras_that_are_asked_for() -> None:
    (what,) = re.findall(r'^RUN pip install ("\..*)$', read("Dockerfile"), re.MULTILINE)
    for extras, whole in (("", ".[hub]"), ("cuda,s3", ".[hub,cuda,s3]")):
        told = subprocess.run(["sh", "-c", f"echo {what}"], env={"EXTRAS": extras}, capture_output=True, text=True)
        assert told.stdout == f"{whole}\n"


def test_keys_are_made_once_and_fit(compose: dict[str, Any], secrets: Path) -> None:
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
        assert {p.name: p.read_text() for p in secrets.iterdir()} == made, "the two belong together"


def test_prometheus_finds_the_server(compose: dict[str, Any]) -> None:
    (job,) = yaml.safe_load(read("deploy/prometheus/prometheus.yml"))["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    server = compose["services"]["server"]
    host = target.removesuffix(":8000")
    assert host in server["networks"]["default"]["aliases"]
    assert filled(server["environment"]["LORAMUX_ALLOWED_HOSTS"], {}) == host
    assert Path(job["authorization"]["credentials_file"]).name in compose["services"]["prometheus"]["secrets"]


def test_the_image_is_made_of_what_the_build_needs() -> None:
    sent = {line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (?!--from)(.*)$", read("Dockerfile"), re.M) for name in line.split()}
    assert sent == copied - {"./"}
    assert all((REPO / name).exists() for name in sent)


def test_the_readme_names_what_there_is() -> None:
    text = read("README.md")
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)\b", text)) <= targets
    options = {o for c in get_command(app).commands.values() for p in c.params for o in p.opts}  # type: ignore[attr-defined]
    options |= {flag(name) for name in Settings.model_fields}
    foreign = {"--help", "--build-arg", "--detach", "--name", "--restart", "--init", "--stop-timeout"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= options | foreign
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (REPO / target).exists()


def commands(*arguments: str, **environment: str) -> list[str]:
    """What `make` would run."""
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


def test_a_compiler_that_comes_later_has_the_package_installed_again(tmp_path: Path) -> None:
    def installs() -> bool:
        return any("pip" in line for line in commands("serve", f"VENV={tmp_path}", CXX=compiler))

    def stamp(*names: str) -> None:
        for name in names:
            (tmp_path / name).touch()
            os.utime(tmp_path / name, (later, later))

    later = time.time() + 60  # than all that the stamps depend on
    stamp(".made", ".torch", ".installed")
    compiler = "no-such-compiler"
    assert not installs()
    compiler = "sh"
    assert installs()
    stamp(".compiler")
    assert not installs()


def test_make_passes_settings_on() -> None:
    def command(*arguments: str, **environment: str) -> list[str]:
        last = commands("--always-make", "serve", *arguments, **environment)[-1]
        return shlex.split(last.split("loramux ")[1])

    assert command() == ["serve"]
    assert command("PORT=9000", "ARGS=--max-mix 2") == ["serve", "--port", "9000", "--max-mix", "2"]
    assert command(PORT="9001", HOST="this-machine", MODEL="x") == ["serve", "--port", "9001"]
    assert command("MODEL=a b", "STATE_DIR=/s") == ["serve", "--model", "a b", "--state-dir", "/s"]


def test_make_tells_compose_what_it_is_told() -> None:
    def told(*arguments: str, **environment: str) -> dict[str, str]:
        words = shlex.split(commands("dashboard", *arguments, **environment)[-4])
        assert words[0] == "env"
        words = words[1 : words.index("docker")]
        while words[:1] == ["-u"]:  # what the environment has is not passed on
            kept.pop(words[1], None)
            words = words[2:]
        return dict(word.split("=", 1) for word in words)

    def reaches(*arguments: str, **environment: str) -> dict[str, str]:
        """What Compose finds beside .env."""
        kept.clear()
        kept.update(environment)
        return kept | told(*arguments, **environment)

    kept: dict[str, str] = {}

    assert set(re.findall(r"\$\{(\w+)", read("docker-compose.yml"))) == {"PORT", *TOLD}
    assert reaches() == {}, "an empty value would take the place of one in .env"
    assert reaches(*(f"{name}={value}" for name, value in TOLD.items()), PORT="9000") == {"PORT": "9000", **TOLD}
    assert reaches(**TOLD) == {"TORCH_INDEX": TOLD["TORCH_INDEX"]}


@pytest.mark.parametrize(("server", "other"), [("server", "server-gpu"), ("server-gpu", "server")])
def test_make_ends_the_other_server_first(server: str, other: str) -> None:
    lines = [line for line in commands("dashboard", f"SERVER={server}") if "docker compose " in line]
    build, end, start = lines
    assert build.endswith(f"docker compose build {server}"), "nobody is ended for an image that cannot be built"
    assert end == f"docker compose rm --stop --force {other}" and start.endswith(f" {server} prometheus grafana")


def test_make_refuses_a_python_that_is_too_old(tmp_path: Path) -> None:
    """Before it makes an environment of it, which a later make would take for whole."""
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = -m ] && mkdir -p "$3"\n')
    old.chmod(0o755)
    venv = tmp_path / "venv"
    run = subprocess.run(
        ["make", f"VENV={venv}", f"PYTHON={old}", f"{venv}/.made"], cwd=REPO, capture_output=True, text=True, timeout=60
    )
    assert run.returncode != 0 and "Python 3.11 or later is needed" in run.stderr and not venv.exists()


def test_a_container_that_ends_by_itself_is_started_again(compose: dict[str, Any]) -> None:
    run = shlex.split(re.search(r"^docker run (.*loramux)$", read("README.md").replace("\\\n", ""), re.M)[1])  # type: ignore[index]
    servers = [compose["services"][name] for name in ("server", "server-gpu")]
    assert {server["restart"] for server in servers} == {run[run.index("--restart") + 1]} == {"unless-stopped"}
    assert "--detach" in run, "whoever ends it by Ctrl-C would find it started again"
    assert float(run[run.index("--stop-timeout") + 1]) > Settings().drain


@pytest.mark.skipif(shutil.which("flock") is None, reason="there is no flock")
def test_two_makes_install_one_after_the_other(tmp_path: Path) -> None:
    """The second one finds what the first is still making."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        '[ "$1" = -c ] && exit\n'
        '[ -e "$3" ] && { echo twice >> "$0.log"; exit 1; }\n'
        'mkdir "$3"; sleep 1; mkdir "$3/bin"; ln -s /bin/true "$3/bin/python"; echo once >> "$0.log"\n'
    )
    python.chmod(0o755)
    venv = tmp_path / "venv"
    command = ["make", f"VENV={venv}", f"PYTHON={python}", f"{venv}/.made"]
    both = [subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [run.wait(60) for run in both] == [0, 0]
    assert (tmp_path / "python.log").read_text() == "once\n" and (venv / ".made").exists()
