"""Text from elsewhere in Markdown. It knows no cards."""

import re


def as_text(value: object) -> str:
    """A value as plain text in Markdown: one line, no markup, no HTML."""
    line = re.sub(r"([\\`*\[\]|<>&~#])", r"\\\1", " ".join(str(value).split()))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)  # inside a word it is no markup


def linked(paper: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)
