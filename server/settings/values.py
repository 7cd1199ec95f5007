"""Value types of settings: sizes, durations, keys, paths and lists, parsed from text."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, TypeAdapter

from server.errors import BadSetting

_BYTE_SIZE = TypeAdapter(ByteSize)
_SECONDS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_MAX_SIZE = 1 << 63
_KEY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def parse_size(text: object) -> int:
    """Bytes of "2GiB", "500MB", "4096" or an integer. Raises ValueError."""
    try:
        size = int(_BYTE_SIZE.validate_python(text))
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a size; write 2GiB, 512MiB or a number of bytes") from None
    if not 0 <= size < _MAX_SIZE:
        raise ValueError("a size must be between 0 and 8 EiB")
    return size


def parse_memory(text: object) -> int | float:
    """Bytes, or a share of free memory: a number up to 1 with a decimal point. Raises ValueError."""
    share = text if isinstance(text, float) else None
    if isinstance(text, str) and re.fullmatch(r"\s*[01]?\.\d+\s*", text):
        share = float(text)
    if share is None:
        return parse_size(text)
    if not 0 < share <= 1:
        raise ValueError("a share of memory must be over 0 and at most 1; write a size as 20GiB")
    return share


def parse_duration(text: object) -> float:
    """Seconds of "300s", "5m", "250ms", "1h" or a number of seconds. Raises ValueError."""
    if isinstance(text, float) and math.isfinite(text) and text >= 0:
        return text
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*(ms|[smhd]?)\s*", str(text))
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write 300s, 5m, 250ms or a number of seconds")
    return float(match[1]) * _SECONDS[match[2]]


def parse_keys(text: str, param: str = "api_keys") -> dict[str, str]:
    """Key id -> secret of `id:secret` entries, separated by commas or newlines.

    Raises:
        BadSetting: an entry is malformed. The message never contains a secret.
    """
    keys: dict[str, str] = {}
    for number, entry in enumerate((e.strip() for e in re.split(r"[,\n]", text)), 1):
        if not entry:
            continue
        name, colon, secret = entry.partition(":")
        if not colon or not secret or not _KEY_ID.fullmatch(name):
            raise BadSetting(f"{param}: entry {number} is not `id:secret` (id: letters, digits, `.`, `_`, `-`)", param)
        if not (secret.isascii() and secret.isprintable()):
            raise BadSetting(f"{param}: the secret of {name!r} may only contain printable ASCII characters", param)
        if name in keys:
            raise BadSetting(f"{param}: the id {name!r} is given twice", param)
        keys[name] = secret
    return keys


_Given = TypeVar("_Given", Path, Path | None)


def given_path(path: _Given) -> _Given:
    """A path from a command line or recipe, with `~` expanded. Raises BadSetting."""
    try:
        return path if path is None else _expand_user(path)
    except ValueError as error:
        raise BadSetting(str(error)) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _expand_user(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"the home directory in {path} is unknown") from None


def _not_empty(value: object) -> object:
    if value == "":
        raise ValueError("must not be empty; leave it out for the default")
    return value


def _comma_list(value: object) -> object:
    return tuple(p.strip() for p in value.split(",") if p.strip()) if isinstance(value, str) else value


def _check_hosts(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if not re.fullmatch(r"\*|[^\s/:\[\]]+|\[[0-9A-Fa-f:.]+\]", name):
            raise ValueError(f"{name!r} is not a host name; leave out scheme, port and path, put IPv6 into brackets")
    return names


def _without_brackets(host: str) -> str:
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _or_none(word: str, parse: Callable[[Any], Any] = lambda value: value) -> BeforeValidator:
    """None for `word`, else `parse`."""
    return BeforeValidator(lambda value: None if value is None or value == word else parse(value))


AUTO = _or_none("auto")

Size = Annotated[int, BeforeValidator(parse_size)]
Duration = Annotated[float, BeforeValidator(parse_duration)]
Timeout = Annotated[Duration, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, BeforeValidator(_not_empty)]
FilePath = Annotated[Path, BeforeValidator(_not_empty), AfterValidator(_expand_user)]
Names = Annotated[tuple[str, ...], BeforeValidator(_comma_list)]
Hosts = Annotated[Names, AfterValidator(_check_hosts)]
Host = Annotated[str, AfterValidator(_without_brackets)]

AutoSize = Annotated[int | None, _or_none("auto", parse_size)]
AutoMemory = Annotated[int | float | None, _or_none("auto", parse_memory)]
AutoInt = Annotated[int | None, AUTO]
AutoCount = Annotated[Count | None, AUTO]
AutoLength = Annotated[Annotated[int, Field(ge=2)] | None, AUTO]
AutoRate = Annotated[Annotated[float, Field(gt=0)] | None, AUTO]
AutoPath = Annotated[FilePath | None, AUTO]
PathOrNone = Annotated[FilePath | None, _or_none("none")]
