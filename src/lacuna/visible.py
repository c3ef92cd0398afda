"""Text of others, made fit for a terminal and for a message."""

import re

OBEYED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
"""Control characters (C0 and C1, but no line break and no tab), marks of direction, what cannot be encoded."""


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode()


def visible(text: str) -> str:
    """What a terminal would obey, such as ESC, spelled out. Lines and tabs stay, and what joins an emoji."""
    return OBEYED.sub(lambda found: _spelled(found[0]), text)


def visible_json(line: str) -> str:
    """As visible, of a line of JSON, which still says the same."""
    return OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def escaped(text: str) -> str:
    """As visible, for one line in which also spaces shall be told from each other: whatever is not printable."""
    return "".join(c if c.isprintable() else _spelled(c) for c in text)


def without_passwords(text: str) -> str:
    """Of the URLs in it: what stands between :// and the last @ of the word."""
    return re.sub(r"://\S*@", "://…@", text)


def shown_url(url: str) -> str:
    """A URL, also one that lacks its http://, without its name and password."""
    scheme, mark, place = url.rpartition("://")
    return f"{scheme}{mark}…@{place.rpartition('@')[2]}" if "@" in place else url
