"""Markdown tables and the format of numbers in their cells."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Estimate(NamedTuple):
    """A number and its interval, if it has one."""

    value: float | None
    interval: Sequence[float] | None = None

    def __str__(self):
        return with_interval(*map(format_cell, (self.value, *(self.interval or ()))))


def with_interval(value: str, low: str | None = None, high: str | None = None) -> str:
    return value if low is None else f"{value} ({low} to {high})"


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Make a Markdown table; numeric columns are right-aligned."""
    rows = [list(row) for row in rows]
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"a row has {len(row)} cells, the table {len(headers)} columns: {row}")
    columns = [[row[i] for row in rows] for i in range(len(headers))]
    lines = [
        " | ".join(headers),
        "|".join("--:" if is_numeric(column) else "---" for column in columns),
        *(" | ".join(map(format_cell, row)) for row in rows),
    ]
    return "\n".join(f"| {line} |" if i != 1 else f"|{line}|" for i, line in enumerate(lines))


def is_numeric(column: Sequence[Any]) -> bool:
    """Tell whether a column has only numbers and empty cells."""
    cells = [cell for cell in column if cell is not None]
    return bool(cells) and all(type(cell) in (int, float, Estimate) for cell in cells)


def format_cell(cell: Any) -> str:
    """Format a cell: thousands separators, at least three digits, None as an empty cell."""
    if cell is None:
        return ""
    if type(cell) not in (int, float):
        return str(cell).replace("|", r"\|").replace("\n", " ")
    if not isinstance(cell, int) and abs(cell) >= 1e6:
        return f"{cell:.2e}"
    if isinstance(cell, int) or abs(cell) >= 1000:
        return f"{cell:,.0f}"
    return f"{cell:.2f}" if abs(cell) >= 10 else f"{cell:.3f}"


def percent(
    part: float | None, interval: Sequence[float] | None = None, form: str = ".1f"
) -> str | None:
    if part is None:
        return None
    return with_interval(*(f"{100 * each:{form}}%" for each in (part, *(interval or ()))))


def seed_range(changes: Sequence[float]) -> str | None:
    """Format the range of values; None for a single one."""
    if len(changes) < 2:
        return None
    return f"{percent(min(changes), form='+.1f')} to {percent(max(changes), form='+.1f')}"
