"""Read probes from files with one JSON object per line and a field `task`.

    passkey, needle, repeat   `book` (the id of a document), the characters `start`, `insert_at` and
                              `end`, the text `inserted` (for the control: `control`), the
                              `question`, its `answer` and optional `choices`
    mqar                      `ids`, `query_positions` and their `targets`; pairs of key and value
                              come first
    copy                      `symbols` and the `gap`, the number of blanks after them

The `distance` of a record is taken from the file and may be in tokens of another tokenizer. For
mqar it is the number of tokens between value and query, rounded down to a power of two.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from melodi_hf.data.rows import choose_reader, find_files
from melodi_hf.data.segments import IGNORED
from melodi_hf.evaluation.probes import (
    BLANK,
    MARK,
    Example,
    Material,
    ProbeText,
    align_lengths,
    ask_for,
    concatenate,
    encode,
    encode_continuation,
    without_targets,
)

BOOK_TASKS = ("passkey", "needle", "repeat")
DISTANCE_FIELDS = (
    "distance",
    "gap",
    "length",
)  # fields with the distance of a record
FIELDS = {  # of a record of each task
    **dict.fromkeys(
        BOOK_TASKS,
        ("book", "start", "insert_at", "end", "inserted", "control", "question", "answer"),
    ),
    "mqar": ("ids", "query_positions", "targets", "pairs"),
    "copy": ("symbols", "gap"),
}


class Record(NamedTuple):
    """One line of a file and its place, for messages."""

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
    """Read the examples of each task in the files.

    books: texts by id, for tasks that need them.
    distances: only records with these distances; limit: the maximum per distance.

    Raises ValueError for invalid records, missing books and distances without records.
    """
    groups: dict[tuple[str, int], list[Record]] = {}
    for row in read_records(files):
        group = groups.setdefault(task_and_distance(row), [])
        if limit is None or len(group) < limit:
            group.append(row)
    chosen = {key: rows for key, rows in groups.items() if not distances or key[1] in distances}
    if not chosen:
        there = sorted({distance for _, distance in groups})
        raise ValueError(f"no record has one of the distances {distances}: the files have {there}")
    found: dict[str, list[Example]] = {}
    for (task, _), rows in chosen.items():
        if task in BOOK_TASKS:
            examples = make_book_examples(rows, material, books)
        else:
            examples = [
                {"mqar": make_recall_example, "copy": make_copy_example}[task](row.fields)
                for row in rows
            ]
        found.setdefault(task, []).extend(examples)
    return found


def read_records(files: Sequence[str | Path]) -> Iterator[Record]:
    """Read all records of the files; raise for invalid lines."""
    for path, name in find_files(files):
        for row in choose_reader(path)(path, name, 0):
            if row.fields is None:
                raise ValueError(f"{row.place} is {row.problem}: create the file again")
            yield Record(row.place, row.fields)


def task_and_distance(row: Record) -> tuple[str, int]:
    """Return the task of a record and its distance."""
    task = row.fields.get("task")
    distance = [row.fields[name] for name in DISTANCE_FIELDS if name in row.fields]
    known = tuple(FIELDS)
    if task not in known or not distance:
        raise ValueError(
            f"{row.place} is not a probe: its task is {task!r}, allowed are {known}; its fields "
            f"are {sorted(row.fields)}, of which one must be in {DISTANCE_FIELDS}"
        )
    missing = [name for name in FIELDS[task] if name not in row.fields]
    if missing:
        raise ValueError(
            f"{row.place} lacks {', '.join(missing)}: a record of {task} needs the fields "
            f"{', '.join(FIELDS[task])}"
        )
    try:
        return task, int(distance[0])
    except (TypeError, ValueError):
        raise ValueError(
            f"{row.place} has the distance {distance[0]!r}: it must be an integer"
        ) from None


def make_book_examples(
    rows: Iterable[Record], material: Material, books: Mapping[str, str]
) -> list[Example]:
    """Make examples of one distance, set to the mean of their distances in tokens."""
    made = [make_book_example(row, material, books) for row in rows]
    distance = round(float(np.mean([tokens for _, tokens in made])))
    return [with_distance(example, distance) for example, _ in made]


def make_book_example(
    row: Record, material: Material, books: Mapping[str, str]
) -> tuple[Example, int]:
    """Make an example; return it and the tokens between its fact and its question."""
    fields = row.fields
    if fields["book"] not in books:
        raise ValueError(
            f"{row.place} needs the book {fields['book']!r}, which is not among the {len(books)} "
            f"books: pass its file by --books"
        )
    book, question = books[fields["book"]], fields["question"]
    before = book[fields["start"] : fields["insert_at"]]
    gap = book[fields["insert_at"] : fields["end"]].strip()
    prompts = [" ".join((before, fields[fact], gap, question)) for fact in ("inserted", "control")]
    *encoded, gap_ids = encode(material, [*prompts, gap])
    text, control = align_lengths([np.array(ids) for ids in encoded], material)
    choices = fields.get("choices")
    if choices is None:
        answer = encode_continuation(material, question, fields["answer"])
        return Example(ask_for(text, answer, 0), ask_for(control, answer, 0)), len(gap_ids)
    answers = [encode_continuation(material, question, choice) for choice in choices]
    return Example(
        without_targets(text[:-1]),
        without_targets(control[:-1]),
        tuple(ask_for(text[-1:], answer, 0) for answer in answers),
        choices.index(fields["answer"]),
    ), len(gap_ids)


def with_distance(example: Example, distance: int) -> Example:
    """Return the example with another distance."""

    def relabel(text: ProbeText) -> ProbeText:
        return text._replace(distances=np.full(len(text.ids), distance))

    choices = tuple(map(relabel, example.choices))
    return Example(relabel(example.text), relabel(example.control), choices, example.answer)


def make_recall_example(fields: Mapping[str, Any]) -> Example:
    """Make an example of mqar; the control has permuted values."""
    ids, queries = np.array(fields["ids"]), np.array(fields["query_positions"])
    places = {key: place for place, key in enumerate(ids[: 2 * fields["pairs"] : 2])}
    values_at = np.array([2 * places[key] + 1 for key in ids[queries]])
    targets, distances = np.full(len(ids), IGNORED), np.zeros(len(ids), dtype=np.int64)
    targets[queries] = fields["targets"]
    distances[queries] = 2 ** np.log2(queries - values_at).astype(int)
    others, values = ids.copy(), slice(1, 2 * fields["pairs"], 2)
    others[values] = np.roll(ids[values], 1)
    return Example(ProbeText(ids, targets, distances), ProbeText(others, targets, distances))


def make_copy_example(fields: Mapping[str, Any]) -> Example:
    """Make an example of copying; the control has the symbols in reverse order."""
    symbols, blanks = np.array(fields["symbols"]), np.full(fields["gap"], BLANK)
    text, control = (
        ask_for(concatenate(shown, blanks, [MARK]), symbols, fields["gap"])
        for shown in (symbols, symbols[::-1])
    )
    return Example(text, control)
