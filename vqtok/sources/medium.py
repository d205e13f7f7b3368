"""What tells one kind of media from another where files and tables are concerned."""

from typing import NamedTuple


class Medium(NamedTuple):
    """Files of one kind, and the words by which messages speak of them.

    Args:
        one, many: "picture", "pictures".
        suffixes: of its files, lower case.
        examples: a few suffixes for messages.
        feature: the class of its columns in `datasets`.
        column_option: the argument that names a column of them.
        embedded: the name of the data set that vqtok brings.
    """

    one: str
    many: str
    suffixes: frozenset[str]
    examples: str
    feature: str
    column_option: str
    embedded: str
