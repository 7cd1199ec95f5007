"""`make audit`: what is installed here, held against the known vulnerabilities, by pip-audit.

Exit status 1 means that something installed has a known vulnerability which another version does not have. One that no
version mends is shown and does not fail: nobody could act on it. Where the service cannot be reached, or knows nothing
of what is installed, that is said in one line and is no failure; nothing is called checked that was not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

SECONDS = 180
"""For all of it; a second run within a day reads most from pip-audit's own cache."""
COMMAND = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--timeout", "10", "--format", "json"]
UNREACHABLE = ("connectionerror", "connecttimeout", "max retries exceeded", "failed to establish", "timed out",
               "name resolution", "proxyerror", "sslerror", "could not connect")  # fmt: skip


def say(text: str) -> None:
    sys.stdout.write(f"audit: {text}\n")


def main(arguments: list[str]) -> int:
    """Run pip-audit with `arguments` added, and tell what came of it."""
    try:
        ran = subprocess.run(
            [*COMMAND, *arguments],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        say(f"NOT CHECKED: the vulnerability service took over {SECONDS} s")
        return 0
    try:
        packages: list[dict[str, Any]] = json.loads(ran.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        lines = ran.stderr.strip().splitlines() or ["it said nothing"]
        if any(sign in ran.stderr.lower() for sign in UNREACHABLE):
            say(f"NOT CHECKED: the vulnerability service cannot be reached from here ({lines[-1][:200]})")
            return 0
        say(f"pip-audit failed with status {ran.returncode}: {lines[-1][:500]}")
        return 2
    return report(packages)


def report(packages: list[dict[str, Any]]) -> int:
    """Tell of every finding, and of what was not checked."""
    skipped = [package for package in packages if "skip_reason" in package]
    if len(skipped) == len(packages):
        say(f"NOT CHECKED: the service that answers here knows none of the {len(packages)} packages")
        return 0
    mendable = 0
    for package in packages:
        for found in package.get("vulns", ()):
            fixes = ", ".join(found["fix_versions"])
            mendable += bool(fixes)
            known = (
                f"{package['name']} {package['version']}: {found['id']} {' '.join(found.get('aliases', ()))}".strip()
            )
            say(f"{known}: {f'mended in {fixes}' if fixes else 'no version mends it yet'}")
    if skipped:
        say(f"not checked, since the service does not know them: {', '.join(p['name'] for p in skipped)}")
    say(f"{len(packages) - len(skipped)} of {len(packages)} packages checked, {mendable} vulnerabilities to mend")
    return 1 if mendable else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
