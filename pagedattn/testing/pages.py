"""An HTML page as a tree, read strictly by the standard library's parser."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"meta", "link", "input", "br", "hr", "img"}


@dataclass
class Element:
    """A tag with its attributes and what is inside of it, texts and elements, in order."""

    tag: str
    attributes: dict[str, str | None]
    inside: list[str | Element] = field(default_factory=list)

    def all(self, *tags: str, **attributes: str) -> list[Element]:
        """Return the elements inside, in order, that have one of the tags and all attributes.

        An underscore in an attribute's name stands for a hyphen, the last one for nothing.
        """
        wanted = {name.rstrip("_").replace("_", "-"): x for name, x in attributes.items()}.items()
        found = []
        for one in self.inside:
            if isinstance(one, str):
                continue
            if (not tags or one.tag in tags) and wanted <= one.attributes.items():
                found.append(one)
            found += one.all(*tags, **attributes)
        return found

    def one(self, *tags: str, **attributes: str) -> Element:
        """Return the only such element; raise ValueError if there is none, or another."""
        (found,) = self.all(*tags, **attributes)
        return found

    @property
    def text(self) -> str:
        """All text inside."""
        return "".join(one if isinstance(one, str) else one.text for one in self.inside)


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("page", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if len(dict(attrs)) < len(attrs):
            raise ValueError(f"<{tag}> has an attribute twice: {attrs}")
        element = Element(tag, dict(attrs))
        self.open[-1].inside.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].inside.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self.open[-1].tag != tag:
            raise ValueError(f"</{tag}> stands where <{self.open[-1].tag}> must end")
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].inside.append(data)

    def handle_comment(self, data: str) -> None:
        raise ValueError(f"a comment, where none is expected: {data!r}")


def parse_page(text: str) -> Element:
    """Return the page's tree.

    Raises ValueError if a tag is not closed, or not in order, if an attribute stands twice, if
    there is a comment, or no doctype.
    """
    parser = _Parser()
    parser.feed(text)
    parser.close()
    if len(parser.open) > 1:
        raise ValueError(f"<{parser.open[-1].tag}> is not closed")
    if not text.lstrip().startswith("<!DOCTYPE html>"):
        raise ValueError("the page has no doctype")
    return parser.open[0]


def table_lines(page: Element, identity: str) -> list[list[str]]:
    """Return all lines of a report's table, those too that only its script has."""
    table = page.one(id=identity)
    sources = table.all("script", class_="lines")
    if sources:
        lines: list[list[str]] = json.loads(sources[0].text)["lines"]
        return lines
    return [[cell.text for cell in line.all("th", "td")] for line in table.one("tbody").all("tr")]


def table_columns(page: Element, identity: str, *names: str) -> list[tuple[str, ...]]:
    """Return some columns of a report's table, by their headings, for each line."""
    heads = [head.text for head in page.one(id=identity).one("thead").all("th")]
    places = [heads.index(name) for name in names]
    return [tuple(line[place] for place in places) for line in table_lines(page, identity)]
