"""Text files that are read line by line."""


def lines_of(text: str) -> list[str]:
    """The lines of a text, which end with a line feed, or with a carriage return and a line feed.

    `str.splitlines` also cuts at characters that stand inside of prompts and JSON strings: form feeds, vertical tabs,
    U+0085, U+2028 and others.
    """
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []
