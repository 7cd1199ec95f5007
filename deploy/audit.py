"""`make audit`: check the installed packages for known vulnerabilities with pip-audit.

The exit status is 1 if an installed package has a vulnerability that a newer version fixes. Vulnerabilities without a
fix are only reported. If the vulnerability service cannot be reached, this is reported and does not fail.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

TIMEOUT = 180
"""Seconds for the whole run. pip-audit caches results, so a second run is faster."""
COMMAND = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--timeout", "10", "--format", "json"]
UNREACHABLE = ("connectionerror", "connecttimeout", "max retries exceeded", "failed to establish", "timed out",
               "name resolution", "proxyerror", "sslerror", "could not connect")  # fmt: skip


def log(text: str) -> None:
    sys.stdout.write(f"audit: {text}\n")


def main(arguments: list[str]) -> int:
    """Run pip-audit with additional `arguments` and report its findings."""
    try:
        ran = subprocess.run(
            [*COMMAND, *arguments], capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        log(f"NOT CHECKED: the vulnerability service took more than {TIMEOUT} s")
        return 0
    try:
        packages: list[dict[str, Any]] = json.loads(ran.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = (ran.stderr.strip().splitlines() or ["no output"])[-1]
        if any(sign in ran.stderr.lower() for sign in UNREACHABLE):
            log(f"NOT CHECKED: the vulnerability service cannot be reached ({reason[:200]})")
            return 0
        log(f"pip-audit failed with status {ran.returncode}: {reason[:500]}")
        return 2
    return report(packages)


def report(packages: list[dict[str, Any]]) -> int:
    """Print every finding and every unchecked package. Returns the exit status."""
    skipped = [package for package in packages if "skip_reason" in package]
    if len(skipped) == len(packages):
        log(f"NOT CHECKED: the vulnerability service knows none of the {len(packages)} packages")
        return 0
    fixable = 0
    for package in packages:
        for found in package.get("vulns", ()):
            fixes = ", ".join(found["fix_versions"])
            fixable += bool(fixes)
            ids = " ".join((found["id"], *found.get("aliases", ())))
            outcome = f"fixed in {fixes}" if fixes else "no fix is available"
            log(f"{package['name']} {package['version']}: {ids}: {outcome}")
    if skipped:
        log(f"not checked, unknown to the service: {', '.join(p['name'] for p in skipped)}")
    log(f"{len(packages) - len(skipped)} of {len(packages)} packages checked, {fixable} fixable vulnerabilities")
    return 1 if fixable else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
