"""What the room calls its media, and which files they are."""

from vqtok.sources.medium import Medium

TEXTS = Medium(
    "text", "texts", frozenset((".txt", ".md", ".rst", ".text")), ".txt, .md and .rst", "Value", "text_column",
    "python-prose",
)  # fmt: skip
