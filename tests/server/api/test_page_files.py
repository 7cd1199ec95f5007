"""Files of the built-in page: which are served, and their headers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from server.api import page
from server.api.page import FOLDER


def test_all_files_of_the_page_are_served_with_the_policy(start: Any) -> None:
    live = start(api_keys="team:secret-one")
    index = live.http.get("/")
    assert index.status_code == 200 and index.headers["content-type"] == "text/html; charset=utf-8"
    asked = {f"/{path}" for path in re.findall(r'(?:src|href)="(web/[^"]+)"', index.text)}
    assert len(asked) >= 4 and not re.search(r'(?:src|href)="/', index.text), "a proxy may add a prefix"
    for module in FOLDER.glob("*.js"):
        asked |= {f"/web/{name}" for name in re.findall(r'from "\./([\w.]+)"', module.read_text())}
    for path in sorted(asked):
        answer = live.http.get(path)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = live.http.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert again.status_code == 304 and not again.content
    etag = answer.headers["etag"]
    for tags, status in ((f"W/{etag}", 304), (f'"a", W/{etag}', 304), ('"a"', 200)):
        assert live.http.get(path, headers={"if-none-match": tags}).status_code == status, tags


def test_page_has_no_inline_script_or_style_and_no_other_host() -> None:
    text = "".join(p.read_text() for p in FOLDER.glob("*.*"))
    assert not re.search(r"<script(?![^>]*\bsrc=)", text)
    assert not re.search(r"<[^>]+\s(style|on\w+)=", text)
    assert not re.search(r"https?://(?!www\.w3\.org/)(?!localhost)", text)


def test_page_stays_the_same_when_its_files_change(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "web")
    (folder / "app.js").write_text("this version's")
    monkeypatch.setattr(page, "FOLDER", folder)
    live = start()
    (folder / "app.js").write_text("another version's")
    (folder / "index.html").unlink()
    assert live.http.get("/web/app.js").text == "this version's"
    assert live.http.get("/").status_code == 200


def test_buttons_do_not_stay_disabled_after_a_reload() -> None:
    """Firefox keeps the state of form fields unless autocomplete is off."""
    buttons = re.findall(r"<button [^>]*>", (FOLDER / "index.html").read_text().split("<template")[0])
    switched = [button for button in buttons if 'type="submit"' in button or "disabled" in button]
    assert len(switched) == 4 and all('autocomplete="off"' in button for button in switched)


@pytest.mark.parametrize("path", ["/web/none.js", "/web/..%2fapp.py", "/web/%2e%2e/settings.py", "/web/vendor"])
def test_other_paths_are_404(start: Any, path: str) -> None:
    assert start().http.get(path).status_code == 404
