"""The built-in page in a real Chromium: each control, on one server with the embedded base.

Every test fails on a script error, a console error that is no refused request, and on any request to another host.
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
REFUSED = "Failed to load resource"
"""What Chromium writes for each answer of 4xx, whether the page expects it or not."""
FILM = "A stirring, funny film that never lets go."
ENDLESS = "Count: one, two, three,"
"""What base only, at temperature 0, goes on with for longer than any test takes to stop it."""
OFTEN = "{ const wait = setTimeout; setTimeout = (call, ms) => wait(call, ms === 2000 ? 250 : ms); }"
"""The page asks for what is new every two seconds, which most tests wait for once or more."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=1000 * SECONDS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, embedded: Path, write_random: Callable[..., Path]) -> Iterator[Live]:
    """A server with the library's adapter, two random ones, and a folder that it has to reject."""
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
    """The page, ready; light, unless the test asks for something else by `parametrize(..., indirect=True)`."""
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
    """A page that is closed at the end, and that has written no error and asked none but the server at `url`."""
    opened = opener.new_page()
    opened.add_init_script(OFTEN)
    wrong: list[str] = []
    hosts: set[str] = set()

    def heard(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(REFUSED):
            wrong.append(f"{message.text} at {message.location}")

    opened.on("console", heard)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda sent: hosts.add(urlsplit(sent.url).netloc))
    try:
        yield opened
    finally:
        opened.close()
    assert not wrong
    assert hosts == {urlsplit(url).netloc}


def ask(page: Page, prompt: str = FILM, tokens: int | None = None) -> None:
    page.get_by_role("textbox", name="Prompt").fill(prompt)
    if tokens is not None:
        page.get_by_label("Max tokens").fill(str(tokens))
    page.get_by_role("button", name="Run").click()


def figures(page: Page, side: int = 0) -> dict[str, str]:
    """What a side says of its answer, once it is whole."""
    node = page.locator(".side").nth(side)
    expect(node.locator(".after")).to_be_visible()
    return dict(zip(node.locator("dt").all_inner_texts(), node.locator("dd").all_inner_texts(), strict=True))


def body_of(page: Page, act: Callable[[], None]) -> dict:
    """The JSON of the generation that `act` sends."""
    with page.expect_request(lambda sent: "/generate" in sent.url) as caught:
        act()
    return json.loads(caught.value.post_data or "")


def looks(page: Page, times: int) -> None:
    """Returns once the page has asked for what is new so often, and was answered."""
    for _ in range(times):
        with page.expect_response("**/stats"):
            pass


def job_told(name: str, **given: object) -> dict:
    """A training job that runs, as `/jobs` lists it."""
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
    assert len(lengths) > 10 and lengths == sorted(lengths), "the text grew step by step"
    assert not page.locator(".side .up").is_visible(), "without a task there is nothing to tell of"


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


def test_late_feedback_is_not_shown_on_another_answer(page: Page) -> None:
    page.locator("select.task").select_option("sentiment")
    ask(page)
    figures(page)
    held: list[Route] = []
    page.route("**/feedback", lambda route: held.append(route))
    good = page.get_by_role("button", name="Good answer")
    good.click()
    until(lambda: page.wait_for_timeout(10) or held)
    ask(page, "A dull film.")
    expect(page.locator(".answer.done")).to_be_visible()
    figures(page)
    held[0].fulfill(status=204)
    expect(page.locator("#notice")).to_have_text("Recorded as a good answer of sentiment.")
    expect(good).to_have_attribute("aria-pressed", "false")
    page.unroute_all()


def test_copied_snippets_run(page: Page, live: Live) -> None:
    """curl, Python and openai: each snippet is run, and answers what the page has shown."""
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
    """In a shell where that is exported servers start all the same. And a copy waits for as long as the server does."""
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


def test_a_copied_snippet_without_a_task_names_the_base(page: Page, live: Live) -> None:
    page.locator("select.task").select_option("")
    ask(page, "The capital of France is", tokens=4)
    figures(page)
    page.get_by_role("button", name="openai", exact=True).click()
    expect(page.locator("#notice")).to_have_text("Copied as openai.")
    out = subprocess.run(
        [sys.executable, "-c", page.evaluate("navigator.clipboard.readText()")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == page.locator(".answer").inner_text().strip()


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
    assert len(hint.inner_text()) < 300, "a template may be of any length"
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


def test_a_new_default_task_is_shown_as_the_one_that_answered(page: Page, live: Live) -> None:
    page.locator("select.task").select_option("")
    live.client.put("/tasks/default", json={"prompt": "{input}"}).raise_for_status()
    try:
        ask(page, "Hello", tokens=2)
        figures(page)
        expect(page.get_by_role("button", name="Good answer")).to_be_visible()
        page.get_by_role("button", name="openai", exact=True).click()
        expect(page.locator("#notice")).to_have_text("Copied as openai.")
        assert 'model="default"' in page.evaluate("navigator.clipboard.readText()")
    finally:
        live.client.delete("/tasks/default")


def test_the_first_task_is_not_selected_automatically(page: Page) -> None:
    published = False
    page.route("**/tasks", lambda route: route.continue_() if published else route.fulfill(json={"tasks": []}))
    page.reload()
    expect(page.locator("#run")).to_be_enabled()
    published = True
    page.get_by_role("button", name="Add adapter").click()
    expect(page.locator("select.task option")).not_to_have_count(1)
    expect(page.locator("select.task")).to_have_value("")
    page.unroute_all()


def test_invalid_weights_are_not_sent(page: Page) -> None:
    page.locator("select.task").select_option("sentiment")
    page.get_by_role("button", name="Add adapter").click()
    weight = page.locator(".mix li").get_by_role("spinbutton")
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if "/generate" in request.url else None)
    for wrong in ("", "99"):
        weight.fill(wrong)
        ask(page)
        expect(weight).to_be_focused()
    assert not sent, "no weight would be one of 0"
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
    """A click takes a while, and is lost where the row is another when it ends."""
    leases = 7

    def in_use(route: Route) -> None:
        answer = route.fetch()
        told = answer.json()
        route.fulfill(response=answer, json={**told, "adapters": [{**a, "leases": leases} for a in told["adapters"]]})

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
        name.fill("first")  # as before, so that this alone tells of no change
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


def test_a_file_chosen_during_an_upload_stays_chosen(page: Page) -> None:
    page.get_by_role("tab", name="Adapters").click()
    page.get_by_label("Name", exact=True).fill("again")
    weights = page.get_by_label("adapter_model.safetensors")
    for file in (page.get_by_label("adapter_config.json"), weights):
        file.set_input_files({"name": "first", "mimeType": "application/octet-stream", "buffer": b"{}"})
    held: list[Route] = []
    page.route("**/adapters", lambda route: held.append(route) if route.request.method == "POST" else route.continue_())
    page.get_by_role("button", name="Upload", exact=True).click()
    until(lambda: page.wait_for_timeout(10) or held)
    weights.set_input_files({"name": "second", "mimeType": "application/octet-stream", "buffer": b"{}"})
    held[0].fulfill(json={"version": "again@1"})
    expect(page.locator("#notice")).to_have_text("again@1 is served.")
    assert weights.evaluate("input => input.files[0]?.name") == "second"
    page.unroute_all()


def test_focus_stays_while_an_action_runs(page: Page) -> None:
    held: list[Route] = []
    page.route("**/adapters/formal/pin", lambda route: held.append(route))
    page.get_by_role("tab", name="Adapters").click()
    pin = page.get_by_role("button", name="Pin formal", exact=True)
    pin.click()
    until(lambda: page.wait_for_timeout(10) or held)
    name = page.get_by_label("Name", exact=True)
    name.focus()
    held[0].fulfill(status=204)
    expect(pin).to_be_enabled()
    expect(name).to_be_focused()


def test_late_responses_are_not_drawn(page: Page, live: Live) -> None:
    """A poll that is answered after what a button has asked for anew would bring the old state back."""
    held: list[Route] = []
    before = live.get("/adapters")
    page.get_by_role("tab", name="Adapters").click()
    expect(row(page, "formal")).to_be_visible()
    page.route("**/adapters", lambda route: route.continue_() if held else held.append(route))
    until(lambda: page.wait_for_timeout(10) or held)
    page.get_by_role("button", name="Pin formal", exact=True).click()
    expect(page.get_by_role("button", name="Unpin formal")).to_be_visible()
    drawn = row(page, "formal").element_handle()
    with page.expect_request("**/stats"):  # of the next poll
        held[0].fulfill(json=before)
    assert drawn.evaluate("node => node.isConnected")
    live.client.post("/adapters/formal/unpin").raise_for_status()

    listings: list[Route] = []
    page.route("**/jobs", lambda route: listings.append(route))
    page.get_by_role("tab", name="Jobs").click()
    until(lambda: page.wait_for_timeout(10) or len(listings) > 1)
    listings[1].fulfill(json={"jobs": [job_told("late", status="paused")]})
    drawn = page.locator(".job .state", has_text="paused").element_handle()
    with page.expect_request("**/stats"):
        listings[0].fulfill(json={"jobs": [job_told("late")]})
    assert drawn.evaluate("node => node.isConnected")
    page.unroute_all()


def test_a_server_without_answers_is_shown_as_not_ready(page: Page) -> None:
    page.route("**/stats", lambda route: None)
    expect(page.locator("#status")).to_have_text("not connected", timeout=30_000)
    expect(page.get_by_role("alert")).to_contain_text("the server does not respond")
    page.unroute_all()
    expect(page.locator("#status[data-ready]")).to_be_visible(timeout=30_000)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_not_ready_with_other_error_texts(page: Page) -> None:
    """WebKit gives what was stopped for being late the name of what somebody stopped."""
    page.route("**/stats", lambda route: None)
    page.evaluate(
        """() => { const before = window.fetch; window.fetch = (...given) => before(...given).catch((error) => {
            throw error.name === "TimeoutError" ? new DOMException("Fetch is aborted", "AbortError") : error; });
            const timeout = AbortSignal.timeout.bind(AbortSignal); AbortSignal.timeout = () => timeout(500); }"""
    )
    expect(page.locator("#status")).to_have_text("not connected", timeout=30_000)
    expect(page.get_by_role("alert")).to_contain_text("the server does not respond")
    page.unroute_all()
    expect(page.locator("#status[data-ready]")).to_be_visible(timeout=30_000)


def test_the_scroll_position_stays_when_an_answer_ends(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    end = page.evaluate(
        """() => fetch('/generate', { method: 'POST', headers: { 'content-type': 'application/json' },
            body: JSON.stringify({ prompt: 'x', max_tokens: 1 }) }).then((answer) => answer.json())"""
    )
    del end["text"]
    events = [*({"id": end["id"], "text": "word " * 40} for _ in range(40)), end]
    sent = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    held: list[Route] = []
    page.route("**/generate*", lambda route: held.append(route))
    ask(page)
    until(lambda: page.wait_for_timeout(10) or held)
    page.evaluate("() => { document.querySelector('.answer').style.minHeight = '3000px'; window.scrollTo(0, 900); }")
    until(lambda: page.evaluate("window.scrollY") == 900)
    held[0].fulfill(body=sent, content_type="text/event-stream")
    expect(page.get_by_role("button", name="Run")).to_be_focused()
    expect(page.locator(".answer.done")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()
    assert page.evaluate("window.scrollY") >= 900, "what stands above it may grow"
    page.unroute_all()


def test_charts_stay_in_view_when_the_viewport_grows(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    page.get_by_role("tab", name="Live").click()
    expect(page.locator("#chart-batch canvas, #live canvas").first).to_be_visible(timeout=30_000)
    until(lambda: page.evaluate("window.scrollTo(0, 500), window.scrollY") == 500)
    page.evaluate("() => { addEventListener('resize', () => { window.resized = true; }); }")
    page.set_viewport_size({"width": 360, "height": 700})
    until(lambda: page.evaluate("window.resized && document.querySelectorAll('#live canvas').length > 0"))
    assert page.evaluate("window.scrollY") == 500


def test_new_adapters_appear_while_the_page_is_open(page: Page) -> None:
    more = page.evaluate("() => fetch('/adapters').then((answer) => answer.json())")
    more["adapters"].append({**more["adapters"][0], "name": "published-meanwhile"})
    page.route("**/adapters", lambda route: route.fulfill(json=more))
    page.get_by_role("button", name="Add adapter").click()
    expect(page.locator(".mix option", has_text="published-meanwhile")).to_have_count(1)
    page.unroute_all()


def test_a_file_changed_after_selection_is_an_error(page: Page, tmp_path: Path) -> None:
    page.get_by_role("tab", name="Jobs").click()
    file = tmp_path / "words.jsonl"
    file.write_text('{"input": "a", "output": "b"}\n')
    # A browser knows a changed file by its time, and a clock that ticks slowly gives two writes in a row the same one.
    os.utime(file, (1e9, 1e9))
    chosen = page.get_by_label("Training examples (JSON or JSONL)")
    chosen.set_input_files(file)
    assert chosen.evaluate("input => input.files[0].text()") == file.read_text()
    file.write_text('{"input": "a", "output": "b"}\n' * 2)
    page.get_by_label("Adapter name").fill("changed")
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("alert")).to_contain_text("words.jsonl has changed; choose it again")


def test_run_is_disabled_until_tasks_are_loaded(page: Page) -> None:
    """A form that is sent before its script is there would end the loading of that."""
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
    """A browser has six connections, one of which is left to what else is asked, and each of the rest would wait for
    one until its time is over."""
    [task] = [task for task in live.get("/tasks")["tasks"] if task["name"] == "sentiment"]
    told = live.get("/tasks/sentiment/performance")
    held: list[Route] = []
    page.route("**/tasks", lambda r: r.fulfill(json={"tasks": [{**task, "name": f"t{n}"} for n in range(15)]}))
    page.route("**/performance", lambda route: held.append(route))
    page.get_by_role("tab", name="Tasks").click()
    for wanted in (5, 5, 5):
        until(lambda: page.wait_for_timeout(10) or len(held) >= wanted)  # noqa: B023
        page.wait_for_timeout(100)
        assert len(held) == wanted
        while held:
            held.pop().fulfill(json=told)
    expect(page.locator("#task-list .task")).to_have_count(15)
    page.unroute_all()


def test_a_button_keeps_the_focus_during_updates(page: Page) -> None:
    job = job_told("kept", status="validating_files", started_at=None)
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
    jobs = [job_told(f"job{i}", id=f"ftjob-{i}", step=2, loss=1.0) for i in range(8)]
    curves = {"train_loss": [[1, 2.0], [2, 1.0]], "valid_loss": []}

    def one(route: Route) -> None:
        number = int(route.request.url.rsplit("-", 1)[1])
        if number == 1:
            route.fulfill(status=500, json={"error": {"message": "this one is not to be had"}})
        else:
            route.fulfill(json={**jobs[number], "curves": curves})

    page.route("**/jobs/ftjob-*", one)
    page.route("**/jobs", lambda route: route.fulfill(json={"jobs": jobs}))
    page.get_by_role("tab", name="Jobs").click()
    expect(page.get_by_role("alert")).to_contain_text("this one is not to be had")
    expect(page.get_by_role("button", name="Cancel job")).to_have_count(8)
    expect(page.locator("#job-list canvas, #jobs canvas")).to_have_count(7)
    page.unroute_all()


def test_charts_of_removed_jobs_disappear(page: Page) -> None:
    job = job_told("leaves", step=2, loss=1.0)
    listed = [job]
    page.evaluate(
        """() => { const Plot = window.uPlot; window.destroyed = 0; window.uPlot = Object.assign(function (...given) {
        const plot = new Plot(...given); const { destroy } = plot;
        plot.destroy = () => { window.destroyed += 1; destroy(); }; return plot; }, Plot); }"""
    )
    curves = {"train_loss": [[1, 2.0], [2, 1.0]], "valid_loss": []}
    page.route("**/jobs", lambda route: route.fulfill(json={"jobs": listed}))
    page.route("**/jobs/ftjob-leaves", lambda route: route.fulfill(json={**job, "curves": curves}))
    page.get_by_role("tab", name="Jobs").click()
    expect(page.locator("#job-list canvas")).to_be_visible()
    listed.clear()
    expect(page.locator(".job")).to_have_count(0)
    until(lambda: page.evaluate("window.destroyed") == 1)
    page.unroute_all()


def test_task_choices_load_without_jobs(page: Page) -> None:
    asked: list[Route] = []
    refused = True

    def tasks(route: Route) -> None:
        asked.append(route)
        if refused:
            route.fulfill(status=500, json={"error": {"message": "these are not to be had"}})
        else:
            route.continue_()

    page.route("**/tasks", tasks)
    page.route("**/jobs", lambda route: route.fulfill(json={"jobs": [job_told("shown")]}))
    page.get_by_role("tab", name="Jobs").click()
    expect(page.get_by_role("alert")).to_contain_text("these are not to be had")
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
    assert len(asked) == before, "whole definitions, every two seconds"
    with page.expect_request("**/tasks"):
        task.focus()
    page.unroute_all()


def test_one_failed_request_does_not_empty_the_tasks(page: Page) -> None:
    refused: list[str] = []

    def once(route: Route) -> None:
        if refused:
            route.continue_()
        else:
            refused.append(route.request.url)
            route.fulfill(status=429, json={"error": {"message": "too many at once"}})

    page.route("**/performance", once)
    page.get_by_role("tab", name="Tasks").click()
    expect(page.get_by_role("alert")).to_contain_text("too many at once")
    expect(page.locator("[data-task=sentiment]")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_failed_request_does_not_hide_other_figures(page: Page, live: Live) -> None:
    live.post("/generate?task=sentiment", {"prompt": FILM, "max_tokens": 1})
    [task] = [task for task in live.get("/tasks")["tasks"] if task["name"] == "sentiment"]
    told = live.get("/tasks/sentiment/performance")
    refused, requests = ["never"], 1_111

    def performance(route: Route) -> None:
        if route.request.url.split("/")[-2] in refused:
            return route.fulfill(status=500, json={"error": {"message": "these are not to be had"}})
        return route.fulfill(json={**told, "versions": [{**told["versions"][0], "requests": requests}]})

    names = ("good", "later", "never")
    page.route("**/tasks", lambda route: route.fulfill(json={"tasks": [{**task, "name": name} for name in names]}))
    page.route("**/performance", performance)
    page.get_by_role("tab", name="Tasks").click()
    good, later, never = (page.locator(f"[data-task={name}]") for name in names)
    expect(page.get_by_role("alert")).to_contain_text("these are not to be had")
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
    """Where time stands still they are never due. What was wrong is told until they are."""
    asked: list[Route] = []

    def once(route: Route) -> None:
        asked.append(route)
        if len(asked) > 1:
            return route.continue_()
        return route.fulfill(status=500, json={"error": {"message": "these are not to be had"}})

    page.evaluate("sessionStorage.setItem('key', 'one')")
    page.add_init_script("performance.now = () => 1000;")
    page.route("**/tasks/sentiment/performance", once)
    page.reload()
    page.get_by_role("tab", name="Tasks").click()
    expect(page.get_by_role("alert")).to_contain_text("these are not to be had")
    looks(page, 3)
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


def test_a_new_key_reloads_the_tasks(page: Page) -> None:
    asked: list[Route] = []
    page.evaluate("sessionStorage.setItem('key', 'one')")
    page.add_init_script("performance.now = () => 1000;")
    page.route("**/tasks/sentiment/performance", lambda route: route.continue_() if asked else asked.append(route))
    page.reload()
    page.get_by_role("tab", name="Tasks").click()
    until(lambda: page.wait_for_timeout(10) or asked)
    page.get_by_label("Key").fill("two")
    page.get_by_label("Key").press("Enter")
    with page.expect_request("**/tasks/sentiment/performance"):
        asked[0].fulfill(status=401, json={"error": {"message": "a key that is not known"}})
    expect(page.locator("[data-task=sentiment]")).not_to_contain_text("not loaded yet")
    expect(page.get_by_role("alert")).to_be_hidden()
    page.unroute_all()


def test_the_page_stays_usable_while_tasks_load(page: Page) -> None:
    held: list[Route] = []

    def busy(route: Route) -> None:
        answer = route.fetch()
        told = answer.json()
        route.fulfill(response=answer, json={**told, "engine": {**told["engine"], "running": 77}})

    page.evaluate("() => { AbortSignal.timeout = () => new AbortController().signal; }")  # nothing is given up
    page.route("**/performance", lambda route: held.append(route))
    page.get_by_role("tab", name="Tasks").click()
    until(lambda: page.wait_for_timeout(10) or held)
    looks(page, 1)  # finds the round under way
    page.route("**/stats", busy)
    expect(page.locator("#status")).to_contain_text("77 running")
    page.unroute_all()


def test_errors_stay_with_their_tab(page: Page) -> None:
    held: list[Route] = []
    page.route("**/tasks", lambda route: held.append(route))
    page.get_by_role("tab", name="Tasks").click()
    until(lambda: page.wait_for_timeout(10) or held)
    page.get_by_role("tab", name="Adapters").click()
    expect(row(page, "formal")).to_be_visible()
    page.evaluate(
        """() => { window.said = 0; new MutationObserver(() => { window.said += 1; }).observe(
        document.getElementById('alert'), {childList: true, subtree: true, attributes: true}); }"""
    )
    for route in held:
        route.fulfill(status=500, json={"error": {"message": "these are not to be had"}})
    for _ in range(2):
        with page.expect_response("**/adapters"):
            pass
    assert page.evaluate("window.said") == 0
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
    assert live.client.get("/adapters/spare").status_code == 200, "asked first"
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Remove spare").click()
    expect(page.get_by_role("button", name="Remove spare")).to_have_count(0)
    expect(page.locator("#notice")).to_have_text("spare is removed.")
    expect(page.get_by_role("heading", name="Adapters on this server")).to_be_focused()
    assert live.client.get("/adapters/spare").status_code == 404


def test_errors_stay_visible(page: Page, live: Live) -> None:
    """An adapter that a task routes to cannot be retired: why outlives the polls, until it is closed."""
    route = {"choice": [{"name": "formal", "weight": 1.0}]}
    assert live.client.put("/tasks/guarded", json={"prompt": "{input}", "route": route}).is_success
    page.get_by_role("tab", name="Adapters").click()
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Remove formal").click()
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("guarded")
    looks(page, 3)
    expect(alert).to_be_visible()
    page.get_by_role("button", name="Close message").click()
    expect(alert).to_be_hidden()
    assert live.client.delete("/tasks/guarded").is_success


def test_a_refused_prompt_shows_its_error_in_place(page: Page) -> None:
    page.locator("select.task").select_option("")
    ask(page, "hello", tokens=100_000)
    expect(page.locator(".answer.failed")).to_contain_text("100000")
    expect(page.get_by_role("alert")).to_contain_text("100000")
    ask(page, "hello", tokens=2)
    figures(page)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_an_upload_is_served_at_once_and_a_bad_one_is_refused(
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


def test_rejected_folders_with_their_reasons(page: Page) -> None:
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
    told = live.get("/tasks/sentiment/performance")
    version = told["versions"][0]
    versions = [version, {**version, "base": f"{version['base']}-before"}]
    best = {"version": version["version"], "reason": "it leads"}
    page.route("**/performance", lambda route: route.fulfill(json={**told, "versions": versions, "best": best}))
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
            looks(page, 3)  # and then it still is
            expect(shown).to_have_count(1)
            field.fill("retire")  # what can be done with each is no word of it
            expect(page.get_by_text("No matches.").locator("visible=true")).to_have_count(1)
            field.fill("")
            expect(shown.filter(has_text="mail-3")).to_have_count(1)
    finally:
        for name in names:
            live.client.delete(f"/tasks/{name}")
            live.client.delete(f"/adapters/{name}")
    expect(page.get_by_role("searchbox")).to_have_count(0)


def test_a_narrow_window(page: Page, live: Live) -> None:
    """390 pixels, as a phone has: nothing is wider, tables are lists, and every cell says what it is."""
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
        end = time.monotonic() + SECONDS  # charts are drawn anew after the browser has told of its size
        while not page.evaluate("document.documentElement.scrollWidth <= innerWidth"):
            assert time.monotonic() < end, f"{tab} is wider than the window"
            page.wait_for_timeout(50)
    page.get_by_role("tab", name="Adapters").click()
    expect(row(page, long)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the longest name is wider"
    assert live.client.delete(f"/adapters/{long}").is_success
    expect(row(page, "formal")).to_contain_text(re.compile(r"WWW, c and \d more"))
    page.set_viewport_size({"width": 910, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "a table of long names is wider"
    name = row(page, "sentiment").get_by_role("cell").first
    assert (name.bounding_box() or {"width": 0})["width"] > 120, "a short name is broken for the sake of a long one"
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
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page of routes is wider"


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
            assert all(ratio >= 3 for _, ratio in page.evaluate(CONTRAST, FIELDS)), "where a field ends"
        before = background()
        page.get_by_role("button", name="Change between light and dark").click()
        assert background() != before
    page.get_by_role("button", name="Change between light and dark").click()
    chosen = background()
    page.reload()
    assert background() == chosen, "the choice is kept"


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
            """() => { window.said = 0; new MutationObserver(() => { window.said += 1; }).observe(
            document.getElementById('alert'), {childList: true, subtree: true, characterData: true}); }"""
        )
        looks(opened, 3)
        assert opened.evaluate("window.said") == 0, "a screen reader would say it again and again"
        expect(opened.get_by_label("Key")).to_be_visible()
        for wrong in ("\u043a\u043b\u044e\u0447", "secret\u201d"):
            opened.get_by_label("Key").fill(wrong)
            opened.get_by_label("Key").press("Enter")
            expect(opened.get_by_role("alert")).to_contain_text("characters that no key can have")
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
        assert not opened.locator(".answer").inner_text(), "what the key has shown has gone with it"


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
    """Everything that the page asks for is under it, and so is what it gives to be copied."""
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
        lines = answer.iter_lines()  # which closes the answer when it is let go
        assert next(lines), "it is still under way"
        assert live.get("/stats")["engine"]["running"] == 1


def test_rates_use_observed_intervals_only(page: Page, live: Live) -> None:
    told = live.get("/stats")
    held: list[Route] = []
    page.evaluate("location.hash = '#/live'")
    page.route("**/stats", lambda route: held.append(route))
    page.reload()
    now, chart = page.locator("#live-now"), page.locator("#chart-tokens")

    def look(tokens: int) -> None:
        until(lambda: page.wait_for_timeout(10) or held)
        engine = {**told["engine"], "generated": tokens, "prompt": tokens}
        held.pop().fulfill(json={**told, "engine": engine})

    look(1_000_000)
    expect(now).to_contain_text(re.compile(r"tokens per second\s*…"))
    look(1_000_000)
    expect(now).to_contain_text(re.compile(r"tokens per second\s*0"))
    look(2_000_000)
    expect(now).to_contain_text(re.compile(r"tokens per second\s*[1-9]"))
    expect(chart).to_have_attribute("aria-label", re.compile(r"generated [1-9]\d*, prompt [1-9]"))
    look(1_000)  # the server was started anew
    expect(now).to_contain_text(re.compile(r"tokens per second\s*…"))
    expect(chart).to_have_attribute("aria-label", "generated …, prompt …")
    look(2_000)
    expect(now).to_contain_text(re.compile(r"tokens per second\s*[1-9]"))
    page.evaluate("() => { const before = Date.now; Date.now = () => before() + 60_000; }")
    look(1_000_000)
    expect(now).to_contain_text(re.compile(r"tokens per second\s*…"))
    look(1_000_000)
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

    start("words", lines, 20, lines)  # steps enough to be paused between two of them on a quick machine
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
    assert live.get("/v1/files")["data"] == before, "what was sent for it goes"
