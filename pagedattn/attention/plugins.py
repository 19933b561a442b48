"""Implementations of attention that installed packages offer as entry points.

A package names each of its implementations in its `pyproject.toml`:

    [project.entry-points."pagedattn.attention"]
    my_kernel = "my_package.attention:MyImplementation"

The object is a class that is called without arguments, or an implementation already made; its
`name` is that of the entry point. A package is imported when one of its implementations is used,
so one that is broken disturbs nobody who does not ask for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from pagedattn.attention.registry import Implementation

GROUP = "pagedattn.attention"
METHODS = ("unsupported", "attention", "write_kv")


@dataclass(frozen=True)
class Plugin:
    """An implementation that a package offers.

    Attributes:
        name: of the implementation.
        packages: the distributions that offer one of this name; more than one is a clash.
        entry: the entry point of the first of them.

    """

    name: str
    packages: tuple[str, ...]
    entry: EntryPoint

    @property
    def clash(self) -> str | None:
        """One sentence about packages that offer the same name, or None."""
        if len(self.packages) < 2:
            return None
        return (
            f"the packages {' and '.join(self.packages)} both offer an implementation "
            f"{self.name!r}, so neither can be used: uninstall all but one"
        )

    def load(self) -> Implementation:
        """Import the package and make the implementation.

        Raises:
            ImportError: the package cannot be imported, its entry point is no implementation, or
                several packages offer this name; one sentence that names them.

        """
        if self.clash is not None:
            raise ImportError(self.clash)
        (package,) = self.packages
        try:
            found = self.entry.load()
            made = found() if isinstance(found, type) else found
        except Exception as error:  # whatever a stranger's code raises is said of it
            raise ImportError(
                f"implementation {self.name!r} of the package {package} cannot be loaded from "
                f"{self.entry.value!r}: {type(error).__name__}: {error}"
            ) from error
        missing = [method for method in METHODS if not callable(getattr(made, method, None))]
        if missing:
            raise ImportError(
                f"implementation {self.name!r} of the package {package}, {self.entry.value!r}, "
                f"has no method {' and no '.join(missing)}"
            )
        if getattr(made, "name", None) != self.name:
            raise ImportError(
                f"implementation {self.name!r} of the package {package} says that its name is "
                f"{getattr(made, 'name', None)!r}; its entry point must have the same name"
            )
        return cast("Implementation", made)


@cache
def plugins() -> dict[str, Plugin]:
    """What installed packages offer, by name; nothing is imported.

    Packages are looked for once in a process.
    """
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        found.setdefault(entry.name, []).append(entry)
    return {
        name: Plugin(name, tuple(sorted(map(_package, entries))), entries[0])
        for name, entries in sorted(found.items())
    }


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.module.partition(".")[0]
