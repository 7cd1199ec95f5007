"""Reading Prometheus' text format in tests."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families


def families(text: str | bytes) -> dict[str, Any]:
    """All families by name. No family may appear twice."""
    text = text if isinstance(text, str) else text.decode()
    found = list(text_string_to_metric_families(text))
    assert len({f.name for f in found}) == len(found)
    return {f.name: f for f in found}


def value(text: str | bytes, name: str, **labels: str) -> float | None:
    """The value of the first sample with these labels, None if there is none."""
    for family in families(text).values():
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return float(sample.value)
    return None
