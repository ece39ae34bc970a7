"""What a source holds that is no document, or not as it stands: how much, and where first.

Nothing of this stops a reader, since one line among millions always is damaged; and nothing of it
passes unseen, since a number that is measured on half of the documents should say so.
"""

import warnings
from collections.abc import Mapping
from typing import Any

REPEATED = "repeated"  # the id and the text of a document that was there before
RENAMED = "renamed"  # the id of another text; kept, under an id of its own
PLACES = 3  # told of each kind


class Report:
    """How often each kind of trouble was met, and the first places of it."""

    def __init__(self, kinds: Mapping[str, Mapping[str, Any]] | None = None):
        """Begin with nothing, or with what `as_dict` of another report gave."""
        kinds = kinds or {}
        self.counts: dict[str, int] = {kind: found["count"] for kind, found in kinds.items()}
        self.places: dict[str, list[str]] = {
            kind: list(found["first"]) for kind, found in kinds.items()
        }

    def count(self, kind: str, place: str) -> None:
        """Note one more of a kind, such as "empty", at a place such as "books.jsonl, line 4"."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        places = self.places.setdefault(kind, [])
        if len(places) < PLACES:
            places.append(place)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Everything, for JSON: kind -> count and first places."""
        return {
            kind: {"count": count, "first": list(self.places[kind])}
            for kind, count in self.counts.items()
        }

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """In words, such as "2 left out: 1 empty (a.jsonl, line 4), 1 not JSON (..., line 9)"."""
        left_out = [kind for kind in self.counts if kind != RENAMED]
        parts = []
        if left_out:
            total = sum(self.counts[kind] for kind in left_out)
            parts.append(f"{total:,} left out: {', '.join(map(self.described, left_out))}")
        if RENAMED in self.counts:
            parts.append(self.described(RENAMED))
        return "; ".join(parts) or "nothing left out"

    def described(self, kind: str) -> str:
        """One kind in words."""
        count, places = self.counts[kind], self.places[kind]
        more = "; ..." if count > len(places) else ""
        return f"{count:,} {kind} ({'; '.join(places)}{more})"

    def warn(self) -> None:
        """Tell a caller who asked for no report."""
        if self:
            warnings.warn(str(self), stacklevel=3)
