"""Probes: texts that hold a fact, and ask for it a known number of tokens later.

    passkey   a number that a book mentions once, and ten numbers to choose from (Mohtashami and
              Jaggi, 2023, arXiv:2305.16300)
    repeat    a passage that comes back word for word, in the midst of other text
    recall    pairs of key and value, blanks, then the keys in another order: which values? (Arora
              et al., 2023, arXiv:2312.04927)
    copy      symbols, blanks, a mark: which symbols? (Arjovsky et al., 2016, arXiv:1511.06464)

Each has a control in which the fact is another one: what is right there was not remembered. The
first two are made of documents and a tokenizer, the others of ids: 0 is the blank, 1 the mark.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from melodi_hf.data.segments import IGNORED

BLANK, MARK, FIRST_SYMBOL = 0, 1, 2
LEAD = 256  # tokens of a document before the fact
CUE = 16  # tokens of a passage that are shown when it comes back
CHOICES = 10
QUESTION = " The number of the safe is"


class Reading(NamedTuple):
    """Ids that are read in order, and what should come next where something is asked."""

    ids: np.ndarray  # T
    targets: np.ndarray  # T, IGNORED where nothing is asked
    distances: np.ndarray  # T, tokens between the fact and the question; of the targets only


class Example(NamedTuple):
    """A text with a fact, the same without it, and what is asked of either."""

    text: Reading
    control: Reading
    choices: tuple[Reading, ...] = ()  # continuations; none: what is asked is in the text
    answer: int = 0  # the choice that is right


class Material(NamedTuple):
    """What probes are made of."""

    vocab_size: int
    ids: np.ndarray | None = None  # of documents, one after the other
    start_id: int | None = None  # what begins every document
    encode: Callable[[list[str]], Iterable[list[int]]] | None = None


def make_examples(
    probe: str, distance: int, count: int, material: Material, *, size: int | None, seed: int
) -> list[Example]:
    """Examples of one probe at one distance; the same seed gives the same ones.

    size: what is to be remembered: digits (passkey), tokens (repeat), pairs (recall), symbols
        (copy); None: as many as `SIZES` says.

    Raises ValueError for distances below 0 and for material that is missing or too small.
    """
    size = SIZES[probe] if size is None else size
    if distance < 0 or size < 1 or count < 1:
        raise ValueError(
            f"distance {distance}, size {size} and count {count}: a distance is 0 tokens or more, "
            "size and count are 1 or more"
        )
    random = np.random.default_rng([seed, distance])
    return [MAKERS[probe](random, distance, size, material) for _ in range(count)]


def passkey(random: Generator, distance: int, size: int, material: Material) -> Example:
    """A number in a document; the control's number is none of the choices."""
    if not 2 <= size <= 18:
        raise ValueError(f"size is {size}: the numbers have 2 to 18 digits")
    first = 10 ** (size - 1)
    numbers = random.choice(9 * first, CHOICES + 1, replace=False) + first
    filler, _ = cut(random, LEAD + distance, 0, material)
    lead, gap = filler[:LEAD], filler[LEAD:]
    question = continuation(material, ".", QUESTION)
    choices = [continuation(material, f".{QUESTION}", f" {n}") for n in numbers]
    if len({tuple(choice) for choice in choices}) <= CHOICES:
        raise ValueError("the tokenizer writes different numbers with the same ids: use another")
    facts = [
        continuation(material, ".", f" Remember this.{QUESTION} {n}; it is {n}.")
        for n in (numbers[0], numbers[-1])
    ]
    prompts = aligned([join(lead, fact, gap, question[:-1]) for fact in facts], material)
    text, control = map(silent, prompts)
    order = random.permutation(CHOICES)
    return Example(
        text,
        control,
        tuple(asking(question[-1:], choices[i], distance) for i in order),
        int(np.flatnonzero(order == 0)[0]),
    )


def repeat(random: Generator, distance: int, size: int, material: Material) -> Example:
    """A passage, other text, the passage again; the control begins with another passage."""
    if size <= CUE:
        raise ValueError(f"size is {size}: a passage has more than the {CUE} tokens of its cue")
    filler, rest = cut(random, LEAD + distance, 2 * size, material)
    lead, gap = filler[:LEAD], filler[LEAD:]
    places = random.integers(len(rest) // 2 - size + 1, size=2)
    passage = rest[places[0] :][:size]
    other = rest[len(rest) // 2 + places[1] :][:size]
    prompts = [join(lead, fact, gap, passage[:CUE]) for fact in (passage, other)]
    text, control = (
        asking(prompt, passage[CUE:], distance) for prompt in aligned(prompts, material)
    )
    return Example(text, control)


def recall(random: Generator, distance: int, size: int, material: Material) -> Example:
    """Keys are the lower half of the symbols, values the upper; the control has other values."""
    middle = (FIRST_SYMBOL + material.vocab_size) // 2
    refuse_few_symbols(size, middle - FIRST_SYMBOL, material)
    keys = random.choice(np.arange(FIRST_SYMBOL, middle), size, replace=False)
    values, others = random.integers(middle, material.vocab_size, (2, size))
    order, blanks = random.permutation(size), np.full(distance, BLANK)
    questions = pairs(keys[order], values[order])
    targets = pairs(values[order], np.full(size, IGNORED))
    text, control = (
        reading(join(pairs(keys, shown), blanks, questions), targets, distance)
        for shown in (values, others)
    )
    return Example(text, control)


def copy(random: Generator, distance: int, size: int, material: Material) -> Example:
    """The control shows other symbols."""
    refuse_few_symbols(1, material.vocab_size - FIRST_SYMBOL, material)
    symbols, others = random.integers(FIRST_SYMBOL, material.vocab_size, (2, size))
    blanks = np.full(distance, BLANK)
    text, control = (
        asking(join(shown, blanks, [MARK]), symbols, distance) for shown in (symbols, others)
    )
    return Example(text, control)


MAKERS: dict[str, Callable[..., Example]] = {
    "passkey": passkey,
    "repeat": repeat,
    "recall": recall,
    "copy": copy,
}
SIZES = {"passkey": 5, "repeat": 64, "recall": 8, "copy": 16}
OF_TEXT = ("passkey", "repeat")


def reading(ids: np.ndarray, last_targets: np.ndarray, distance: int) -> Reading:
    """The last ids have targets, those before have none."""
    targets = np.full(len(ids), IGNORED)
    targets[len(ids) - len(last_targets) :] = last_targets
    return Reading(ids, targets, np.full(len(ids), distance))


def asking(shown: np.ndarray, answer: np.ndarray, distance: int) -> Reading:
    """`answer`, token by token, after what is shown."""
    return reading(join(shown, answer[:-1]), answer, distance)


def silent(ids: np.ndarray) -> Reading:
    """Nothing is asked."""
    return reading(ids, np.array([], dtype=np.int64), 0)


def join(*parts) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """One of the first, one of the second, and so on."""
    return np.stack((first, second), axis=1).ravel()


def aligned(texts: Sequence[np.ndarray], material: Material) -> list[np.ndarray]:
    """Beginnings of documents, of one length at the cost of their first tokens: what follows the
    fact then falls into the same windows."""
    start = [] if material.start_id is None else [material.start_id]
    length = min(map(len, texts))
    return [join(start, text[len(text) - length :]) for text in texts]


def cut(
    random: Generator, length: int, spare: int, material: Material
) -> tuple[np.ndarray, np.ndarray]:
    """A stretch of the documents, and all that lies outside of it, at least `spare` tokens."""
    ids = np.array([], dtype=np.int64) if material.ids is None else material.ids
    if len(ids) < length + spare:
        raise ValueError(
            f"a text of {length + spare:,} tokens is needed and the documents have {len(ids):,}: "
            "give more documents or a shorter distance"
        )
    rolled = np.roll(ids, -random.integers(len(ids)))
    return rolled[:length], rolled[length:]


def continuation(material: Material, before: str, text: str) -> np.ndarray:
    """The ids of a text that stands behind another."""
    shorter, longer = encode(material, [before, before + text])
    return np.array(longer[len(shorter) :])


def encode(material: Material, texts: list[str]) -> list[list[int]]:
    if material.encode is None:
        raise ValueError("this probe is a text: give a tokenizer")
    return list(material.encode(texts))


def refuse_few_symbols(needed: int, symbols: int, material: Material) -> None:
    if symbols < needed:
        raise ValueError(
            f"{needed} different symbols are needed and a vocabulary of {material.vocab_size} "
            f"gives {symbols}: lower the size or raise the vocabulary"
        )
