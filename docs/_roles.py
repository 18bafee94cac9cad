"""Turns the cross-references of docstrings (``:class:`Edit` ``) into links of the site; mkdocs.yml names this file."""

from __future__ import annotations

import re
from typing import Any

from griffe import Docstring, Extension, Module, NameResolutionError, Object

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod|obj):`~?([\w.]+)`")


class Roles(Extension):
    """Replaces each role by a link, or by plain code where the site has no such object."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Rewrite the docstrings of a whole package, in which every name can be looked up."""
        pending: list[Object] = [pkg]
        while pending:
            current = pending.pop()
            if current.docstring is not None:
                _link_roles(current, current.docstring)
            pending.extend(member for member in current.members.values() if isinstance(member, Object))


def _link_roles(owner: Object, docstring: Docstring) -> None:
    def make_link(match: re.Match[str]) -> str:
        try:
            target = owner.resolve(match[1])
        except NameResolutionError:
            return f"`{match[1]}`"
        # "optional": an object without a page stays plain code instead of a warning
        return f'<autoref identifier="{target}" optional><code>{match[1]}</code></autoref>'

    docstring.value = _ROLE.sub(make_link, docstring.value)
