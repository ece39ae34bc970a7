"""Probes that lie in files: one JSON object per line, with a field `task`.

    passkey, needle, repeat   `book` (the id of a document), the characters `start`, `insert_at` and
                              `end` in it, what is `inserted` (or, for the control, `control`), the
                              `question`, its `answer` and perhaps `choices`
    mqar                      `ids`, `query_positions` and their `targets`; pairs of key and value
                              come first
    copy                      `symbols` and the `gap`, blanks that follow them

The `distance` of a record is what its file says, which may be in tokens of another tokenizer. That
of a query of mqar is the tokens between the value and the query, rounded down to a power of two.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from melodi_hf.data.rows import find_files, reader_of
from melodi_hf.data.segments import IGNORED
from melodi_hf.evaluation.probes import (
    BLANK,
    MARK,
    Example,
    Material,
    Reading,
    aligned,
    asking,
    continuation,
    encode,
    join,
    silent,
)

OF_BOOKS = ("passkey", "needle", "repeat")
MAKES_DISTANCE = ("distance", "gap", "length")  # the field of a record that says how far it reaches
FIELDS = {  # of a record of each task
    **dict.fromkeys(
        OF_BOOKS, ("book", "start", "insert_at", "end", "inserted", "control", "question", "answer")
    ),
    "mqar": ("ids", "query_positions", "targets", "pairs"),
    "copy": ("symbols", "gap"),
}


class Record(NamedTuple):
    """One line of a file, and where it stands, in words."""

    place: str
    fields: dict[str, Any]


def read_examples(
    files: Sequence[str | Path],
    material: Material,
    books: Mapping[str, str],
    *,
    distances: Sequence[int] | None = None,
    limit: int | None = None,
) -> dict[str, list[Example]]:
    """The examples of each task in the files.

    books: texts by their id, for the tasks that are made of them.
    distances: only records that say one of these; limit: only so many of each distance.

    Raises ValueError for records of other kinds, books that are missing and files without records
    of the distances.
    """
    groups: dict[tuple[str, int], list[Record]] = {}
    for row in records(files):
        group = groups.setdefault(kind_of(row), [])
        if limit is None or len(group) < limit:
            group.append(row)
    chosen = {key: rows for key, rows in groups.items() if not distances or key[1] in distances}
    if not chosen:
        there = sorted({distance for _, distance in groups})
        raise ValueError(f"none of the distances {distances} is in the files, which have {there}")
    found: dict[str, list[Example]] = {}
    for (task, _), rows in chosen.items():
        if task in OF_BOOKS:
            examples = examples_of_books(rows, material, books)
        else:
            examples = [{"mqar": recall_of, "copy": copy_of}[task](row.fields) for row in rows]
        found.setdefault(task, []).extend(examples)
    return found


def records(files: Sequence[str | Path]) -> Iterator[Record]:
    """All records of the files; one that cannot be read is refused: probes are made, not found."""
    for path, name in find_files(files):
        for row in reader_of(path)(path, name, 0):
            if row.fields is None:
                raise ValueError(f"{row.place} is {row.trouble}: make the file anew")
            yield Record(row.place, row.fields)


def kind_of(row: Record) -> tuple[str, int]:
    """The task of a record and its distance."""
    task = row.fields.get("task")
    distance = [row.fields[name] for name in MAKES_DISTANCE if name in row.fields]
    known = tuple(FIELDS)
    if task not in known or not distance:
        raise ValueError(
            f"{row.place} is no probe: its task is {task!r}, which should be one of {known}, and "
            f"its fields are {sorted(row.fields)}, of which one should be of {MAKES_DISTANCE}"
        )
    missing = [name for name in FIELDS[task] if name not in row.fields]
    if missing:
        raise ValueError(
            f"{row.place} lacks {', '.join(missing)}: a record of {task} has the fields "
            f"{', '.join(FIELDS[task])}"
        )
    try:
        return task, int(distance[0])
    except (TypeError, ValueError):
        raise ValueError(
            f"{row.place} has the distance {distance[0]!r}: it must be a whole number"
        ) from None


def examples_of_books(
    rows: Iterable[Record], material: Material, books: Mapping[str, str]
) -> list[Example]:
    """Examples of one distance, which is told anew: the mean of their distances in tokens."""
    made = [example_of_book(row, material, books) for row in rows]
    distance = round(float(np.mean([tokens for _, tokens in made])))
    return [relabelled(example, distance) for example, _ in made]


def example_of_book(
    row: Record, material: Material, books: Mapping[str, str]
) -> tuple[Example, int]:
    """An example, and the tokens between its fact and its question."""
    fields = row.fields
    if fields["book"] not in books:
        raise ValueError(
            f"{row.place} is about the book {fields['book']!r}, which is none of the "
            f"{len(books)} given: name the file that holds it as --books"
        )
    book, question = books[fields["book"]], fields["question"]
    before = book[fields["start"] : fields["insert_at"]]
    gap = book[fields["insert_at"] : fields["end"]].strip()
    prompts = [" ".join((before, fields[fact], gap, question)) for fact in ("inserted", "control")]
    *encoded, gap_ids = encode(material, [*prompts, gap])
    text, control = aligned([np.array(ids) for ids in encoded], material)
    choices = fields.get("choices")
    if choices is None:
        answer = continuation(material, question, fields["answer"])
        return Example(asking(text, answer, 0), asking(control, answer, 0)), len(gap_ids)
    answers = [continuation(material, question, choice) for choice in choices]
    return Example(
        silent(text[:-1]),
        silent(control[:-1]),
        tuple(asking(text[-1:], answer, 0) for answer in answers),
        choices.index(fields["answer"]),
    ), len(gap_ids)


def relabelled(example: Example, distance: int) -> Example:
    """The same example, its distance told otherwise."""

    def told(text: Reading) -> Reading:
        return text._replace(distances=np.full(len(text.ids), distance))

    choices = tuple(map(told, example.choices))
    return Example(told(example.text), told(example.control), choices, example.answer)


def recall_of(fields: Mapping[str, Any]) -> Example:
    """The control's pairs have each other's values."""
    ids, queries = np.array(fields["ids"]), np.array(fields["query_positions"])
    places = {key: place for place, key in enumerate(ids[: 2 * fields["pairs"] : 2])}
    values_at = np.array([2 * places[key] + 1 for key in ids[queries]])
    targets, distances = np.full(len(ids), IGNORED), np.zeros(len(ids), dtype=np.int64)
    targets[queries] = fields["targets"]
    distances[queries] = 2 ** np.log2(queries - values_at).astype(int)
    others, values = ids.copy(), slice(1, 2 * fields["pairs"], 2)
    others[values] = np.roll(ids[values], 1)
    return Example(Reading(ids, targets, distances), Reading(others, targets, distances))


def copy_of(fields: Mapping[str, Any]) -> Example:
    """The control shows the symbols in reverse order."""
    symbols, blanks = np.array(fields["symbols"]), np.full(fields["gap"], BLANK)
    text, control = (
        asking(join(shown, blanks, [MARK]), symbols, fields["gap"])
        for shown in (symbols, symbols[::-1])
    )
    return Example(text, control)
