"""The Kubernetes objects and the systemd unit in docs/operations.md match the image and the settings."""

from __future__ import annotations

import configparser
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from server.api.auth import OPEN, Keys, known_hosts
from server.app import create_app
from server.cli import app
from server.settings import PREFIX, Settings, load_settings

REPO = Path(__file__).resolve().parents[2]
AFTER_DRAIN = 15
"""Seconds that shutdown may take after --drain."""


def block(language: str) -> str:
    """The only code block of docs/operations.md in `language`."""
    page = (REPO / "docs" / "operations.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return str(found)


def image(what: str) -> str:
    found = re.search(what, (REPO / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    return {each["kind"]: each for each in yaml.safe_load_all(block("yaml"))}


@pytest.fixture(scope="module")
def pod(objects: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = objects["Deployment"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (one,) = pod["containers"]
    return dict(one)


def test_kubernetes_objects_match(objects: dict[str, Any], pod: dict[str, Any], container: dict[str, Any]) -> None:
    deployment, service = objects["Deployment"]["spec"], objects["Service"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    assert deployment["replicas"] == 1 and deployment["strategy"] == {"type": "Recreate"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    assert (
        volumes["state"]["persistentVolumeClaim"]["claimName"] == objects["PersistentVolumeClaim"]["metadata"]["name"]
    )
    (port,) = service["spec"]["ports"]
    assert port["targetPort"] in {given["name"] for given in container["ports"]} and port["port"] == Settings().port


def test_pod_matches_image(pod: dict[str, Any], container: dict[str, Any]) -> None:
    user = int(image(r"^USER (\d+)$"))
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == user
    assert container["ports"] == [{"name": "http", "containerPort": int(image(r"^EXPOSE (\d+)$"))}]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["state"] == image(r"LORAMUX_STATE_DIR=(\S+)") == image(r"^VOLUME (\S+)$")
    assert pod["terminationGracePeriodSeconds"] > Settings().drain + AFTER_DRAIN + 5


def test_pod_environment_is_valid_settings(
    pod: dict[str, Any], container: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in container["env"]:
        assert variable["name"].startswith(PREFIX)
        monkeypatch.setenv(variable["name"], variable["value"])
    settings = load_settings({"host": "0.0.0.0"})
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    files = (settings.api_keys_file, settings.admin_keys_file)
    page = (REPO / "docs" / "operations.md").read_text(encoding="utf-8")
    for file in files:
        assert file is not None and str(file.parent) == mounts["keys"]
        assert f"--from-literal={file.name}=" in page
    assert "loramux" in settings.allowed_hosts


def test_probes_use_open_routes(container: dict[str, Any], tmp_path: Path) -> None:
    routes = create_app(Settings(state_dir=tmp_path)).openapi()["paths"]
    asked = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in asked.items()} == {
        "startup": "/health/ready",
        "readiness": "/health/ready",
        "liveness": "/health/live",
    }
    for probe in asked.values():
        assert probe["path"] in routes and OPEN["GET"].fullmatch(probe["path"])
        assert probe["port"] in {given["name"] for given in container["ports"]}
        (header,) = probe["httpHeaders"]
        assert header["name"] == "Host" and header["value"] in known_hosts(Settings())


def test_systemd_unit_restarts_and_allows_drain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment]
    unit.read_string(block("ini"))
    service = unit["Service"]
    assert service["Restart"] == "on-failure" and service["OOMPolicy"] == "continue"
    assert float(service["TimeoutStopSec"]) > Settings().drain + AFTER_DRAIN
    command = shlex.split(service["ExecStart"])
    assert Path(command[0]) == Path(service["WorkingDirectory"]) / ".venv" / "bin" / "loramux" and command[1] == "serve"
    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    monkeypatch.chdir(tmp_path)
    for assignment in shlex.split(service["Environment"]):
        name, _, value = assignment.partition("=")
        place = tmp_path / Path(value).name
        place.write_text(f"{place.name}:{'k' * 32}")
        monkeypatch.setenv(name, str(place))
    given = serve.make_context("serve", command[2:]).params
    settings = load_settings({name: value for name, value in given.items() if name in Settings.model_fields})
    assert Keys(settings).inference and Keys(settings).admin and settings.host == "0.0.0.0"
