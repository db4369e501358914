"""For the API reference: an entry `a, b: text` of a docstring describes two names; griffe takes b for the type of a."""

import re
from typing import Any

import griffe  # pyright: ignore[reportMissingImports]

ENTRY = re.compile(r"^ +[a-z_]\w*(?:, \w+)+(?=:)", re.MULTILINE)  # errors, which begin with a capital, stay


class SeveralNames(griffe.Extension):
    """Joins the names of such an entry by spaces at which no line breaks, and adds an empty type: `a, b (): text`.

    Without one griffe would show the type of the entry before.
    """

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            joined = lambda names: names[0].replace(", ", ",\u00a0") + " ()"  # noqa: E731
            obj.docstring.value = ENTRY.sub(joined, obj.docstring.value)
