"""Docstrings as this project writes them, for the site: what stands after a parameter's colon describes it.

numpy's style has a type there; here the type stands in the signature alone, and sections list errors in the same way.
"""

from __future__ import annotations

from typing import Any

import griffe


class Described(griffe.Extension):
    """The words after the colon into the description, the signature's type in their place."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Of every object that the site's tool reads."""
        if obj.docstring is None:
            return
        types = _types(obj)
        for section in obj.docstring.parsed:
            if section.kind in (griffe.DocstringSectionKind.parameters, griffe.DocstringSectionKind.attributes):
                for item in section.value:
                    item.description = _sentence(item.annotation, item.description)
                    item.annotation = types.get(item.name.split(",")[0].lstrip("*"))
            elif section.kind is griffe.DocstringSectionKind.raises:
                for item in section.value:
                    name, colon, words = str(item.annotation).partition(":")
                    if colon:
                        item.annotation, item.description = name.strip(), _sentence(words, item.description)


def _types(obj: griffe.Object) -> dict[str, Any]:
    """Annotation of every parameter of a function, or of every field of a class."""
    if isinstance(obj, griffe.Class):
        own = {name: member.annotation for name, member in obj.attributes.items()}
        init = obj.members.get("__init__")
        return {**own, **_types(init)} if isinstance(init, griffe.Function) else own
    if isinstance(obj, griffe.Function):
        return {one.name.lstrip("*"): one.annotation for one in obj.parameters}
    return {}


def _sentence(words: Any, more: str) -> str:
    """What stood on the line of the name, and below it, as one text."""
    return " ".join(part for part in (str(words or "").strip(), more.strip()) if part)
