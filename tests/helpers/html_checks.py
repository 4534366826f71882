"""What a browser would silently mend in a page, found without one."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input", "source", "wbr", "area", "base", "col", "embed", "track"}
#: Elements that end a paragraph when they begin in one.
BLOCKS = {"p", "div", "ul", "ol", "li", "table", "figure", "section", "header", "main", "nav", "h1", "h2", "h3", "h4"}
#: Element -> those that it may be in.
PARENTS = {
    "li": {"ul", "ol"},
    "tr": {"thead", "tbody"},
    "td": {"tr"},
    "th": {"tr"},
    "thead": {"table"},
    "tbody": {"table"},
    "figcaption": {"figure"},
    "desc": {"svg"},
}
#: Attributes that would fetch something.
FETCHING = {"src", "srcset", "href", "xlink:href", "data", "poster", "action", "background"}


class Checker(HTMLParser):
    """Collects what is wrong with a page in `problems`."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.problems: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attributes)
        if len(values) < len(attributes):
            self.problems.append(f"{tag} has an attribute twice")
        if tag in BLOCKS and "p" in self.open:
            self.problems.append(f"{tag} in a paragraph")
        if tag in PARENTS and (not self.open or self.open[-1] not in PARENTS[tag]):
            self.problems.append(f"{tag} in {self.open[-1:]}")
        for name, value in attributes:
            if name.startswith("on"):
                self.problems.append(f"{tag} has {name}")
            if name in FETCHING and not (value or "").startswith(("#", "data:,")):
                self.problems.append(f"{tag} fetches {value}")
        self.ids += [str(values["id"])] if "id" in values else []
        self.references += (values.get("aria-labelledby") or "").split()
        self.references += [str(values["href"])[1:]] if str(values.get("href", "")).startswith("#") else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.problems.append(f"</{tag}> in {self.open[-3:]}")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def check(page: str) -> Checker:
    """A page parsed; asserts that it is balanced, refers to what there is, and asks for nothing."""
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert checker.problems == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert set(checker.references) <= set(checker.ids)
    assert not {"script", "iframe", "object", "embed", "form", "base"} & set(checker.tags)
    assert page.lstrip().startswith("<!DOCTYPE html>")
    style = page.split("<style>")[1].split("</style>")[0]
    assert not re.search(r"url\(|@import", style)
    return checker
