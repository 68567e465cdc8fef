"""Things with names: poise's own, and those that other packages declare as entry points of a group."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Any, Generic, TypeVar

from poise.util.errors import OptionError, PluginError, told
from poise.util.words import close_to

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to things: poise's own, then those of other packages.

    poise's own are given without a look at other packages, so no package can get in their way. Others are looked up
    when one that is not poise's own is asked for, when a user's choice is looked up (:meth:`ask`), or when all are
    listed; a package's code is imported only for its own names or a list of all. A list leaves out what is broken and
    warns once of each.

    Parameters
    ----------
    what : the word for one of them in messages.
    group : the entry point group in which other packages declare theirs.
    own : poise's own, by name.
    check : gives what to use for what an entry point names, from its name, its package and the loaded object; raises
        PluginError where it is not what it should be.
    """

    def __init__(self, what: str, group: str, own: Mapping[str, T], check: Callable[[str, str, Any], T]) -> None:
        self._what, self._group, self._own, self._check = what, group, dict(own), check
        self._others: dict[str, list[EntryPoint]] | None = None
        self._loaded: dict[str, T | PluginError] = {}
        self._said: set[str] = set()

    def ask(self, name: str) -> T:
        """What a user chose by its name.

        Raises
        ------
        OptionError : there is nothing of that name.
        PluginError : the package that offers it is broken.
        """
        self._scan()  # says which of poise's own names a package claims
        if name not in self:
            raise OptionError(f"unknown {self._what} {name!r}", hint=close_to(name, self))
        return self[name]

    def __getitem__(self, name: str) -> T:
        """What poise itself has, else another package; KeyError or PluginError."""
        if name in self._own:
            return self._own[name]
        points = self._scan()[name]
        if name not in self._loaded:
            try:
                self._loaded[name] = self._load(name, points)
            except PluginError as error:
                self._loaded[name] = error
        found = self._loaded[name]
        if isinstance(found, PluginError):
            raise PluginError(found.message, hint=found.hint)
        return found

    def __contains__(self, name: object) -> bool:
        """Whether the name is offered, by a broken package too."""
        return name in self._own or name in self._scan()

    def __iter__(self) -> Iterator[str]:
        """Names of poise's own, then of those of other packages that work."""
        yield from self._own
        for name in self._scan():
            if name not in self._own:
                try:
                    self[name]
                except PluginError as error:
                    self._say(error)
                else:
                    yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _scan(self) -> dict[str, list[EntryPoint]]:
        """Entry points of the group by name, read once; nothing is imported."""
        if self._others is None:
            self._others = {}
            for package, distribution in _declaring(self._group):
                try:
                    points = list(distribution.entry_points.select(group=self._group))
                except Exception as error:  # of a text that anybody wrote
                    self._say(PluginError(f"the entry points of package {package} cannot be read: {told(error)}",
                                          hint=f"reinstall {package}, or uninstall it"))  # fmt: skip
                    continue
                for point in points:
                    self._others.setdefault(point.name, []).append(point)
                    if point.name in self._own:
                        self._say(PluginError(
                            f"package {package} offers a {self._what} {point.name!r}, which is the name of one of "
                            "poise's own: that one is used",
                            hint=f"rename the entry point in group {self._group} of {package}",
                        ))  # fmt: skip
        return self._others

    def _load(self, name: str, points: list[EntryPoint]) -> T:
        package = _package(points[0])
        if len(points) > 1:
            names = " and ".join(sorted({_package(point) for point in points}))
            raise PluginError(
                f"{self._what} {name!r} is offered {len(points)} times, by {names}",
                hint="uninstall all but one, or rename an entry point",
            )
        try:
            found = points[0].load()
        except (Exception, SystemExit) as error:  # whatever a stranger's module does
            raise PluginError(
                f"{self._what} {name!r} of package {package} cannot be imported from {points[0].value!r}: "
                f"{told(error)}",
                hint=f"mend or uninstall {package}",
            ) from error
        return self._check(name, package, found)

    def _say(self, problem: PluginError) -> None:
        if problem.message not in self._said:
            self._said.add(problem.message)
            warnings.warn(f"{problem.message} (hint: {problem.hint})", stacklevel=2)


def _declaring(group: str) -> Iterator[tuple[str, Distribution]]:
    """Names and metadata of packages that mention the group, the first on the path of each name."""
    seen = set()
    for distribution in distributions():
        try:
            package = distribution.name if group in (distribution.read_text("entry_points.txt") or "") else None
        except Exception:  # a package without a readable name or text offers nothing
            continue
        key = re.sub(r"[-_.]+", "-", package or "").lower()
        if package and key not in seen:
            seen.add(key)
            yield package, distribution


def _package(point: EntryPoint) -> str:
    return (point.dist and point.dist.name) or point.module
