"""The web page in Chromium, on a server with the embedded base.

Every test fails on a script error, on a console error except failed requests, and on a request to another host.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from server.settings import PREFIX, Settings
from tests.e2e.conftest import Live, serving
from tests.waiting import SECONDS, until

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Route, expect, sync_playwright

pytestmark = [pytest.mark.e2e, pytest.mark.part("chromium")]

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--no-first-run"]
FAILED_REQUEST = "Failed to load resource"
"""Chromium logs this for every 4xx response, even if the page expects it."""
FILM = "A stirring, funny film that never lets go."
ENDLESS = "Count: one, two, three,"
"""The base model continues this prompt for longer than any test needs to stop it."""
FAST_POLLING = "{ const wait = setTimeout; setTimeout = (call, ms) => wait(call, ms === 2000 ? 250 : ms); }"
"""Shortens the page's polling interval from 2 s to 0.25 s."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=1000 * SECONDS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, embedded: Path, write_random: Callable[..., Path]) -> Iterator[Live]:
    """A server with the bundled adapter, two random adapters and one broken folder."""
    folder = tmp_path_factory.mktemp("adapters")
    write_random(folder / "formal", rank=4, seed=1)
    write_random(folder / "spare", rank=2, seed=2)
    shutil.copytree(folder / "spare", folder / "broken")
    (folder / "broken" / "adapter_model.safetensors").write_bytes(b"not tensors")
    flags = ["--adapter-dir", str(folder), "--max-queue", "64", "--adapter-ram", "6MiB"]
    with serving(tmp_path_factory.mktemp("page"), *flags) as live:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            listed = live.get("/adapters")
            names = {adapter["name"] for adapter in listed["adapters"]}
            if names >= {"formal", "spare", "sentiment"} and listed["rejected"]:
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"the adapters did not appear: {listed}")
        yield live


@pytest.fixture
def page(browser: Browser, live: Live, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The loaded page in the light theme. `parametrize("page", ..., indirect=True)` sets another theme."""
    scheme = getattr(request, "param", "light")
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme=scheme, base_url=live.url)
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=live.url)
    context.set_default_timeout(1000 * SECONDS)
    with watched(context, live.url) as opened:
        opened.goto("/")
        expect(opened.locator("#status[data-ready]")).to_be_visible()
        expect(opened.get_by_label("Key")).to_be_hidden()
        expect(opened.locator(".side .task option")).not_to_have_count(1)
        yield opened
    context.close()


@contextmanager
def watched(opener: Browser | BrowserContext, url: str) -> Iterator[Page]:
    """Open a page, close it at the end, and check that it logged no error and contacted only the server at `url`."""
    opened = opener.new_page()
    opened.add_init_script(FAST_POLLING)
    problems: list[str] = []
    hosts: set[str] = set()

    def on_console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(FAILED_REQUEST):
            problems.append(f"{message.text} at {message.location}")

    opened.on("console", on_console)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda sent: hosts.add(urlsplit(sent.url).netloc))
    try:
        yield opened
    finally:
        opened.close()
    assert not problems
    assert hosts == {urlsplit(url).netloc}


def ask(page: Page, prompt: str = FILM, tokens: int | None = None) -> None:
    page.get_by_role("textbox", name="Prompt").fill(prompt)
    if tokens is not None:
        page.get_by_label("Max tokens").fill(str(tokens))
    page.get_by_role("button", name="Run").click()


def figures(page: Page, side: int = 0) -> dict[str, str]:
    """The figures below an answer, once it is complete."""
    node = page.locator(".side").nth(side)
    expect(node.locator(".after")).to_be_visible()
    return dict(zip(node.locator("dt").all_inner_texts(), node.locator("dd").all_inner_texts(), strict=True))


def body_of(page: Page, act: Callable[[], None]) -> dict:
    """The JSON body of the generation request that `act` sends."""
    with page.expect_request(lambda sent: "/generate" in sent.url) as caught:
        act()
    return json.loads(caught.value.post_data or "")


def wait_for_polls(page: Page, times: int) -> None:
    """Wait until the page has polled the server `times` times."""
    for _ in range(times):
        with page.expect_response("**/stats"):
            pass


def listed_job(name: str, **given: object) -> dict:
    """A running training job as `/jobs` lists it."""
    return {
        "id": f"ftjob-{name}", "kind": "training", "name": name, "status": "running", "progress": 0.0, "step": 0,
        "steps": 4, "created_at": 1.0, "started_at": 1.0, "finished_at": None, "error": None, "result": {},
        "loss": None, "tokens": 0, "seconds": 0.0, "pausing": False, **given,
    }  # fmt: skip


def test_a_task_answers_and_shows_timings(page: Page) -> None:
    page.locator("select.task").select_option("sentiment")
    expect(page.locator(".side .hint").first).to_contain_text("The adapter sentiment answers: “Classify the sentiment")
    ask(page)
    shown = figures(page)
    expect(page.locator(".answer")).to_have_text("positive")
    assert re.fullmatch(r"[\d.]+ ms", shown["first token"]) and float(shown["tokens per second"]) > 0
    assert "(stop)" in shown["tokens"] and shown["answered by"].startswith("sentiment@")
    assert page.get_by_role("button", name="Stop").is_disabled()


def test_an_answer_streams(page: Page) -> None:
    page.locator("select.task").select_option("")
    expect(page.locator(".side .hint").first).to_have_text("The base model continues the prompt.")
    expect(page.locator(".answer")).to_be_empty()
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
        window.seen.push(document.querySelector('.answer').textContent.length); }).observe(
        document.querySelector('.answer'), {childList: true, subtree: true, characterData: true}); }"""
    )
    ask(page, "Once upon a time, there was a", tokens=40)
    shown = figures(page)
    assert shown["answered by"] == "base only" and "→ 40 (length)" in shown["tokens"]
    lengths = page.evaluate("window.seen")
    assert len(lengths) > 10 and lengths == sorted(lengths), "the text did not grow step by step"
    assert not page.locator(".side .up").is_visible(), "feedback needs a task"


def test_weights_by_sliders(page: Page) -> None:
    page.locator("select.task").select_option("sentiment")
    page.get_by_role("button", name="Add adapter").click()
    page.get_by_role("button", name="Add adapter").click()
    first, second = page.locator(".mix li").all()
    assert first.get_by_label("Adapter").input_value() != second.get_by_label("Adapter").input_value()
    first.get_by_label("Adapter").select_option("sentiment")
    second.get_by_label("Adapter").select_option("formal")
    slider = second.get_by_role("slider")
    slider.fill("0.3")
    expect(second.get_by_label("Weight of formal as a number")).to_have_value("0.3")
    slider.press("ArrowRight")
    expect(second.get_by_role("spinbutton")).to_have_value("0.35")
    first.get_by_label("Weight of sentiment as a number").fill("-0.5")
    expect(first.get_by_role("slider")).to_have_value("-0.5")
    sent = body_of(page, lambda: ask(page))
    assert sent["adapters"] == [{"name": "sentiment", "weight": -0.5}, {"name": "formal", "weight": 0.35}]
    served = figures(page)["answered by"]
    assert re.fullmatch(r"sentiment@\w{12} × -0.5 \+ formal@\w{12} × 0.35", served), served
    second.get_by_role("button", name="Remove").click()
    first.get_by_role("button", name="Remove").click()
    assert "adapters" not in body_of(page, lambda: ask(page))


def test_two_answers_side_by_side(page: Page) -> None:
    page.get_by_role("checkbox").check()
    left, right = page.locator(".side").all()
    left.locator("select.task").select_option("sentiment")
    right.locator("select.task").select_option("")
    right.get_by_role("button", name="Add adapter").click()
    right.get_by_label("Adapter", exact=True).select_option("formal")
    ask(page, tokens=8)
    assert figures(page, 0)["answered by"].startswith("sentiment@")
    assert figures(page, 1)["answered by"].startswith("formal@")
    page.get_by_role("checkbox").uncheck()
    expect(page.locator(".side")).to_have_count(1)


def test_stop_cancels_the_request(page: Page, live: Live) -> None:
    page.locator("select.task").select_option("")
    ask(page, ENDLESS, tokens=4000)
    expect(page.locator(".answer")).not_to_be_empty()
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "true")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".figures")).to_contain_text("stopped after")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
    until(lambda: live.get("/stats")["engine"]["running"] == 0, every=0.05)
    expect(page.get_by_role("button", name="Run")).to_be_enabled()


def test_thumbs_send_feedback(page: Page) -> None:
    page.locator("select.task").select_option("sentiment")
    ask(page)
    figures(page)
    with page.expect_response("**/tasks/sentiment/feedback") as caught:
        page.get_by_role("button", name="Good answer").click()
    sent = json.loads(caught.value.request.post_data or "")
    assert sent["id"].startswith("gen-") and sent["score"] == 1
    assert caught.value.status == 204
    expect(page.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Bad answer").click()
    expect(page.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "false")
    expect(page.get_by_role("button", name="Bad answer")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#notice")).to_have_text("Recorded as a bad answer of sentiment.")


def test_copied_snippets_run(page: Page, live: Live) -> None:
    """The curl, Python and openai snippets print the answer that the page shows."""
    page.locator("select.task").select_option("sentiment")
    ask(page, 'It\'s a dull, "lifeless" film.\nNo joy in it.', tokens=4)
    figures(page)
    answer = page.locator(".answer").inner_text()
    for name in ("curl", "Python", "openai"):
        page.get_by_role("button", name=name, exact=True).click()
        expect(page.locator("#notice")).to_have_text(f"Copied as {name}.")
        text = page.evaluate("navigator.clipboard.readText()")
        if name == "curl" and shutil.which("curl") is None:
            continue
        command = ["bash", "-c", text] if name == "curl" else [sys.executable, "-c", text]
        out = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert out.returncode == 0, out.stderr
        assert (json.loads(out.stdout)["text"] if name == "curl" else out.stdout.strip()) == answer, name


def test_copied_snippets_read_the_key_from_api_key(page: Page) -> None:
    """Snippets read a variable that `loramux serve` ignores, and wait as long as the server's deadline."""
    page.evaluate("sessionStorage.setItem('key', 'secret')")
    page.reload()
    page.locator("select.task").select_option("sentiment")
    ask(page)
    figures(page)
    for name, reads in (("curl", 'Bearer $API_KEY"'), ("Python", "'API_KEY'"), ("openai", '"API_KEY"')):
        page.get_by_role("button", name=name, exact=True).click()
        expect(page.locator("#notice")).to_have_text(f"Copied as {name}.")
        text = page.evaluate("navigator.clipboard.readText()")
        assert reads in text and PREFIX not in text
        assert name != "Python" or f"timeout={Settings.model_fields['deadline'].default:.0f}" in text


def test_a_retired_adapter_stays_selected(page: Page, live: Live) -> None:
    live.client.post("/adapters", json={"name": "passing", "source": "formal"}).raise_for_status()
    page.reload()
    page.get_by_role("button", name="Add adapter").click()
    member = page.get_by_role("combobox", name="Adapter")
    member.select_option("passing")
    assert live.client.delete("/adapters/passing").status_code == 202
    page.get_by_role("tab", name="Adapters").click()
    page.get_by_role("tab", name="Playground").click()
    expect(member.locator("option:checked")).to_have_text("passing (gone)")
    ask(page, "Hello", tokens=4)
    expect(page.locator(".answer")).to_contain_text("'passing'")


def test_a_deleted_task_stays_selected(page: Page, live: Live) -> None:
    live.client.put("/tasks/passing", json={"prompt": "Say it. " * 100 + "{input}"}).raise_for_status()
    page.reload()
    task, hint = page.locator("select.task"), page.locator(".side .hint").first
    task.select_option("passing")
    expect(hint).to_contain_text("Say it.")
    assert len(hint.inner_text()) < 300, "long templates are not shortened"
    page.get_by_role("tab", name="Jobs").click()
    page.locator("#train-task").select_option("passing")
    assert live.client.delete("/tasks/passing").is_success
    page.get_by_label("Rank").focus()
    page.locator("#train-task").focus()
    expect(page.locator("#train-task option:checked")).to_have_text("passing (gone)")
    page.get_by_role("tab", name="Playground").click()
    expect(task.locator("option:checked")).to_have_text("passing (gone)")
    expect(hint).to_contain_text("no longer exists")
    ask(page, "Hello", tokens=4)
    expect(page.locator(".answer")).to_contain_text("'passing'")


def test_invalid_weights_are_not_sent(page: Page) -> None:
    page.locator("select.task").select_option("sentiment")
    page.get_by_role("button", name="Add adapter").click()
    weight = page.locator(".mix li").get_by_role("spinbutton")
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if "/generate" in request.url else None)
    for invalid in ("", "99"):
        weight.fill(invalid)
        ask(page)
        expect(weight).to_be_focused()
    assert not sent
    weight.fill("0.333")
    assert body_of(page, lambda: ask(page))["adapters"][0]["weight"] == 0.333


def test_a_decimal_comma_is_accepted(page: Page) -> None:
    page.get_by_role("button", name="Add adapter").click()
    weight = page.locator(".mix li").get_by_role("spinbutton")
    weight.fill("")
    weight.press_sequentially("1,5")
    expect(weight).to_have_value("1.5")
    page.evaluate("navigator.clipboard.writeText('0,25')")
    weight.fill("")
    weight.press("Control+V")
    expect(weight).to_have_value("0.25")


def test_the_back_button_returns_to_the_previous_tab(page: Page) -> None:
    for name in ("Adapters", "Tasks"):
        page.get_by_role("tab", name=name).click()
        expect(page).to_have_title(f"{name} · loramux")
    page.go_back()
    expect(page.get_by_role("tab", name="Adapters")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_role("tabpanel", name="Adapters")).to_be_visible()


def test_a_text_selection_survives_updates(page: Page, live: Live) -> None:
    page.get_by_role("tab", name="Tasks").click()
    title = page.locator("[data-task=sentiment] h2")
    title.evaluate("node => getSelection().selectAllChildren(node)")
    live.client.put("/tasks/later", json={"prompt": "{input}"}).raise_for_status()
    expect(page.locator("[data-task=later]")).to_be_visible()
    assert page.evaluate("getSelection().toString()") == "sentiment"
    assert live.client.delete("/tasks/later").is_success
    expect(page.locator("[data-task=later]")).to_have_count(0)
    assert page.evaluate("getSelection().toString()") == "sentiment"


def test_a_table_row_survives_updates(page: Page) -> None:
    """A replaced row would lose a click that is in progress."""
    leases = 7

    def in_use(route: Route) -> None:
        answer = route.fetch()
        shown = answer.json()
        route.fulfill(response=answer, json={**shown, "adapters": [{**a, "leases": leases} for a in shown["adapters"]]})

    page.route("**/adapters", in_use)
    page.get_by_role("tab", name="Adapters").click()
    expect(row(page, "formal").locator(".leases")).to_have_text("7")
    held = row(page, "formal").element_handle()
    leases = 8
    expect(row(page, "formal").locator(".leases")).to_have_text("8")
    assert held.evaluate("node => node.isConnected")


def test_focus_stays_while_a_file_is_uploaded(
    page: Page, live: Live, tmp_path: Path, write_random: Callable[..., Path]
) -> None:
    folder = write_random(tmp_path / "slow", rank=1, seed=7)
    page.get_by_role("tab", name="Adapters").click()
    name = page.get_by_label("Name", exact=True)
    name.fill("slow")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        page.get_by_label(file).set_input_files(folder / file)
    held: list[Route] = []
    page.route("**/adapters", lambda route: held.append(route) if route.request.method == "POST" else route.continue_())
    page.get_by_role("button", name="Upload", exact=True).click()
    expect(page.get_by_role("button", name="Uploading…")).to_be_disabled()
    name.fill("the-next")
    until(lambda: page.wait_for_timeout(10) or held)
    held[0].continue_()
    expect(page.get_by_role("button", name="Upload", exact=True)).to_be_enabled()
    expect(name).to_have_value("the-next")
    expect(name).to_be_focused()
    assert live.client.delete("/adapters/slow").is_success


def test_form_edits_do_not_change_a_submitted_job(page: Page) -> None:
    page.route("**/v1/files", lambda route: route.fulfill(json={"id": "file-sent"}))
    page.route("**/v1/fine_tuning/jobs", lambda route: route.fulfill(json={"id": "ftjob-sent"}))
    page.get_by_role("tab", name="Jobs").click()
    form, name, publish = page.locator("#train"), page.get_by_label("Adapter name"), page.get_by_label("Publish")
    examples = {"name": "words.jsonl", "mimeType": "application/jsonl", "buffer": b"{}"}
    name.fill("first")
    form.get_by_label("Training examples (JSON or JSONL)").set_input_files(examples)
    held: list[Route] = []
    page.route("**/stats", lambda route: held.append(route))
    with page.expect_request("**/v1/fine_tuning/jobs") as caught:
        page.get_by_role("button", name="Start").click()
        until(lambda: page.wait_for_timeout(10) or held)
        name.fill("second")
        form.get_by_label("Validation examples").set_input_files(examples)
        form.get_by_label("Epochs").fill("7")
        form.get_by_label("Rank").fill("2")
        publish.select_option("never")
        name.fill("first")  # the old value again: the form must not be considered unchanged
        page.unroute("**/stats")
        while held:
            held.pop().continue_()
    sent = json.loads(caught.value.post_data or "")
    assert (sent["suffix"], sent["hyperparameters"]) == ("first", {"n_epochs": 3})
    assert sent["lora"] == {"r": 8, "publish": "always"}
    assert sent["training_file"] == "file-sent" and "validation_file" not in sent
    expect(page.locator("#notice")).to_have_text("The job is queued.")
    expect(publish).to_have_value("never")
    assert form.get_by_label("Validation examples").evaluate("input => input.files.length") == 1
    page.unroute_all()


def test_a_server_without_answers_is_shown_as_not_ready(page: Page) -> None:
    page.route("**/stats", lambda route: None)
    expect(page.locator("#status")).to_have_text("not connected", timeout=30_000)
    expect(page.get_by_role("alert")).to_contain_text("the server does not respond")
    page.unroute_all()
    expect(page.locator("#status[data-ready]")).to_be_visible(timeout=30_000)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_file_changed_after_selection_is_an_error(page: Page, tmp_path: Path) -> None:
    page.get_by_role("tab", name="Jobs").click()
    file = tmp_path / "words.jsonl"
    file.write_text('{"input": "a", "output": "b"}\n')
    # Browsers detect changes by modification time, and two quick writes may get the same one.
    os.utime(file, (1e9, 1e9))
    chosen = page.get_by_label("Training examples (JSON or JSONL)")
    chosen.set_input_files(file)
    assert chosen.evaluate("input => input.files[0].text()") == file.read_text()
    file.write_text('{"input": "a", "output": "b"}\n' * 2)
    page.get_by_label("Adapter name").fill("changed")
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("alert")).to_contain_text("words.jsonl has changed; choose it again")


def test_run_is_disabled_until_tasks_are_loaded(page: Page) -> None:
    """Submitting the form before its script has loaded would reload the page."""
    held: list[Route] = []
    known = False
    page.route("**/tasks", lambda route: route.continue_() if known else held.append(route))
    page.goto("/", wait_until="commit")
    until(lambda: page.wait_for_timeout(10) or held)
    page.locator("#prompt").fill("too early")
    expect(page.locator("#run")).to_be_disabled()
    page.locator("#prompt").press("Control+Enter")
    known = True
    while held:
        held.pop().continue_()
    expect(page.locator("#run")).to_be_enabled()
    page.unroute_all()
    expect(page.locator(".answer")).to_be_empty()
    expect(page.locator("#prompt")).to_have_value("too early")


def test_failed_requests_are_retried(page: Page) -> None:
    refused: list[Route] = []

    def refuse_twice(route: Route) -> None:
        if len(refused) == 2:
            return route.continue_()
        refused.append(route)
        return route.fulfill(status=503, json={"error": {"message": "not now"}})

    page.route("**/tasks", refuse_twice)
    page.goto("/")
    expect(page.get_by_role("alert")).to_contain_text("not now")
    expect(page.locator("#run")).to_be_enabled()
    expect(page.get_by_role("alert")).to_be_hidden()
    page.unroute_all()


def test_tasks_are_loaded_a_few_at_a_time(page: Page, live: Live) -> None:
    """Browsers open six connections per host. One must stay free for other requests."""
    [task] = [task for task in live.get("/tasks")["tasks"] if task["name"] == "sentiment"]
    shown = live.get("/tasks/sentiment/performance")
    held: list[Route] = []
    page.route("**/tasks", lambda r: r.fulfill(json={"tasks": [{**task, "name": f"t{n}"} for n in range(15)]}))
    page.route("**/performance", lambda route: held.append(route))
    page.get_by_role("tab", name="Tasks").click()
    for wanted in (5, 5, 5):
        until(lambda: page.wait_for_timeout(10) or len(held) >= wanted)  # noqa: B023
        page.wait_for_timeout(100)
        assert len(held) == wanted
        while held:
            held.pop().fulfill(json=shown)
    expect(page.locator("#task-list .task")).to_have_count(15)
    page.unroute_all()


def test_a_button_keeps_the_focus_during_updates(page: Page) -> None:
    job = listed_job("kept", status="validating_files", started_at=None)
    page.route("**/jobs", lambda route: route.fulfill(json={"jobs": [job]}))
    page.get_by_role("tab", name="Jobs").click()
    page.get_by_role("button", name="Pause kept").focus()
    job["status"] = "running"
    expect(page.get_by_role("heading", name="kept running")).to_be_visible()
    expect(page.get_by_role("button", name="Pause kept")).to_be_focused()
    held: list[Route] = []
    page.route("**/jobs/ftjob-kept/cancel", lambda route: held.append(route))
    page.get_by_role("button", name="Cancel kept").click()
    until(lambda: page.wait_for_timeout(10) or held)
    page.get_by_label("Adapter name").focus()
    held[0].fulfill(json=job)
    expect(page.get_by_role("button", name="Cancel kept")).to_be_enabled()
    expect(page.get_by_label("Adapter name")).to_be_focused()
    page.get_by_role("button", name="Pause kept").focus()
    job["pausing"] = True
    expect(page.get_by_role("button", name="Resume kept")).to_be_visible()
    expect(page.get_by_role("heading", name="kept pausing")).to_be_focused()
    expect(page.get_by_role("button", name="Pause kept")).to_have_count(0)
    job |= {"pausing": False, "status": "succeeded"}
    expect(page.get_by_role("heading", name="kept succeeded")).to_be_focused()
    expect(page.get_by_role("button", name="Cancel kept")).to_have_count(0)
    job |= {"status": "failed"}
    expect(page.get_by_role("button", name="Cancel kept")).to_have_count(1)
    expect(page.get_by_role("button", name="Resume kept")).to_have_count(1)
    page.unroute_all()


def test_a_failed_curve_does_not_hide_other_jobs(page: Page) -> None:
    jobs = [listed_job(f"job{i}", id=f"ftjob-{i}", step=2, loss=1.0) for i in range(8)]
    curves = {"train_loss": [[1, 2.0], [2, 1.0]], "valid_loss": []}

    def one(route: Route) -> None:
        number = int(route.request.url.rsplit("-", 1)[1])
        if number == 1:
            route.fulfill(status=500, json={"error": {"message": "not available"}})
        else:
            route.fulfill(json={**jobs[number], "curves": curves})

    page.route("**/jobs/ftjob-*", one)
    page.route("**/jobs", lambda route: route.fulfill(json={"jobs": jobs}))
    page.get_by_role("tab", name="Jobs").click()
    expect(page.get_by_role("alert")).to_contain_text("not available")
    expect(page.get_by_role("button", name="Cancel job")).to_have_count(8)
    expect(page.locator("#job-list canvas, #jobs canvas")).to_have_count(7)
    page.unroute_all()


def test_task_choices_load_without_jobs(page: Page) -> None:
    asked: list[Route] = []
    refused = True

    def tasks(route: Route) -> None:
        asked.append(route)
        if refused:
            route.fulfill(status=500, json={"error": {"message": "not available"}})
        else:
            route.continue_()

    page.route("**/tasks", tasks)
    page.route("**/jobs", lambda route: route.fulfill(json={"jobs": [listed_job("shown")]}))
    page.get_by_role("tab", name="Jobs").click()
    expect(page.get_by_role("alert")).to_contain_text("not available")
    expect(page.get_by_role("button", name="Cancel shown")).to_be_visible()
    task = page.get_by_label("Task template")
    expect(task.locator("option")).to_have_text(["same name as the adapter, if any"])
    refused = False
    expect(task.locator("option", has_text="sentiment")).to_have_count(1)
    expect(page.get_by_role("alert")).to_be_hidden()
    before = len(asked)
    for _ in range(3):
        with page.expect_response("**/jobs"):
            pass
    assert len(asked) == before, "task definitions must not be polled"
    with page.expect_request("**/tasks"):
        task.focus()
    page.unroute_all()


def test_a_failed_request_does_not_hide_other_figures(page: Page, live: Live) -> None:
    live.post("/generate?task=sentiment", {"prompt": FILM, "max_tokens": 1})
    [task] = [task for task in live.get("/tasks")["tasks"] if task["name"] == "sentiment"]
    shown = live.get("/tasks/sentiment/performance")
    refused, requests = ["never"], 1_111

    def performance(route: Route) -> None:
        if route.request.url.split("/")[-2] in refused:
            return route.fulfill(status=500, json={"error": {"message": "not available"}})
        return route.fulfill(json={**shown, "versions": [{**shown["versions"][0], "requests": requests}]})

    names = ("good", "later", "never")
    page.route("**/tasks", lambda route: route.fulfill(json={"tasks": [{**task, "name": name} for name in names]}))
    page.route("**/performance", performance)
    page.get_by_role("tab", name="Tasks").click()
    good, later, never = (page.locator(f"[data-task={name}]") for name in names)
    expect(page.get_by_role("alert")).to_contain_text("not available")
    expect(good).to_contain_text("1,111")
    expect(later).to_contain_text("1,111")
    expect(never).to_contain_text("Figures not loaded yet.")
    refused.append("later")
    requests = 2_222
    expect(good).to_contain_text("2,222")
    expect(later).to_contain_text("1,111")
    expect(page.get_by_role("alert")).to_be_visible()
    refused.clear()
    expect(never).to_contain_text("2,222")
    expect(later).to_contain_text("2,222")
    expect(page.get_by_role("alert")).to_be_hidden()
    page.unroute_all()


@pytest.mark.parametrize("event", ["a restart", "another key"])
def test_tasks_are_reloaded(page: Page, event: str) -> None:
    """With the page's clock stopped, only the event makes the page load tasks again. The error stays until then."""
    asked: list[Route] = []

    def once(route: Route) -> None:
        asked.append(route)
        if len(asked) > 1:
            return route.continue_()
        return route.fulfill(status=500, json={"error": {"message": "not available"}})

    page.evaluate("sessionStorage.setItem('key', 'one')")
    page.add_init_script("performance.now = () => 1000;")
    page.route("**/tasks/sentiment/performance", once)
    page.reload()
    page.get_by_role("tab", name="Tasks").click()
    expect(page.get_by_role("alert")).to_contain_text("not available")
    wait_for_polls(page, 3)
    expect(page.get_by_role("alert")).to_be_visible()
    assert len(asked) == 1
    if event == "a restart":
        page.route("**/stats", lambda route: route.abort())
        expect(page.locator("#status")).to_have_text("not connected")
        page.unroute("**/stats")
    else:
        page.get_by_label("Key").fill("two")
        page.get_by_label("Key").press("Enter")
    expect(page.locator("#status[data-ready]")).to_be_visible()
    until(lambda: page.wait_for_timeout(10) or len(asked) == 2)
    expect(page.get_by_role("alert")).to_be_hidden()
    page.unroute_all()


def row(page: Page, name: str):
    return page.locator("#adapter-rows tr").filter(has=page.get_by_text(name, exact=True)).first


def test_actions_in_the_adapters_table(page: Page, live: Live) -> None:
    page.get_by_role("tab", name="Adapters").click()
    expect(row(page, "formal")).to_contain_text("KiB")
    expect(page.locator("#room")).to_have_text(
        re.compile(r"[\d.]+ \wi?B of 6.0 MiB.*One more adapter takes about [\d.]+ .iB, and \d+ more")
    )
    cold = next(a["name"] for a in live.get("/adapters")["adapters"] if a["tier"] == "disk")
    page.get_by_role("button", name=f"Load {cold}").click()
    expect(row(page, cold).locator(".tag")).to_have_text("ram")
    expect(page.get_by_role("button", name=f"Load {cold}")).to_be_disabled()
    page.get_by_role("button", name="Pin formal").click()
    expect(row(page, "formal")).to_contain_text("pinned")
    expect(page.get_by_role("button", name="Unpin formal")).to_be_visible()
    assert live.get("/adapters/formal")["pinned"] is True
    page.get_by_role("button", name="Unpin formal").click()
    expect(row(page, "formal")).not_to_contain_text("pinned")
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.get_by_role("button", name="Remove spare").click()
    assert live.client.get("/adapters/spare").status_code == 200, "removed without confirmation"
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Remove spare").click()
    expect(page.get_by_role("button", name="Remove spare")).to_have_count(0)
    expect(page.locator("#notice")).to_have_text("spare is removed.")
    expect(page.get_by_role("heading", name="Adapters on this server")).to_be_focused()
    assert live.client.get("/adapters/spare").status_code == 404


def test_errors_stay_visible(page: Page, live: Live) -> None:
    """The reason why an adapter cannot be removed stays visible across polls, until the user closes it."""
    route = {"choice": [{"name": "formal", "weight": 1.0}]}
    assert live.client.put("/tasks/guarded", json={"prompt": "{input}", "route": route}).is_success
    page.get_by_role("tab", name="Adapters").click()
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Remove formal").click()
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("guarded")
    wait_for_polls(page, 3)
    expect(alert).to_be_visible()
    page.get_by_role("button", name="Close message").click()
    expect(alert).to_be_hidden()
    assert live.client.delete("/tasks/guarded").is_success


def test_a_rejected_prompt_shows_its_error_as_the_answer(page: Page) -> None:
    page.locator("select.task").select_option("")
    ask(page, "hello", tokens=100_000)
    expect(page.locator(".answer.failed")).to_contain_text("100000")
    expect(page.get_by_role("alert")).to_contain_text("100000")
    ask(page, "hello", tokens=2)
    figures(page)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_uploads_are_served_or_rejected(
    page: Page, live: Live, tmp_path: Path, write_random: Callable[..., Path]
) -> None:
    folder = write_random(tmp_path / "new", rank=3, seed=5)
    page.get_by_role("tab", name="Adapters").click()
    page.get_by_label("Name", exact=True).fill("uploaded")
    page.get_by_label("adapter_config.json").set_input_files(folder / "adapter_config.json")
    page.get_by_label("adapter_model.safetensors").set_input_files(folder / "adapter_model.safetensors")
    page.get_by_role("button", name="Upload", exact=True).click()
    expect(row(page, "uploaded")).to_be_visible()
    expect(page.locator("#notice")).to_have_text(re.compile(r"uploaded@\w{12} is served."))
    assert live.post("/generate", {"prompt": "x", "adapters": [{"name": "uploaded"}], "max_tokens": 1})["adapters"]

    page.get_by_label("Name", exact=True).fill("wrong")
    page.get_by_label("adapter_config.json").set_input_files(folder / "adapter_config.json")
    page.get_by_label("adapter_model.safetensors").set_input_files(
        {"name": "adapter_model.safetensors", "mimeType": "application/octet-stream", "buffer": b"no tensors"}
    )
    page.get_by_role("button", name="Upload", exact=True).click()
    expect(page.get_by_role("alert")).to_be_visible()
    assert live.client.get("/adapters/wrong").status_code == 404


def test_rejected_folders_are_shown_with_reasons(page: Page) -> None:
    page.get_by_role("tab", name="Adapters").click()
    rejected = page.locator("#rejected-rows tr")
    expect(rejected).to_have_count(1)
    expect(rejected).to_contain_text("broken")
    assert len(rejected.locator("td").nth(1).inner_text()) > 10


def test_tasks_live_and_jobs_tabs(page: Page, live: Live) -> None:
    answered = live.post("/generate?task=sentiment", {"prompt": FILM})
    sent = {"id": answered["id"], "score": 1.0}
    assert live.client.post("/tasks/sentiment/feedback", json=sent).status_code == 204
    route = {"best": ["formal", "sentiment"], "min_samples": 20}
    assert live.client.put("/tasks/contest", json={"prompt": "{input}", "route": route}).is_success
    page.get_by_role("tab", name="Tasks").click()
    sentiment = page.locator("[data-task=sentiment]")
    expect(sentiment).to_contain_text("positive, negative")
    version = sentiment.get_by_role("row").filter(has_text=answered["adapters"][0]["version"]).first
    assert int(version.get_by_role("cell").nth(1).inner_text()) >= 1
    expect(version.get_by_role("cell").nth(3)).to_have_text(re.compile(r"[\d.]+ / [\d.]+ / [\d.]+"))
    expect(version.get_by_role("cell").nth(6)).to_have_text(
        re.compile(r"accuracy [\d.]+ \(.* to .*\), \d+ by feedback")
    )
    contest = page.locator("[data-task=contest]")
    expect(contest).to_contain_text("routes to the best of formal, sentiment, by accuracy from feedback")
    expect(contest).to_contain_text("Best route: taking turns until each has 20 samples")
    expect(contest).to_contain_text("No requests yet")
    assert live.client.delete("/tasks/contest").is_success

    page.get_by_role("tab", name="Live").click()
    for name in ("tokens", "requests", "kv", "memory"):
        expect(page.locator(f"#chart-{name} canvas")).to_be_visible()
    expect(page.locator("#live-now")).to_contain_text("MiB")
    expect(page.locator("#chart-memory")).to_have_attribute("aria-label", re.compile(r"process \d+, base \d+"))
    expect(page.locator("#chart-memory .u-legend")).to_contain_text(re.compile(r"base\d+"))

    page.get_by_role("tab", name="Jobs").click()
    expect(page.locator("#job-list > *").first).to_be_visible()


def test_versions_on_another_base_are_marked(page: Page, live: Live) -> None:
    live.post("/generate?task=sentiment", {"prompt": FILM, "max_tokens": 1})
    shown = live.get("/tasks/sentiment/performance")
    version = shown["versions"][0]
    versions = [version, {**version, "base": f"{version['base']}-before"}]
    best = {"version": version["version"], "reason": "it leads"}
    page.route("**/performance", lambda route: route.fulfill(json={**shown, "versions": versions, "best": best}))
    page.get_by_role("tab", name="Tasks").click()
    names = page.locator("[data-task=sentiment] tbody td:first-child")
    expect(names).to_have_text([re.compile(r"@\w{12} leader$"), re.compile(r"@\w{12} other base$")])
    page.unroute_all()


def test_search_appears_for_many_adapters(page: Page, live: Live) -> None:
    names = [f"{kind}-{n}" for kind in ("tone", "mail") for n in range(4)]
    try:
        for name in names:
            route = {"choice": [{"name": name, "weight": 1.0}]}
            live.client.post("/adapters", json={"name": name, "source": "formal"}).raise_for_status()
            live.client.put(f"/tasks/{name}", json={"prompt": "{input}", "route": route}).raise_for_status()
        for part, nodes in (("adapters", "#adapter-rows tr"), ("tasks", "#task-list .task")):
            page.get_by_role("tab", name=part.capitalize()).click()
            field = page.get_by_role("searchbox", name=f"Search {part}")
            shown = page.locator(nodes).locator("visible=true")
            expect(shown.filter(has_text="mail-3")).to_have_count(1)
            expect(shown.filter(has_text="sentiment")).not_to_have_count(0)
            field.fill("TONE 2")
            expect(shown).to_have_count(1)
            expect(shown).to_contain_text("tone-2")
            wait_for_polls(page, 3)
            expect(shown).to_have_count(1)
            field.fill("remove")  # labels of buttons do not match
            expect(page.get_by_text("No matches.").locator("visible=true")).to_have_count(1)
            field.fill("")
            expect(shown.filter(has_text="mail-3")).to_have_count(1)
    finally:
        for name in names:
            live.client.delete(f"/tasks/{name}")
            live.client.delete(f"/adapters/{name}")
    expect(page.get_by_role("searchbox")).to_have_count(0)


def test_a_narrow_window(page: Page, live: Live) -> None:
    """At the 390 pixels of a phone, nothing is wider than the window, and table cells show their column's name."""
    long = "long-" + "x" * 59
    live.post("/adapters/compose", {"name": long, "from": [{"name": "formal", "weight": 1.0}]}, 201)
    routes = {"prompt": "{input}", "route": {"choice": [{"name": "formal"}]}}
    tasks = ["A" + "W" * 63, "B" + "W" * 63, "c", "d", "e"]
    for task in tasks:
        assert live.client.put(f"/tasks/{task}", json=routes).is_success
    page.set_viewport_size({"width": 390, "height": 844})
    page.get_by_role("checkbox").check()
    page.get_by_role("button", name="Add adapter").first.click()
    for tab in ("Playground", "Adapters", "Tasks", "Live", "Jobs"):
        page.get_by_role("tab", name=tab).click()
        expect(page.get_by_role("tabpanel", name=tab)).to_be_visible()
        page.wait_for_timeout(200)
        # Charts are redrawn some time after the window has changed its size.
        fits = "document.documentElement.scrollWidth <= innerWidth"
        until(lambda: page.wait_for_timeout(20) or page.evaluate(fits), f"{tab} is wider than the window")  # noqa: B023
    page.get_by_role("tab", name="Adapters").click()
    expect(row(page, long)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
        "the longest name is wider than the window"
    )
    assert live.client.delete(f"/adapters/{long}").is_success
    expect(row(page, "formal")).to_contain_text(re.compile(r"WWW, c and \d more"))
    page.set_viewport_size({"width": 910, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
        "a table of long names is wider than the window"
    )
    name = row(page, "sentiment").get_by_role("cell").first
    assert (name.bounding_box() or {"width": 0})["width"] > 120, "a long name breaks a short one"
    page.set_viewport_size({"width": 390, "height": 844})
    for task in tasks:
        assert live.client.delete(f"/tasks/{task}").is_success
    expect(row(page, "sentiment").get_by_role("cell").first).to_be_visible()
    labels = page.evaluate("[...document.querySelector('#adapter-rows tr').cells].map(c => c.dataset.label)")
    assert labels == [th.inner_text() for th in page.locator("#adapters thead th").all()][:9]
    chart = page.locator("#chart-kv canvas")
    page.get_by_role("tab", name="Live").click()
    expect(chart).to_be_visible()
    assert (chart.bounding_box() or {"width": 0})["width"] < 390
    page.goto("/docs")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "/docs is wider than the window"


def test_the_keyboard_alone(page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("tab", name="Playground")).to_be_focused()
    for key, name in [
        ("ArrowRight", "Adapters"),
        ("End", "Jobs"),
        ("ArrowRight", "Playground"),
        ("Home", "Playground"),
    ]:
        page.keyboard.press(key)
        tab = page.get_by_role("tab", name=name)
        expect(tab).to_be_focused()
        expect(tab).to_have_attribute("aria-selected", "true")
        expect(page.get_by_role("tabpanel")).to_have_count(1)
    for name in ("link API", "button Change between light and dark", "textbox Prompt"):
        page.keyboard.press("Tab")
        role, _, name = name.partition(" ")
        expect(page.get_by_role(role, name=name, exact=True)).to_be_focused()
    page.keyboard.type(ENDLESS)
    page.keyboard.press("Tab")
    page.keyboard.type("4000")
    page.locator("select.task").select_option("")
    page.get_by_role("button", name="Run").focus()
    page.keyboard.press("Enter")
    stop = page.get_by_role("button", name="Stop")
    expect(stop).to_be_focused()
    page.keyboard.press("Space")
    expect(page.locator(".figures")).to_contain_text("stopped after")
    expect(page.get_by_role("button", name="Run")).to_be_focused()
    page.get_by_label("Max tokens").fill("2")
    page.get_by_role("textbox", name="Prompt").press("Control+Enter")
    figures(page)


def test_every_control_has_a_name(page: Page) -> None:
    page.get_by_role("checkbox").check()
    page.get_by_role("button", name="Add adapter").first.click()
    for tab in ("Playground", "Adapters", "Tasks", "Live", "Jobs"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(200)
        nameless = page.evaluate(
            """() => [...document.querySelectorAll('button, input, select, textarea')].filter(e => e.offsetParent)
            .filter(e => !(e.ariaLabel || e.labels?.length || e.textContent.trim())).map(e => e.outerHTML)"""
        )
        assert not nameless


CONTRAST = """([which, colour]) => {
  const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => c.startsWith('color') ? +v : v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const under = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!c.startsWith('rgba(0, 0, 0, 0')) return c; } return 'rgb(255,255,255)'; };
  const text = colour === 'color';
  return [...document.querySelectorAll(which)]
    .filter(e => e.offsetParent && (e.textContent.trim() || !text) && !e.disabled && !e.closest('.skip'))
    .map(e => { const [a, b] = [light(getComputedStyle(e)[colour]), light(under(text ? e : e.parentElement))];
      return [e.textContent.trim().slice(0, 40), (Math.max(a, b) + .05) / (Math.min(a, b) + .05)]; });
}"""
TEXTS = ["h1, h2, label, p, button, td, th, dt, dd, a, small, code, .tag", "color"]
FIELDS = ["input:not([type=checkbox], [type=range]), select, textarea", "borderTopColor"]


@pytest.mark.parametrize("page", ["light", "dark"], indirect=True)
def test_both_themes_are_readable(page: Page) -> None:
    def background() -> str:
        return page.evaluate("getComputedStyle(document.documentElement).backgroundColor")

    for _ in range(2):
        for tab in ("Playground", "Adapters", "Tasks", "Live", "Jobs"):
            page.get_by_role("tab", name=tab).click()
            page.wait_for_timeout(100)
            faint = [(text, ratio) for text, ratio in page.evaluate(CONTRAST, TEXTS) if ratio < 4.5]
            assert not faint, tab
            assert all(ratio >= 3 for _, ratio in page.evaluate(CONTRAST, FIELDS)), "borders of fields"
        before = background()
        page.get_by_role("button", name="Change between light and dark").click()
        assert background() != before
    page.get_by_role("button", name="Change between light and dark").click()
    chosen = background()
    page.reload()
    assert background() == chosen, "the chosen theme is lost on reload"


def test_a_server_with_keys_asks_for_one(
    browser: Browser, tmp_path: Path, embedded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("boss:secret-two\n")
    with serving(tmp_path / "state", "--admin-keys-file", str(keys)) as live, watched(browser, live.url) as opened:
        opened.goto(live.url)
        expect(opened.get_by_role("alert")).to_contain_text("A key is needed: enter it in the Key field.")
        expect(opened.locator("#status")).to_have_text("no key")
        opened.evaluate(
            """() => { window.announcements = 0; new MutationObserver(() => { window.announcements += 1; }).observe(
            document.getElementById('alert'), {childList: true, subtree: true, characterData: true}); }"""
        )
        wait_for_polls(opened, 3)
        assert opened.evaluate("window.announcements") == 0, "a screen reader would repeat the message"
        expect(opened.get_by_label("Key")).to_be_visible()
        for invalid in ("\u043a\u043b\u044e\u0447", "secret\u201d"):
            opened.get_by_label("Key").fill(invalid)
            opened.get_by_label("Key").press("Enter")
            expect(opened.get_by_role("alert")).to_contain_text("the key contains invalid characters")
            expect(opened.locator("#status")).to_have_text("unknown key")
        opened.get_by_label("Key").fill("secret-two")
        opened.get_by_label("Key").press("Enter")
        expect(opened.locator("#status[data-ready]")).to_be_visible()
        expect(opened.get_by_role("alert")).to_be_hidden()
        opened.locator("select.task").select_option("sentiment")
        ask(opened)
        figures(opened)
        opened.get_by_role("link", name="API").click()
        routes = opened.get_by_role("dialog")
        expect(routes).to_contain_text("POST /generate")
        routes.get_by_role("button", name="Close").click()
        expect(routes).to_be_hidden()
        opened.get_by_label("Key").fill("")
        opened.get_by_label("Key").press("Enter")
        expect(opened.locator("#status")).to_have_text("no key")
        expect(opened.locator("select.task option")).to_have_count(1)
        assert not opened.locator(".answer").inner_text(), "the answer is still shown without the key"


def test_a_browser_without_storage(browser: Browser, live: Live) -> None:
    with watched(browser, live.url) as opened:
        for storage in ("localStorage", "sessionStorage"):
            blocked = "{ get() { throw new DOMException('blocked', 'SecurityError'); } }"
            opened.add_init_script(f"Object.defineProperty(window, '{storage}', {blocked});")
        opened.goto(live.url)
        opened.locator("select.task").select_option("sentiment")
        ask(opened)
        figures(opened)
        opened.get_by_role("button", name="Change between light and dark").click()
        expect(opened.locator("html[data-theme=dark]")).to_have_count(1)


def test_the_page_under_a_path_prefix(browser: Browser, live: Live) -> None:
    """Every request of the page stays under the prefix."""
    strays: list[str] = []

    def proxied(route: Route) -> None:
        path = route.request.url.removeprefix(live.url)
        if not path.startswith("/llm/"):
            strays.append(path)
        route.fulfill(response=route.fetch(url=live.url + path.removeprefix("/llm")))

    with watched(browser, live.url) as opened:
        opened.route("**/*", proxied)
        opened.goto(f"{live.url}/llm/")
        opened.locator("select.task").select_option("sentiment")
        ask(opened)
        figures(opened)
        opened.get_by_role("tab", name="Tasks").click()
        expect(opened.get_by_role("tabpanel").get_by_text("sentiment").first).to_be_visible()
        opened.get_by_role("link", name="API").click()
        expect(opened.get_by_text("/v1/chat/completions").first).to_be_visible()
        assert opened.url == f"{live.url}/llm/docs"
    assert not strays


def test_live_token_counters(page: Page, live: Live) -> None:
    page.get_by_role("tab", name="Live").click()
    now = page.locator("#live-now")
    expect(now).to_contain_text(re.compile(r"tokens per second\s*0"))
    body = {"prompt": FILM, "max_tokens": 8000, "ignore_eos": True, "stream": True}
    with live.client.stream("POST", "/generate", json=body) as answer:
        expect(now).to_contain_text(re.compile(r"tokens per second\s*[1-9]"))
        lines = answer.iter_lines()  # dropping the iterator would close the response
        assert next(lines), "the request ended too early"
        assert live.get("/stats")["engine"]["running"] == 1


def test_rates_use_observed_intervals_only(page: Page, live: Live) -> None:
    shown = live.get("/stats")
    held: list[Route] = []
    page.evaluate("location.hash = '#/live'")
    page.route("**/stats", lambda route: held.append(route))
    page.reload()
    now, chart = page.locator("#live-now"), page.locator("#chart-tokens")

    def answer_poll(tokens: int) -> None:
        until(lambda: page.wait_for_timeout(10) or held)
        engine = {**shown["engine"], "generated": tokens, "prompt": tokens}
        held.pop().fulfill(json={**shown, "engine": engine})

    answer_poll(1_000_000)
    expect(now).to_contain_text(re.compile(r"tokens per second\s*…"))
    answer_poll(1_000_000)
    expect(now).to_contain_text(re.compile(r"tokens per second\s*0"))
    answer_poll(2_000_000)
    expect(now).to_contain_text(re.compile(r"tokens per second\s*[1-9]"))
    expect(chart).to_have_attribute("aria-label", re.compile(r"generated [1-9]\d*, prompt [1-9]"))
    answer_poll(1_000)  # lower counters: the server was restarted
    expect(now).to_contain_text(re.compile(r"tokens per second\s*…"))
    expect(chart).to_have_attribute("aria-label", "generated …, prompt …")
    answer_poll(2_000)
    expect(now).to_contain_text(re.compile(r"tokens per second\s*[1-9]"))
    page.evaluate("() => { const before = Date.now; Date.now = () => before() + 60_000; }")
    answer_poll(1_000_000)
    expect(now).to_contain_text(re.compile(r"tokens per second\s*…"))
    answer_poll(1_000_000)
    expect(now).to_contain_text(re.compile(r"tokens per second\s*0"))
    page.unroute_all()


def test_an_evaluation_is_cancelled(page: Page, live: Live) -> None:
    data = [{"input": f"{FILM} {i}", "output": "positive"} for i in range(2000)]
    job = live.post("/tasks/sentiment/evaluate", {"data": data}, 202)["id"]
    page.get_by_role("tab", name="Jobs").click()
    card = page.locator(".job").filter(has_text=job)
    card.get_by_role("button", name="Cancel sentiment").click()
    expect(card.locator(".state")).to_have_text("cancelled")
    expect(card.get_by_role("button")).to_have_count(0)
    assert live.get(f"/jobs/{job}")["status"] == "cancelled"


def test_a_job_is_started_paused_resumed_and_cancelled(page: Page, live: Live) -> None:
    page.get_by_role("tab", name="Jobs").click()
    lines = "".join(json.dumps({"input": f"word {i}", "output": "yes"}) + "\n" for i in range(16)).encode()

    def start(name: str, content: bytes, epochs: int, validation: bytes = b"") -> None:
        page.get_by_label("Training examples (JSON or JSONL)").set_input_files(
            {"name": "words.jsonl", "mimeType": "application/jsonl", "buffer": content}
        )
        if validation:
            page.get_by_label("Validation examples").set_input_files(
                {"name": "held.jsonl", "mimeType": "application/jsonl", "buffer": validation}
            )
        page.get_by_label("Adapter name").fill(name)
        page.get_by_label("Rank").fill("2")
        page.get_by_label("Epochs").fill(str(epochs))
        page.get_by_role("button", name="Start").click()
        expect(page.get_by_label("Adapter name")).to_have_value("")

    def card(name: str):
        return page.locator(".job").filter(has=page.locator("h2", has_text=name))

    start("words", lines, 20, lines)  # enough steps to pause the job on a fast machine
    expect(card("words").locator(".chart canvas")).to_be_visible(timeout=120_000)
    page.get_by_role("button", name="Pause words").click()
    expect(card("words").locator(".state")).to_have_text("paused", timeout=60_000)
    page.get_by_role("button", name="Resume words").click()
    expect(card("words").locator(".state")).to_have_text("succeeded", timeout=120_000)
    expect(card("words")).to_contain_text("20 of 20 steps")
    expect(card("words")).to_contain_text("published as words@")
    expect(card("words").locator(".u-legend")).to_contain_text("validation loss")
    assert live.get("/adapters/words")["ranks"] == [2]

    start("wrong", lines + b'{"input": 1}\n', 1)
    expect(card("wrong").locator(".wrong")).to_contain_text("line 17", timeout=60_000)
    expect(page.get_by_role("button", name="Resume wrong")).to_be_visible()

    start("endless", lines, 1000)
    page.get_by_role("button", name="Cancel endless").click()
    expect(card("endless").locator(".state")).to_have_text("cancelled", timeout=60_000)
    page.get_by_role("button", name="Change between light and dark").click()
    expect(card("words").locator(".chart canvas")).to_be_visible()
    page.get_by_role("button", name="Change between light and dark").click()
    page.get_by_label("Adapter name").fill("base")
    page.get_by_label("Training examples (JSON or JSONL)").set_input_files(
        {"name": "words.jsonl", "mimeType": "application/jsonl", "buffer": lines}
    )
    before = live.get("/v1/files")["data"]
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("alert")).to_contain_text("reserved")
    assert live.get("/v1/files")["data"] == before, "the uploaded file is left over"
