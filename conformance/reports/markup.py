"""HTML and SVG by function calls: text is escaped, only what :func:`tag` made is not."""

from __future__ import annotations

from html import escape

from translution.conformance.reports.summary import clean

_EMPTY = frozenset({"meta", "link", "input", "br", "hr"})


class Html(str):
    """Markup, not to be escaped again."""

    __slots__ = ()


def tag(name: str, *inside: str, **attributes: str | bool | None) -> Html:
    """An element. An underscore at the end of an attribute's name is dropped, others become hyphens.

    An attribute that is True stands alone, one that is None or False is left out.
    """
    shown = ""
    for key, value in attributes.items():
        if value is True:
            shown += f" {_name(key)}"
        elif value is not None and value is not False:
            shown += f' {_name(key)}="{escape(clean(value))}"'
    if name in _EMPTY:
        return Html(f"<{name}{shown}>")
    return Html(f"<{name}{shown}>{join(*inside)}</{name}>")


def join(*parts: str) -> Html:
    """The parts one after the other, text escaped."""
    return Html("".join(part if isinstance(part, Html) else escape(clean(part)) for part in parts))


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")
