"""The chat page in a real browser: a conversation, the stop button, keys, both themes, and no request to elsewhere."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from edgerazor import runtime
from edgerazor.runtime import Model
from edgerazor.server import page as chat_page
from helpers.serving import KEY, ScriptedScheduler, Served, serving, write_served_model
from helpers.tiny_models import ModelMaker, mostly_slow

ANSWER = "Read **this**:\n\n```python\nprint('<b>no markup</b>')\n```\n\n<img src=x onerror=alert(1)> and `code`."
#: Widths and themes; two of them in every run.
THEMES = [
    pytest.param(width, theme, marks=[] if (width, theme) in ((360, "dark"), (1400, "light")) else pytest.mark.slow)
    for width in (360, 1400)
    for theme in ("light", "dark")
]
VOID = {"meta", "link", "input", "br", "img"}


class Checker(HTMLParser):
    """Tags that are opened and closed in order, ids, and what refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.opened.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("for", "aria-labelledby", "aria-describedby", "aria-controls"):
                self.references.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag


def test_the_page_is_well_formed() -> None:
    checker = Checker()
    checker.feed(chat_page.content().decode())
    assert checker.opened == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert set(checker.references) <= set(checker.ids)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser, without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("no browser is installed: chromium, google-chrome")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def model(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return runtime.load(write_served_model(make_model, tmp_path_factory.mktemp("served")), threads=1)


@pytest.fixture(scope="module")
def served(model: Model) -> Iterator[Served]:
    tokens = list(model.tokenizer(ANSWER)["input_ids"])
    with serving(model, scheduler=ScriptedScheduler(tokens, seconds=0.001)) as server:
        yield server


class Visit:
    """A page, and what went wrong on it."""

    def __init__(self, browser: Any, served: Served, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(15_000)
        self.page = self.context.new_page()
        self.troubles: list[str] = []
        self.requested: list[str] = []
        self.bodies: list[Any] = []
        self.page.on("console", lambda message: self.troubles.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("request", self._note)
        self.page.goto(served.url)
        self.until("document.title !== 'Chat'")

    def _note(self, request: Any) -> None:
        self.requested.append(request.url)
        if request.method == "POST":
            self.bodies.append(request.post_data_json)

    def until(self, expression: str) -> None:
        """Wait until it is true; the page's policy lets playwright's own way not evaluate it."""
        end = time.monotonic() + 15
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, expression
            self.page.wait_for_timeout(20)

    def ask(self, text: str) -> None:
        self.page.fill("#question", text)
        self.page.keyboard.press("Enter")

    def wait_for_the_end(self) -> None:
        self.page.wait_for_selector(".again")

    def answers(self) -> list[str]:
        return [str(text) for text in self.page.locator(".assistant .words").all_inner_texts()]

    def close(self, served: Served) -> None:
        """Nothing went wrong, and nobody else was asked for anything."""
        self.context.close()
        assert self.troubles == []
        assert {url for url in self.requested if not url.startswith((f"{served.url}/", "data:"))} == set()


def test_a_conversation(browser: Any, served: Served) -> None:
    visit = Visit(browser, served)
    page = visit.page
    assert page.evaluate("document.activeElement.id") == "question"
    page.fill("#question", "one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    visit.wait_for_the_end()
    assert visit.bodies[-1]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    assert page.locator(".assistant strong").inner_text() == "this"
    assert page.locator(".assistant pre code").inner_text() == "print('<b>no markup</b>')"
    assert page.locator(".assistant > .words > code").inner_text() == "code"
    assert page.locator("img, .words b").count() == 0
    assert "<img src=x onerror=alert(1)>" in visit.answers()[0]
    assert "<img" in page.locator("#status").inner_text()  # read out as a whole, once it is there
    assert page.locator("[aria-busy]").count() == 0
    visit.ask("And now?")
    visit.until("document.querySelectorAll('.assistant').length === 2")
    visit.wait_for_the_end()
    assert [message["role"] for message in visit.bodies[-1]["messages"]] == ["user", "assistant", "user"]
    assert visit.bodies[-1]["messages"][1]["content"] == ANSWER
    page.click(".again")
    visit.until("document.querySelector('[aria-busy]') === null")
    visit.wait_for_the_end()
    assert visit.bodies[-1] == visit.bodies[-2]
    assert len(visit.answers()) == 2
    page.click("#clear")
    assert visit.answers() == []
    assert page.locator("#empty").is_visible()
    visit.close(served)


def test_settings_go_with_the_request_and_stay(browser: Any, served: Served) -> None:
    visit = Visit(browser, served)
    values = {"system": "Be brief.", "temperature": "0.5", "top_p": "0.9", "max_tokens": "7", "seed": "3"}
    for name, value in values.items():
        visit.page.fill(f"#{name}", value)
    visit.ask("Hello")
    visit.wait_for_the_end()
    body = visit.bodies[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: body[name] for name in ("temperature", "top_p", "max_tokens", "seed")} == {
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 7,
        "seed": 3,
    }
    assert "cut at the most tokens" in visit.page.locator(".assistant .after").inner_text()
    visit.page.reload()
    assert visit.page.input_value("#system") == "Be brief."
    visit.close(served)


@pytest.mark.parametrize("way", mostly_slow(["button", "key"], "key"))
def test_an_answer_is_stopped(browser: Any, model: Model, way: str) -> None:
    scheduler = ScriptedScheduler([70] * 4000, seconds=0.01)
    with serving(model, scheduler=scheduler) as served:
        visit = Visit(browser, served)
        visit.ask("Count.")
        visit.until("document.querySelector('.assistant .words').textContent.length > 5")
        assert visit.page.locator("#send").is_hidden()
        if way == "button":
            visit.page.click("#stop")
        else:
            visit.page.keyboard.press("Escape")
        visit.wait_for_the_end()
        assert "stopped" in visit.page.locator(".assistant .after").inner_text()
        assert visit.page.locator("#send").is_visible()
        served.wait_until(lambda: served.statistic("running") == 0)
        visit.close(served)


@pytest.mark.slow
def test_a_key_is_asked_for_and_given(browser: Any, model: Model) -> None:
    with serving(model, key=KEY, scheduler=ScriptedScheduler([70] * 5)) as served:
        context = browser.new_context()
        page = context.new_page()
        page.goto(served.url)
        page.wait_for_selector("[role=alert]")
        assert "API key" in page.locator("[role=alert]").first.inner_text()
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.fill("#question", "Hello")
        page.keyboard.press("Enter")
        page.wait_for_selector(".assistant .again")
        assert page.evaluate("localStorage.getItem('edgerazor.key')") is None
        context.close()


@pytest.mark.parametrize(("width", "theme"), THEMES)
def test_it_fits_and_can_be_read(browser: Any, served: Served, width: int, theme: str) -> None:
    """Nothing is wider than the window, and texts stand out from what is behind them (WCAG 2: 4.5 to 1)."""
    visit = Visit(browser, served, viewport={"width": width, "height": 740}, color_scheme=theme)
    page = visit.page
    visit.ask("A rather long question that has to be broken into several lines on a telephone, I should think.")
    visit.wait_for_the_end()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    parts = "[...document.querySelectorAll('li, article, .words, .block')]"
    assert page.evaluate(f"{parts}.filter((part) => part.scrollWidth > part.clientWidth + 1).length") == 0
    if width == 360:
        assert page.locator("#settings").is_hidden()
        page.click("#toggle")
        assert page.get_attribute("#toggle", "aria-expanded") == "true"
        assert page.evaluate("document.activeElement.id") == "system"
    assert page.locator("#settings").is_visible()
    for selector in (".words", ".after", ".user .words", "#hint", "#send", "#settings small", "h1", ".block > div"):
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector
    visit.close(served)


#: The contrast of an element's text with the nearest background behind it.
CONTRAST = """(selector) => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let element = document.querySelector(selector);
  const front = light(getComputedStyle(element).color);
  while (/rgba\\(.*, 0\\)|transparent/.test(getComputedStyle(element).backgroundColor)) element = element.parentElement;
  const back = light(getComputedStyle(element).backgroundColor);
  return (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
}"""
