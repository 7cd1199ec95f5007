"""`loramux adapters`: inspects and changes the adapters of a running server, and checks adapter folders."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.logs import fail
from server.cli.options import AsJson, with_settings
from server.cli.output import format_size, print_json, stdout
from server.errors import BadSetting, InvalidRequest, RemoteError, ServerError
from server.settings import Settings, parse_keys

if TYPE_CHECKING:
    from server.model.checkpoint import Checkpoint

app = typer.Typer(help="Adapters of a running server (--host, --port), and checks of adapter folders.")
_client = with_settings(
    "host",
    "port",
    "admin_keys_file",
    "api_keys_file",
    texts={"host": "address of the server", "port": "port of the server"},
    insecure=True,
)
"""Decorator for commands that call a server."""
READ_TIMEOUT = 120.0
Name = Annotated[str, typer.Argument(help="Name of the adapter.")]
SOURCE = "Path relative to the server's adapter directory, or org/name@revision, or a URL."


@app.command("list")
@_client
def list_(settings: Settings, as_json: AsJson = False) -> None:
    """List the adapters, and the rejected folders with the reasons."""
    from rich.table import Column, Table

    answer = _call(settings, "GET", "/adapters")
    if not answer.keys() >= {"adapters", "rejected"}:
        raise _not_loramux(_address(settings))
    if as_json:
        print_json(answer)
        return
    columns = ("tier", "size", "ranks", "targets", "leases", "pinned", "tasks")
    table = Table(
        Column("version", overflow="fold", min_width=24), *(Column(name, overflow="fold") for name in columns), box=None
    )
    for a in answer["adapters"]:
        ranks, targets = ", ".join(map(str, a["ranks"])), ", ".join(t.removesuffix("_proj") for t in a["targets"])
        pinned, tasks = "yes" if a["pinned"] else "", ", ".join(a["tasks"])
        table.add_row(a["version"], a["tier"], format_size(a["bytes"]), ranks, targets, str(a["leases"]), pinned, tasks)
    stdout().print(table)
    for r in answer["rejected"]:
        stdout().print(f"rejected: {r['path']}: {r['reason']}")


@app.command()
@_client
def show(settings: Settings, name: Name, as_json: AsJson = False) -> None:
    """Show one adapter: versions, used config keys, notes and card."""
    _print_adapter(_call(settings, "GET", f"/adapters/{_quote(name)}"), as_json)


@app.command()
@_client
def load(
    settings: Settings,
    name: Name,
    source: Annotated[str, typer.Argument(help=SOURCE)],
    replace: Annotated[bool, typer.Option(help="Publish a new version of an existing adapter.")] = False,
    as_json: AsJson = False,
) -> None:
    """Load an adapter from a source that the server can read."""
    if replace:
        _print_adapter(_call(settings, "PUT", f"/adapters/{_quote(name)}", {"source": source}), as_json)
    else:
        _print_adapter(_call(settings, "POST", "/adapters", {"name": name, "source": source}), as_json)


@app.command("roll-back")
@_client
def roll_back(
    settings: Settings, version: Annotated[str, typer.Argument(help="name@digest")], as_json: AsJson = False
) -> None:
    """Go back to an earlier version of an adapter."""
    name = version.partition("@")[0]
    _print_adapter(_call(settings, "PUT", f"/adapters/{_quote(name)}", {"version": version}), as_json)


@app.command()
@_client
def retire(settings: Settings, name: Name, as_json: AsJson = False) -> None:
    """Remove an adapter. Running requests that use it finish."""
    _print_adapter(_call(settings, "DELETE", f"/adapters/{_quote(name)}"), as_json)


@app.command()
@_client
def pin(settings: Settings, name: Name, as_json: AsJson = False) -> None:
    """Keep an adapter in RAM."""
    _print_adapter(_call(settings, "POST", f"/adapters/{_quote(name)}/pin"), as_json)


@app.command()
@_client
def unpin(settings: Settings, name: Name, as_json: AsJson = False) -> None:
    """Allow an adapter to be evicted from RAM again."""
    _print_adapter(_call(settings, "POST", f"/adapters/{_quote(name)}/unpin"), as_json)


@app.command()
@_client
def prefetch(settings: Settings, name: Name, as_json: AsJson = False) -> None:
    """Load an adapter into RAM before its first request."""
    _print_adapter(_call(settings, "POST", f"/adapters/{_quote(name)}/prefetch"), as_json)


@app.command()
@with_settings("model", "state_dir", "adapter_dir", "max_rank")
def check(
    settings: Settings,
    folder: Annotated[Path, typer.Argument(help="Adapter folder in PEFT format.", exists=True, file_okay=False)],
    as_json: AsJson = False,
) -> None:
    """Read an adapter folder as the server does, and report what is used or why it is rejected. Needs no server.

    If the base is on this machine, the shapes are checked too. An invalid task.json gives exit status 1.
    """
    from adapters.peft_format import read_folder
    from adapters.schemas import base_notes
    from server.model.checkpoint import open_checkpoint
    from server.sources.catalogue import names_of
    from server.sources.models import locate

    base = locate(settings.model, settings.state_dir)
    checkpoint = None if base is None else open_checkpoint(base.path)
    reserved = () if base is None else (base.name,)
    notes, name = _check_location(folder, settings.watched_dir, reserved)
    is_named = not notes
    shapes = None if checkpoint is None else checkpoint.config.linear_shapes()
    weights = read_folder(folder, name=name, max_rank=settings.max_rank, shapes=shapes)
    details = {k: v for k, v in weights.metadata.items() if k in ("honoured", "harmless", "notes", "base")}
    if base is None:
        notes = [f"{settings.model} is not on this machine, so the shapes are not checked", *notes]
    else:
        notes = [*base_notes(details["base"], names_of(base.name)), *notes]
    details["notes"] = [*details["notes"], *notes]
    body = weights.metadata["task"]
    task, problem = _check_task(name if is_named else "unnamed", body, reserved, checkpoint)
    if not is_named and not (isinstance(body, dict) and body.get("task")):
        task = None  # it gets the name of the folder, which must change
    result = {
        "version": weights.version.label,
        "ranks": weights.ranks,
        "targets": weights.targets,
        "modules": len(weights.modules),
        "file_bytes": weights.nbytes,
        "fits": None if base is None else base.name,
        "task": task,
        **details,
    }
    if problem is not None and as_json:
        result["error"] = {"message": problem, "type": "invalid_adapter", "param": "task"}
    _print_adapter(result, as_json)
    if problem is not None:
        fail(problem)


def _check_location(folder: Path, watched: Path, reserved: Collection[str]) -> tuple[list[str], str]:
    """Notes about the folder's name and place, and the name that the adapter would have.

    Raises InvalidAdapter for a folder in the adapter directory that is not served because of its name.
    """
    from adapters.catalog import check_name
    from adapters.directory_watcher import signature_of
    from adapters.errors import InvalidAdapter
    from adapters.weights import RESERVED

    place = Path(os.path.abspath(folder))  # keeps the name of a symbolic link
    is_watched = place.parent.resolve() == watched.resolve()
    try:
        check_name(place.name, RESERVED.union(reserved))
    except InvalidAdapter as error:
        if is_watched and not place.name.startswith("."):  # the server ignores hidden folders
            raise
        return [f"to serve it, give it another name: {error.message}"], place.name
    if is_watched:
        signature_of(place, watched)
    return [], place.name


def _check_task(
    adapter: str, body: Any, reserved: Collection[str], checkpoint: Checkpoint | None
) -> tuple[str | None, str | None]:
    """The name of the task in the folder's task.json, or the reason why the server would ignore it."""
    from adapters.errors import AdapterError
    from server.tasks.definitions import check_consistency, from_folder

    if body is None:
        return None, None
    try:
        task = from_folder(adapter, body, reserved=reserved)
        if checkpoint is not None and "stop_token_ids" in task.defaults:
            check_consistency(task, checkpoint.vocabulary().size)
    except (InvalidRequest, AdapterError, ValueError) as error:
        return None, f"The adapter would be served without its task, because task.json is invalid: {error}"
    return task.name, None


def _print_adapter(adapter: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(adapter)
        return
    for name, value in adapter.items():
        if text := _format_field(name, value):
            stdout().print(f"{name:<10} {text}")


def _format_field(name: str, value: Any) -> str:
    """A field for people; empty if there is nothing to show."""
    if name == "versions":
        value = [v["version"] for v in value]
    if value is None:
        return ""
    if name in ("bytes", "file_bytes"):
        return format_size(value)
    if name == "loaded_at":
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _quote(name: str) -> str:
    return urllib.parse.quote(name, safe="", errors="surrogateescape")


def _call(settings: Settings, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Call the server and return the JSON object of its answer.

    Raises:
        RemoteError: the server answered with an error.
        ServerError: no loramux server answers.
        BadSetting: the address or the key file is invalid.
    """
    url = _address(settings)
    request = urllib.request.Request(url + path, method=method)
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    for name, secret in list(_keys(settings).items())[:1]:
        request.add_header("Authorization", f"Bearer {name}:{secret}")
    try:
        timeout = READ_TIMEOUT if method == "GET" else None  # a server may download an adapter for --fetch-time
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout) as answer:
            text = answer.read()
        result = json.loads(text) if text else {}
        if isinstance(result, dict):
            return result
    except urllib.error.HTTPError as e:
        raise _remote_error(e) from None
    except OSError as e:
        reason = getattr(e, "reason", e)
        if isinstance(reason, TimeoutError):
            raise ServerError(f"The server at {url} did not answer within {READ_TIMEOUT:.0f} s.") from None
        raise ServerError(f"No server answers at {url}: {reason}. Start one with `loramux serve`.") from None
    except (http.client.HTTPException, ValueError):  # not HTTP, or not JSON
        pass
    raise _not_loramux(url)


def _address(settings: Settings) -> str:
    """The URL of the server. Raises BadSetting if the host is invalid."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '[::]') else host}:{settings.port}"
    try:
        settings.host.encode("idna")
        valid = urllib.parse.urlsplit(url).hostname is not None and not re.search(r"[\x00-\x20\x7f/?#@\\]", host)
    except ValueError:
        valid = False
    if not valid:
        raise BadSetting(f"{settings.host!r} is not a valid host. Check --host.", "host")
    return url


def _not_loramux(url: str) -> ServerError:
    return ServerError(f"The server at {url} is not loramux. Check --host and --port.")


def _keys(settings: Settings) -> dict[str, str]:
    """The admin keys by id, or the inference keys if there are none. Raises BadSetting."""
    for param, given, file in (
        ("admin_keys", settings.admin_keys, settings.admin_keys_file),
        ("api_keys", settings.api_keys, settings.api_keys_file),
    ):
        found = parse_keys(given.get_secret_value(), param)
        if file is not None:
            try:
                text = file.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as e:
                raise BadSetting(f"{param}_file cannot be read: {e}", f"{param}_file") from None
            found = found | parse_keys(text, f"{param}_file") | found  # the variable wins over the file
        if found:
            return found
    return {}


def _remote_error(error: urllib.error.HTTPError) -> ServerError:
    """The error in the server's answer, with a hint about keys."""
    try:
        remote = RemoteError(json.loads(error.read())["error"])
    except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        return ServerError(f"The server answered with status {error.code} {error.reason}.")
    if error.code in (401, 403):
        remote.message += (
            " This command uses LORAMUX_ADMIN_KEYS or --admin-keys-file. To read, LORAMUX_API_KEYS or --api-keys-file"
            " is enough."
        )
    return remote
