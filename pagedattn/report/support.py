"""What each implementation supports, as the run itself found, as tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pagedattn.report.tables import Table
from pagedattn.report.text import MISSING, clean, cut
from pagedattn.report.values import ResultsError, expect_object

if TYPE_CHECKING:
    from pagedattn.report.results import Run

STATUSES = {
    "passed": "yes",
    "wrong": "wrong",
    "unsupported": "no",
    "raised": "raises",
    "untried": "not tried",
}
SUPPORT_ABOUT = (
    "Found in this run, each on small random batches against float64. «yes*» has limits, which the "
    "second table says; «no» is what an implementation refuses itself; «wrong» is an error above "
    "the budget; «not tried» is what the machine cannot run. Of sizes, those that are right are "
    "named."
)
_SIZES = ("head size", "block size")
_LONGEST = 200


@dataclass(frozen=True, slots=True)
class Support:
    """What became of one feature of one implementation: `pagedattn.testing.Finding`, checked.

    `status` is one of `STATUSES`; `detail` says why, or what a feature that passed is limited to.
    """

    implementation: str
    feature: str
    status: str
    detail: str
    device: str


def parse_support(entries: Any, device: str) -> tuple[Support, ...]:
    """Read a results file's `support`; raise ResultsError if it is broken.

    `device` is where the run was made. Of an implementation's feature the last entry holds.
    """
    if not isinstance(entries, list):
        raise ResultsError("support must be a list.")
    found: dict[tuple[str, str], Support] = {}
    for entry in entries:
        given = expect_object(entry, "each of support")
        texts = {key: given.get(key) for key in ("implementation", "feature", "status", "detail")}
        for key, text in texts.items():
            if not isinstance(text, str):
                raise ResultsError(f"each of support must have a text {key}.")
        if texts["status"] not in STATUSES:
            known = ", ".join(STATUSES)
            raise ResultsError(f"support's status must be one of {known}, not {texts['status']!r}.")
        one = Support(**{key: clean(str(text)) for key, text in texts.items()}, device=device)
        found[one.implementation, one.feature] = one
    return tuple(found.values())


def support_tables(run: Run) -> list[Table]:
    """Make a table of features by implementation, and one of the reasons behind it.

    Sizes are one column of those that are right. A run that probed nothing has no table.
    """
    found = {(one.implementation, one.feature): one for file in run.files for one in file.support}
    if not found:
        return []
    names = list(dict.fromkeys(name for name, _ in found))
    features = list(dict.fromkeys(feature for _, feature in found))
    plain = [feature for feature in features if not feature.startswith(_SIZES)]
    sizes = {
        f"{what}s": [feature for feature in features if feature.startswith(what)] for what in _SIZES
    }
    sizes = {title: parts for title, parts in sizes.items() if parts}
    lines = [
        [
            name,
            *(_cell(found.get((name, feature))) for feature in plain),
            *(_sizes([found.get((name, part)) for part in parts]) for parts in sizes.values()),
        ]
        for name in names
    ]
    header = ["implementation", *plain, *sizes]
    reasons = _reasons(list(found.values()))
    tables = [Table("What each implementation supports", header, lines, len(header))]
    if reasons:
        head = ["implementation", "features", "found", "detail"]
        tables.append(Table("Why not, and with what limits", head, reasons, len(head)))
    return tables


def _cell(one: Support | None) -> str:
    if one is None:
        return MISSING
    return STATUSES[one.status] + ("*" if one.status == "passed" and one.detail else "")


def _sizes(parts: list[Support | None]) -> str:
    right = [one.feature.rpartition(" ")[2] for one in parts if one and one.status == "passed"]
    return ", ".join(right) or "none"


def _reasons(found: list[Support]) -> list[list[str]]:
    """One line for each detail of an implementation, with all features that it is said of."""
    features: dict[tuple[str, str, str], list[str]] = {}
    for one in found:
        if one.detail:
            key = (one.implementation, STATUSES[one.status], one.detail)
            features.setdefault(key, []).append(one.feature)
    return [
        [name, ", ".join(about), status, cut(detail, _LONGEST)]
        for (name, status, detail), about in features.items()
    ]
