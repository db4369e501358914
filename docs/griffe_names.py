"""For the API reference: an entry `a, b: text` of a docstring describes two names; griffe takes b for the type of a."""

import re
from typing import Any

import griffe  # pyright: ignore[reportMissingImports]

ENTRY = re.compile(r"^ +\w+(?:, \w+)+(?=:)", re.MULTILINE)


class SeveralNames(griffe.Extension):
    """Joins the names of such an entry by spaces at which no line breaks: griffe looks for a type after a plain one."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ENTRY.sub(lambda names: names[0].replace(", ", ",\u00a0"), obj.docstring.value)
