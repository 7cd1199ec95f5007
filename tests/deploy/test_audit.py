"""`make audit`: output and exit status for each kind of pip-audit result. A fake pip_audit module stands in for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

AUDIT = Path(__file__).resolve().parents[2] / "deploy" / "audit.py"
CLEAN = {"name": "one", "version": "1.0", "vulns": []}
SKIPPED = {"name": "two", "skip_reason": "Dependency not found on PyPI and could not be audited: two (2.0)"}


def found(*fixes: str) -> dict[str, object]:
    vulnerability = {"id": "PYSEC-2026-1", "aliases": ["CVE-2026-1"], "fix_versions": list(fixes), "description": ""}
    return {"name": "three", "version": "3.0", "vulns": [vulnerability]}


@pytest.mark.parametrize(
    ("packages", "status", "says"),
    [
        ([CLEAN], 0, "1 of 1 packages checked, 0 fixable vulnerabilities"),
        ([CLEAN, SKIPPED], 0, "not checked, unknown to the service: two"),
        ([SKIPPED], 0, "NOT CHECKED: the vulnerability service knows none of the 1 packages"),
        ([CLEAN, found("3.1", "4.0")], 1, "three 3.0: PYSEC-2026-1 CVE-2026-1: fixed in 3.1, 4.0"),
        ([CLEAN, found()], 0, "three 3.0: PYSEC-2026-1 CVE-2026-1: no fix is available"),
        ("requests.exceptions.ConnectionError: Max retries exceeded with url: /pypi/one", 0, "NOT CHECKED"),
        ("KeyError: something else", 2, "pip-audit failed with status 1: KeyError: something else"),
    ],
)
def test_output_and_status(tmp_path: Path, packages: list[object] | str, status: int, says: str) -> None:
    if isinstance(packages, str):
        fake = f"import sys; sys.exit({packages!r})"
    else:
        vulnerable = any(isinstance(p, dict) and p.get("vulns") for p in packages)
        fake = f"import sys; print({json.dumps({'dependencies': packages})!r}); sys.exit({int(vulnerable)})"
    (tmp_path / "pip_audit.py").write_text(fake)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run([sys.executable, str(AUDIT)], capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == status, ran.stderr
    assert says in ran.stdout and all(line.startswith("audit: ") for line in ran.stdout.splitlines())
