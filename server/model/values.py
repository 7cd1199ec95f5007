"""Values of a config.json or of GGUF metadata, by their key: of the type that they must have, or refused by name.

Owns what a number is there, and how much of a value an error echoes. Does not know what any key means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from server.errors import BadModel


def cut(text: object, most: int = 80) -> str:
    """What an error echoes of a file's value: its beginning, since a file may give millions of characters."""
    return str(text)[:most]


def whole(
    values: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1, most: int | None = None
) -> int:
    """A whole number from `least` to `most`; without one, or with null, `default`. Raises BadModel."""
    value = values.get(key)
    if value is None:
        value = default
    if isinstance(value, np.ndarray | list):  # GGUF may give one number a layer
        listed = value.tolist() if isinstance(value, np.ndarray) else value
        if not listed or any(other != listed[0] for other in listed):
            raise BadModel(f"{key} differs between layers, which is not served")
        value = listed[0]
    if value is None:
        raise BadModel(f"the model's config lacks {key}")
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "positive whole number" if least == 1 else f"whole number of at least {least}"
        raise BadModel(f"the model's {key} is {cut(repr(value))}, not a {kind}")
    if most is not None and value > most:
        raise BadModel(f"the model's {key} is {cut(value)}, and the most that is read is {most}")
    return value


def real(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number, which may be infinite or none as GGUF has them; without one `default`. Raises BadModel."""
    if default is None and key not in values:
        raise BadModel(f"the model's config lacks {key}")
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadModel(f"{key} must be a number, not {cut(repr(value))}")
    try:
        return float(value)
    except OverflowError:
        raise BadModel(f"{key} is too large a number") from None


def above_zero(values: Mapping[str, Any], key: str, default: float | None = None, of: str = "the model") -> float:
    """A finite number above 0; without one `default`. Raises BadModel."""
    value = real(values, key, default)
    if not (math.isfinite(value) and value > 0):
        raise BadModel(f"{of} has the {key} {value}, which is no positive number")
    return value


def told(config: Mapping[str, Any], key: str, kind: type, name: str) -> Any:
    """What is under `key`, None for null. Raises BadModel unless it is a `kind`, which people know as `name`."""
    value = config.get(key)
    if value is not None and not isinstance(value, kind):
        raise BadModel(f"the model's {key} is {cut(repr(value))}, not {name}")
    return value
