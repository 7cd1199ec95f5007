"""`loramux adapters`: see and change the adapters of a running server, and check a folder without one."""

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
from server.cli.output import out, print_json, size
from server.errors import BadSetting, InvalidRequest, RemoteError, ServerError
from server.settings import Settings, parse_keys

if TYPE_CHECKING:
    from server.model.checkpoint import Checkpoint

app = typer.Typer(help="Adapters of a running server (--host, --port), or a folder of one (check).")
_of_a_server = with_settings(
    "host",
    "port",
    "admin_keys_file",
    "api_keys_file",
    texts={"host": "address of the server to talk to", "port": "port of the server to talk to"},
    insecure=True,
)
"""Whether the server has keys is its own matter: a client serves nobody."""
PATIENCE = 120.0
"""Seconds that a server may take to tell what it knows."""
Name = Annotated[str, typer.Argument(help="Name of the adapter.")]
SOURCE = "Folder, as a path from the server's adapter directory on (`formal`), or org/name@revision, or a URL."


@app.command("list")
@_of_a_server
def list_(settings: Settings, as_json: AsJson = False) -> None:
    """List the adapters, and the folders that were rejected with the reason."""
    from rich.table import Column, Table

    answer = _call(settings, "GET", "/adapters")
    if not answer.keys() >= {"adapters", "rejected"}:
        raise _another(_address(settings))
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
        table.add_row(a["version"], a["tier"], size(a["bytes"]), ranks, targets, str(a["leases"]), pinned, tasks)
    out().print(table)
    for r in answer["rejected"]:
        out().print(f"rejected: {r['path']}: {r['reason']}")


@app.command()
@_of_a_server
def show(settings: Settings, name: Name, as_json: AsJson = False) -> None:
    """Show one adapter: versions, the config keys that were honoured, notes, its card."""
    _tell(_call(settings, "GET", f"/adapters/{_quoted(name)}"), as_json)


@app.command()
@_of_a_server
def load(
    settings: Settings,
    name: Name,
    source: Annotated[str, typer.Argument(help=SOURCE)],
    replace: Annotated[bool, typer.Option(help="Publish as the new version of a name that is in use.")] = False,
    as_json: AsJson = False,
) -> None:
    """Load an adapter from a place that the server may read."""
    if replace:
        _tell(_call(settings, "PUT", f"/adapters/{_quoted(name)}", {"source": source}), as_json)
    else:
        _tell(_call(settings, "POST", "/adapters", {"name": name, "source": source}), as_json)


@app.command("roll-back")
@_of_a_server
def roll_back(
    settings: Settings, version: Annotated[str, typer.Argument(help="name@digest")], as_json: AsJson = False
) -> None:
    """Move a name back to a version that it had before."""
    name = version.partition("@")[0]
    _tell(_call(settings, "PUT", f"/adapters/{_quoted(name)}", {"version": version}), as_json)


@app.command()
@_of_a_server
def retire(settings: Settings, name: Name, as_json: AsJson = False) -> None:
    """Take an adapter out of service; requests that hold it finish."""
    _tell(_call(settings, "DELETE", f"/adapters/{_quoted(name)}"), as_json)


@app.command()
@_of_a_server
def pin(settings: Settings, name: Name, as_json: AsJson = False) -> None:
    """Keep an adapter in RAM."""
    _tell(_call(settings, "POST", f"/adapters/{_quoted(name)}/pin"), as_json)


@app.command()
@_of_a_server
def unpin(settings: Settings, name: Name, as_json: AsJson = False) -> None:
    """Let an adapter be evicted again."""
    _tell(_call(settings, "POST", f"/adapters/{_quoted(name)}/unpin"), as_json)


@app.command()
@_of_a_server
def prefetch(settings: Settings, name: Name, as_json: AsJson = False) -> None:
    """Bring an adapter into RAM before its first request."""
    _tell(_call(settings, "POST", f"/adapters/{_quoted(name)}/prefetch"), as_json)


@app.command()
@with_settings("model", "state_dir", "adapter_dir", "max_rank")
def check(
    settings: Settings,
    folder: Annotated[Path, typer.Argument(help="A folder as PEFT writes it.", exists=True, file_okay=False)],
    as_json: AsJson = False,
) -> None:
    """Read a PEFT folder as the server would, and say what was honoured or why it is refused. Needs no server.

    Whether it fits the base is looked at if that is on this machine. A task.json that the server would serve the
    adapter without is told, and ends the command with status 1.
    """
    from adapters.peft_format import read_folder
    from adapters.schemas import of_another_base
    from server.model.checkpoint import open_checkpoint
    from server.sources.catalogue import names_of
    from server.sources.models import locate

    base = locate(settings.model, settings.state_dir)
    checkpoint = None if base is None else open_checkpoint(base.path)
    reserved = () if base is None else (base.name,)
    notes, name = _check_place(folder, settings.watched_dir, reserved)
    named = not notes  # else it is yet to be called something, and its task with it
    shapes = None if checkpoint is None else checkpoint.config.linear_shapes()
    weights = read_folder(folder, name=name, max_rank=settings.max_rank, shapes=shapes)
    told = {k: v for k, v in weights.metadata.items() if k in ("honoured", "harmless", "notes", "base")}
    if base is None:
        notes = [f"whether it fits {settings.model} is not known: that is not on this machine", *notes]
    else:
        notes = [*of_another_base(told["base"], names_of(base.name)), *notes]
    told["notes"] = [*told["notes"], *notes]
    brought = weights.metadata["task"]
    task, fault = _task(name if named else "unnamed", brought, reserved, checkpoint)
    if not named and not (isinstance(brought, dict) and brought.get("task")):
        task = None  # it has the name that the folder will have
    found = {
        "version": weights.version.label,
        "ranks": weights.ranks,
        "targets": weights.targets,
        "modules": len(weights.modules),
        "file_bytes": weights.nbytes,
        "fits": None if base is None else base.name,
        "task": task,
        **told,
    }
    if fault is None:
        return _tell(found, as_json)
    _tell(
        {**found, "error": {"message": fault, "type": "invalid_adapter", "param": "task"}} if as_json else found,
        as_json,
    )
    fail(fault)


def _check_place(folder: Path, watched: Path, reserved: Collection[str]) -> tuple[list[str], str]:
    """What is to be said of where a folder lies and what it is called, and the name that it would have.

    Raises InvalidAdapter for one in the adapter directory that is not served for that; elsewhere it may yet be
    uploaded under another name.
    """
    from adapters.catalog import check_name
    from adapters.directory_watcher import signature_of
    from adapters.errors import InvalidAdapter
    from adapters.weights import RESERVED

    place = Path(os.path.abspath(folder))  # a link keeps its own name: it is the link that is served
    is_watched = place.parent.resolve() == watched.resolve()
    try:
        check_name(place.name, RESERVED.union(reserved))
    except InvalidAdapter as error:
        if is_watched and not place.name.startswith("."):  # which the server passes over until it is renamed
            raise
        return [f"another name is needed to serve it: {error.message}"], place.name
    if is_watched:
        signature_of(place, watched)
    return [], place.name


def _task(
    adapter: str, body: Any, reserved: Collection[str], checkpoint: Checkpoint | None
) -> tuple[str | None, str | None]:
    """The name of the task that the folder brings, if it does, or why the server would not use it."""
    from adapters.errors import AdapterError
    from server.tasks.definitions import check_together, from_folder

    if body is None:
        return None, None
    try:
        task = from_folder(adapter, body, reserved=reserved)
        if checkpoint is not None and "stop_token_ids" in task.defaults:
            check_together(task, checkpoint.vocabulary().size)
    except (InvalidRequest, AdapterError, ValueError) as error:
        return None, f"the adapter is served without its task: its task.json is not used: {error}"
    return task.name, None


def _tell(adapter: dict[str, Any], as_json: bool) -> None:
    """What is known of one adapter: a line for each thing that there is, or all of it as JSON."""
    if as_json:
        print_json(adapter)
        return
    for name, value in adapter.items():
        if shown := _shown(name, value):
            out().print(f"{name:<10} {shown}")


def _shown(name: str, value: Any) -> str:
    """A field of an adapter in words; empty where there is nothing to say."""
    if name == "versions":
        value = [v["version"] for v in value]
    if value is None:
        return ""
    if name in ("bytes", "file_bytes"):
        return size(value)
    if name == "loaded_at":
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _quoted(name: str) -> str:
    return urllib.parse.quote(name, safe="", errors="surrogateescape")


def _call(settings: Settings, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The object that the server answers. Raises RemoteError with the server's own error, ServerError, BadSetting."""
    url = _address(settings)
    request = urllib.request.Request(url + path, method=method)
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    for name, secret in _keys(settings).items():
        request.add_header("Authorization", f"Bearer {name}:{secret}")
        break
    try:
        # A server may fetch an adapter for as long as its --fetch-time says.
        patience = PATIENCE if method == "GET" else None
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=patience) as answer:
            text = answer.read()
        told = json.loads(text) if text else {}
        if isinstance(told, dict):
            return told
    except urllib.error.HTTPError as e:
        raise _told(e) from None
    except OSError as e:
        reason = getattr(e, "reason", e)
        if isinstance(reason, TimeoutError):
            raise ServerError(f"the server at {url} has not answered for {PATIENCE:.0f} s") from None
        raise ServerError(f"no server answers at {url}: {reason}; start one with `loramux serve`") from None
    except (http.client.HTTPException, ValueError):  # not HTTP, or not JSON
        pass
    raise _another(url)


def _address(settings: Settings) -> str:
    """Where the server is. Raises BadSetting for a host that no name or address can be."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '[::]') else host}:{settings.port}"
    try:
        settings.host.encode("idna")
        known = urllib.parse.urlsplit(url).hostname is not None and not re.search(r"[\x00-\x20\x7f/?#@\\]", host)
    except ValueError:
        known = False
    if not known:
        raise BadSetting(f"{settings.host!r} is no name or address of a host; see --host", "host")
    return url


def _another(url: str) -> ServerError:
    return ServerError(f"what answers at {url} is no loramux server; see --host and --port")


def _keys(settings: Settings) -> dict[str, str]:
    """The admin keys, by id; where there are none the inference keys, which may look. Raises BadSetting."""
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
            found = found | parse_keys(text, f"{param}_file") | found  # an id may be in both, as the server has it
        if found:
            return found
    return {}


def _told(error: urllib.error.HTTPError) -> ServerError:
    """The error within an answer, and where a command has its key from; of one that has none, its status."""
    try:
        told = RemoteError(json.loads(error.read())["error"])
    except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        return ServerError(f"the server answered {error.code} {error.reason}")
    if error.code in (401, 403):
        told.message += "; this command takes its key from LORAMUX_ADMIN_KEYS or --admin-keys-file, without these from"
        told.message += " LORAMUX_API_KEYS or --api-keys-file, which is enough to look"
    return told
