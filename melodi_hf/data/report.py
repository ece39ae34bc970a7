"""Report of records that were skipped or renamed: counts and first places.

Damaged records do not stop reading, since large corpora always have some. They are reported, since
a result on half of the documents must say so.
"""

import warnings
from collections.abc import Mapping
from typing import Any

REPEATED = "repeated"  # same id and text as an earlier document
RENAMED = "renamed"  # same id as another text; kept under a new id
MAX_PLACES = 3  # places recorded per kind


class Report:
    """Counts and first places of each kind of problem."""

    def __init__(self, kinds: Mapping[str, Mapping[str, Any]] | None = None):
        """Create an empty report, or restore one from `as_dict`."""
        kinds = kinds or {}
        self.counts: dict[str, int] = {kind: found["count"] for kind, found in kinds.items()}
        self.places: dict[str, list[str]] = {
            kind: list(found["first"]) for kind, found in kinds.items()
        }

    def count(self, kind: str, place: str) -> None:
        """Count a problem, such as "empty", at a place such as "books.jsonl, line 4"."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        places = self.places.setdefault(kind, [])
        if len(places) < MAX_PLACES:
            places.append(place)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return kind -> count and first places, for JSON."""
        return {
            kind: {"count": count, "first": list(self.places[kind])}
            for kind, count in self.counts.items()
        }

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """Format: "2 left out: 1 empty (a.jsonl, line 4), 1 not JSON (..., line 9)"."""
        left_out = [kind for kind in self.counts if kind != RENAMED]
        parts = []
        if left_out:
            total = sum(self.counts[kind] for kind in left_out)
            parts.append(f"{total:,} left out: {', '.join(map(self.describe, left_out))}")
        if RENAMED in self.counts:
            parts.append(self.describe(RENAMED))
        return "; ".join(parts) or "nothing left out"

    def describe(self, kind: str) -> str:
        """Format one kind."""
        count, places = self.counts[kind], self.places[kind]
        more = "; ..." if count > len(places) else ""
        return f"{count:,} {kind} ({'; '.join(places)}{more})"

    def warn(self) -> None:
        """Issue a warning if the report is not empty."""
        if self:
            warnings.warn(str(self), stacklevel=3)
