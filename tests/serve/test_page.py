"""The page in a real browser, where there is one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from served import Serve, Served

from shoal.config import EngineOptions

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--disable-component-update"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def served(serve: Serve) -> Iterator[Served]:
    with serve(chat_template="v3.1", engine=EngineOptions(speculate="on")) as running:
        yield running


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    """A fresh page; whatever goes wrong in it fails the test, and so does a request to anywhere else."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    tab = context.new_page()
    complaints: list[str] = []
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    tab.on("request", lambda request: None if request.url.startswith(served.url) else complaints.append(request.url))
    tab.goto(served.url)
    tab.wait_for_selector("#model option", state="attached")
    yield tab
    context.close()
    assert complaints == []


def say(page: Any, text: str, tokens: int = 12) -> None:
    page.evaluate("n => { const f = document.getElementById('max_tokens'); f.value = n; f.dispatchEvent(new Event('input')); }", tokens)
    page.fill("#input", text)
    page.press("#input", "Enter")


def done(page: Any) -> None:
    page.wait_for_selector("#stop", state="hidden")
    page.wait_for_selector("#send", state="visible")


def test_a_conversation_with_edit_retry_and_memory(page: Any) -> None:
    say(page, "the red fish")
    done(page)
    assert page.locator(".message.user .text").inner_text() == "the red fish"
    assert "tokens/s" in page.inner_text("#speed")
    page.locator(".message.assistant").hover()
    page.click(".message.assistant >> text=Retry")
    done(page)
    assert page.locator(".message").count() == 2
    page.locator(".message.user").hover()
    page.click("text=Edit")
    page.fill(".edit", "a blue reef")
    page.press(".edit", "Enter")
    done(page)
    assert page.locator(".message.user .text").inner_text() == "a blue reef"
    page.reload()
    page.wait_for_selector(".message.user")
    assert page.locator(".message.user .text").inner_text() == "a blue reef"
    page.click("#new")
    assert page.locator(".message").count() == 0
    page.click(".entry .name >> text=the red fish")
    assert page.locator(".message.user .text").inner_text() == "a blue reef"


def test_stop_frees_the_engine(page: Any, served: Served) -> None:
    say(page, "the", 400)
    page.wait_for_selector("#stop", state="visible")
    page.keyboard.press("Escape")
    done(page)
    assert served.is_idle()


def test_what_comes_leaves_readers_where_they_are(page: Any) -> None:
    """Whoever reads further up is not taken to the end, neither while an answer comes nor when it ends."""
    page.set_viewport_size({"width": 1200, "height": 400})
    say(page, "the red fish\n" * 30)
    done(page)
    say(page, "and", 200)
    page.wait_for_selector(".caret")
    page.evaluate("document.getElementById('log').scrollTop = 40")
    done(page)
    assert page.evaluate("document.getElementById('log').scrollTop") == 40


def test_a_conversation_that_is_deleted_stays_deleted(page: Any) -> None:
    say(page, "the red fish", 400)
    page.wait_for_selector(".caret")
    page.click(".entry .drop")
    done(page)
    assert page.locator(".entry .name").all_inner_texts() == ["New conversation"]
    page.reload()
    page.wait_for_selector("#model option", state="attached")
    assert page.locator(".entry .name").all_inner_texts() == ["New conversation"]


def test_two_tabs_keep_the_conversations_of_both(page: Any) -> None:
    other = page.context.new_page()
    other.goto(page.url)
    other.wait_for_selector("#model option", state="attached")
    for tab, text in ((page, "the red fish"), (other, "a blue reef")):
        say(tab, text)
        done(tab)
    for tab in (page, other):
        names = tab.locator(".entry .name")
        assert set(names.all_inner_texts()) == {"the red fish", "a blue reef"}
    other.close()


def test_experts_are_shown_token_by_token(page: Any) -> None:
    page.keyboard.press("Control+e")
    say(page, "the red fish", 20)
    done(page)
    tokens = page.locator(".tokens .token")
    assert tokens.count() > 1
    assert page.locator("#bars div").count() == 4
    assert "tokens" in page.inner_text("#facts")
    before = tokens.first.evaluate("node => node.style.background")
    page.click("#later")
    assert tokens.first.evaluate("node => node.style.background") != before
    tokens.first.click()
    assert "layer 1" in page.inner_text("#detail")
    assert page.locator(".tokens .token.accepted, .tokens .token.rejected").count() > 0


def test_thoughts_fold_away(page: Any) -> None:
    page.click("#settings")
    page.check("#thinking")
    page.click("#close")
    say(page, "the red fish", 16)
    done(page)
    thought = page.locator("details.thought")
    assert thought.is_visible()
    thought.locator("summary").click()
    assert thought.evaluate("node => node.open") in (True, False)


def test_dark_and_phone(page: Any) -> None:
    theme = page.evaluate("document.documentElement.dataset.theme")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") != theme
    page.set_viewport_size({"width": 390, "height": 780})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for leave in (lambda: page.keyboard.press("Escape"), lambda: page.mouse.click(380, 400)):
        page.click("#menu")
        page.wait_for_selector("#new", state="visible")
        leave()
        page.wait_for_selector("#new", state="hidden")


def test_what_a_model_writes_is_never_html(page: Any) -> None:
    shown = page.evaluate(
        """async () => {
            const { showMarkdown } = await import('/page/markdown.js');
            const box = document.createElement('div');
            const links = '[x](javascript:alert(1)) [y](https://e.org)';
            showMarkdown(box, `<img src=x onerror=alert(1)> **b** ${links}\\n~~~py\\n<b>\\n~~~\\n- a\\n- b`);
            const count = (name) => box.querySelectorAll(name).length, text = (name) => box.querySelector(name).textContent;
            return [count('img'), count('a'), text('pre'), count('li'), text('strong')];
        }"""
    )
    assert shown == [0, 1, "<b>", 2, "b"]


def test_markdown_as_models_write_it(page: Any) -> None:
    text = (
        "1. one\n```\nx\n```\n2. two\n\nA table:\n| a | b |\n|---|---|\n| 1 | 2 |\n\nso a*b + c * d of my__own__name *is* __it__\n"
        + ">" * 5000
    )
    shown = page.evaluate(
        """async (text) => {
            const { showMarkdown } = await import('/page/markdown.js');
            const box = document.createElement('div');
            showMarkdown(box, text);
            const all = (name) => [...box.querySelectorAll(name)];
            const texts = all('em, strong').map((one) => one.textContent);
            return [all('ol').map((one) => one.start), all('td').length, texts, all('blockquote').length];
        }""",
        text,
    )
    assert shown == [[1, 2], 2, ["is", "it"], 20]


def test_an_answer_that_grows_ends_as_one_that_is_there_at_once(page: Any) -> None:
    pieces = ["a", "b **c** `d`", " ", "\n", "\n", "\n\n", "# ", "- ", "  - ", "2. ", "> ", "```", "~~~", "|", "| a | b |", "\n|---|---|\n"]
    random = Random(0)
    texts = ["".join(random.choices(pieces, k=random.randint(1, 30))) for _ in range(300)]
    differ = page.evaluate(
        """async (texts) => {
            const { showMarkdown } = await import('/page/markdown.js');
            const [grown, whole] = [document.createElement('div'), document.createElement('div')];
            return texts.filter((text) => {
                for (let end = 1; end <= text.length; end++) showMarkdown(grown, text.slice(0, end));
                showMarkdown(whole, text);
                return grown.innerHTML !== whole.innerHTML;
            });
        }""",
        texts,
    )
    assert differ == []


def test_what_has_been_read_of_an_answer_stays_as_it_grows(page: Any) -> None:
    same = page.evaluate(
        """async () => {
            const { showMarkdown } = await import('/page/markdown.js');
            const box = document.createElement('div');
            showMarkdown(box, 'one\\n\\n```\\ntwo\\n```\\nthree\\n\\nfour');
            const first = [...box.children];
            showMarkdown(box, 'one\\n\\n```\\ntwo\\n```\\nthree\\n\\nfour and five');
            return [...box.children].map((node, at) => node === first[at]);
        }"""
    )
    assert same == [True, True, False, False]


def test_a_key_is_asked_for_in_its_own_field(browser: Any, serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("my-very-secret-key\n")
    with serve(api_key_file=str(tmp_path / "keys")) as served:
        page = browser.new_page()
        page.goto(served.url)
        page.wait_for_selector("#panel", state="visible")
        page.keyboard.type("my-very-secret-key", delay=250)
        assert page.input_value("#key") == "my-very-secret-key"
        assert page.input_value("#system") == ""
        page.click("#close")
        page.wait_for_selector("#model option", state="attached")
        page.close()


def test_a_base_model_completes(browser: Any, base: Served, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    page = browser.new_page()
    page.goto(base.url)
    area = page.locator(".completion textarea")
    area.fill("the red fish")
    area.press("Control+Enter")
    expect(page.locator("#go")).to_have_text("Stop (Esc)")
    expect(area).to_have_value(re.compile("^the red fish.+", re.DOTALL))
    page.wait_for_selector("text=Continue")
    assert page.locator(".completion textarea").input_value().startswith("the red fish")
    page.close()
