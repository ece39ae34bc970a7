"""Make probes: texts with a fact, and a question about it a known number of tokens later.

    passkey   a number mentioned once in a book, and ten numbers to choose from (Mohtashami and
              Jaggi, 2023, arXiv:2305.16300)
    repeat    a passage that is repeated word for word after other text
    recall    pairs of key and value, blanks, then the keys in another order: which values? (Arora
              et al., 2023, arXiv:2312.04927)
    copy      symbols, blanks, a mark: which symbols? (Arjovsky et al., 2016, arXiv:1511.06464)

Each has a control with another fact: correct answers there do not come from memory. The first two
need documents and a tokenizer, the others consist of ids: 0 is the blank, 1 the mark.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from melodi_hf.data.segments import IGNORED

BLANK, MARK, FIRST_SYMBOL = 0, 1, 2
LEAD_TOKENS = 256  # tokens before the fact
CUE_TOKENS = 16  # tokens of the repeated passage that are given
CHOICES = 10
QUESTION = " The number of the safe is"


class ProbeText(NamedTuple):
    """Ids, with targets at the positions of the answer."""

    ids: np.ndarray  # T
    targets: np.ndarray  # T, IGNORED outside the answer
    distances: np.ndarray  # T, tokens between fact and question; at targets only


class Example(NamedTuple):
    """A text with a fact, its control, and the choices of answers."""

    text: ProbeText
    control: ProbeText
    choices: tuple[ProbeText, ...] = ()  # continuations; empty if the answer is in the text
    answer: int = 0  # index of the correct choice


class Material(NamedTuple):
    """Input for probes."""

    vocab_size: int
    ids: np.ndarray | None = None  # of concatenated documents
    start_id: int | None = None  # first token of every document
    encode: Callable[[list[str]], Iterable[list[int]]] | None = None


def make_examples(
    probe: str, distance: int, count: int, material: Material, *, size: int | None, seed: int
) -> list[Example]:
    """Make examples of one probe at one distance, reproducible by seed.

    size: number of digits (passkey), tokens (repeat), pairs (recall) or symbols (copy); the default
    is
        in `SIZES`.

    Raises ValueError for invalid numbers, and for missing or insufficient material.
    """
    size = SIZES[probe] if size is None else size
    if distance < 0 or size < 1 or count < 1:
        raise ValueError(
            f"got distance {distance}, size {size} and count {count}: pass a distance of at least "
            "0, and size and count of at least 1"
        )
    random = np.random.default_rng([seed, distance])
    return [MAKERS[probe](random, distance, size, material) for _ in range(count)]


def passkey(random: Generator, distance: int, size: int, material: Material) -> Example:
    """Make a passkey example; the control's number is not among the choices."""
    if not 2 <= size <= 18:
        raise ValueError(f"size={size}: pass 2 to 18 digits")
    first = 10 ** (size - 1)
    numbers = random.choice(9 * first, CHOICES + 1, replace=False) + first
    filler, _ = draw_passage(random, LEAD_TOKENS + distance, 0, material)
    lead, gap = filler[:LEAD_TOKENS], filler[LEAD_TOKENS:]
    question = encode_continuation(material, ".", QUESTION)
    choices = [encode_continuation(material, f".{QUESTION}", f" {n}") for n in numbers]
    if len({tuple(choice) for choice in choices}) <= CHOICES:
        raise ValueError(
            "the tokenizer encodes different numbers by the same ids: use another tokenizer"
        )
    facts = [
        encode_continuation(material, ".", f" Remember this.{QUESTION} {n}; it is {n}.")
        for n in (numbers[0], numbers[-1])
    ]
    prompts = align_lengths(
        [concatenate(lead, fact, gap, question[:-1]) for fact in facts], material
    )
    text, control = map(without_targets, prompts)
    order = random.permutation(CHOICES)
    return Example(
        text,
        control,
        tuple(ask_for(question[-1:], choices[i], distance) for i in order),
        int(np.flatnonzero(order == 0)[0]),
    )


def repeat(random: Generator, distance: int, size: int, material: Material) -> Example:
    """Make a repeated passage with other text in between; the control begins with another."""
    if size <= CUE_TOKENS:
        raise ValueError(f"size={size}: pass more than {CUE_TOKENS} tokens, the length of the cue")
    filler, rest = draw_passage(random, LEAD_TOKENS + distance, 2 * size, material)
    lead, gap = filler[:LEAD_TOKENS], filler[LEAD_TOKENS:]
    places = random.integers(len(rest) // 2 - size + 1, size=2)
    passage = rest[places[0] :][:size]
    other = rest[len(rest) // 2 + places[1] :][:size]
    prompts = [concatenate(lead, fact, gap, passage[:CUE_TOKENS]) for fact in (passage, other)]
    text, control = (
        ask_for(prompt, passage[CUE_TOKENS:], distance)
        for prompt in align_lengths(prompts, material)
    )
    return Example(text, control)


def recall(random: Generator, distance: int, size: int, material: Material) -> Example:
    """Make key-value recall; the control has other values.

    Keys are the lower half of the symbols, values the upper half.
    """
    middle = (FIRST_SYMBOL + material.vocab_size) // 2
    check_num_symbols(size, middle - FIRST_SYMBOL, material)
    keys = random.choice(np.arange(FIRST_SYMBOL, middle), size, replace=False)
    values, others = random.integers(middle, material.vocab_size, (2, size))
    order, blanks = random.permutation(size), np.full(distance, BLANK)
    questions = interleave(keys[order], values[order])
    targets = interleave(values[order], np.full(size, IGNORED))
    text, control = (
        make_probe_text(concatenate(interleave(keys, shown), blanks, questions), targets, distance)
        for shown in (values, others)
    )
    return Example(text, control)


def copy(random: Generator, distance: int, size: int, material: Material) -> Example:
    """Make a copy example; the control has other symbols."""
    check_num_symbols(1, material.vocab_size - FIRST_SYMBOL, material)
    symbols, others = random.integers(FIRST_SYMBOL, material.vocab_size, (2, size))
    blanks = np.full(distance, BLANK)
    text, control = (
        ask_for(concatenate(shown, blanks, [MARK]), symbols, distance)
        for shown in (symbols, others)
    )
    return Example(text, control)


MAKERS: dict[str, Callable[..., Example]] = {
    "passkey": passkey,
    "repeat": repeat,
    "recall": recall,
    "copy": copy,
}
SIZES = {"passkey": 5, "repeat": 64, "recall": 8, "copy": 16}
TEXT_PROBES = ("passkey", "repeat")


def make_probe_text(ids: np.ndarray, last_targets: np.ndarray, distance: int) -> ProbeText:
    """Make a text with targets at its last ids."""
    targets = np.full(len(ids), IGNORED)
    targets[len(ids) - len(last_targets) :] = last_targets
    return ProbeText(ids, targets, np.full(len(ids), distance))


def ask_for(shown: np.ndarray, answer: np.ndarray, distance: int) -> ProbeText:
    """Make a text with the targets `answer` after the prompt."""
    return make_probe_text(concatenate(shown, answer[:-1]), answer, distance)


def without_targets(ids: np.ndarray) -> ProbeText:
    """Make a text without targets."""
    return make_probe_text(ids, np.array([], dtype=np.int64), 0)


def concatenate(*parts) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def interleave(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Interleave two sequences."""
    return np.stack((first, second), axis=1).ravel()


def align_lengths(texts: Sequence[np.ndarray], material: Material) -> list[np.ndarray]:
    """Cut texts at the start to equal length.

    The text after the fact then falls into the same windows in all of them.
    """
    start = [] if material.start_id is None else [material.start_id]
    length = min(map(len, texts))
    return [concatenate(start, text[len(text) - length :]) for text in texts]


def draw_passage(
    random: Generator, length: int, spare: int, material: Material
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a passage; return it and the rest of the documents, at least `spare` tokens."""
    ids = np.array([], dtype=np.int64) if material.ids is None else material.ids
    if len(ids) < length + spare:
        raise ValueError(
            f"the probe needs {length + spare:,} tokens, but the documents have {len(ids):,}: "
            "pass more documents or a shorter distance"
        )
    rolled = np.roll(ids, -random.integers(len(ids)))
    return rolled[:length], rolled[length:]


def encode_continuation(material: Material, before: str, text: str) -> np.ndarray:
    """Encode a text in the context of the text before it."""
    shorter, longer = encode(material, [before, before + text])
    return np.array(longer[len(shorter) :])


def encode(material: Material, texts: list[str]) -> list[list[int]]:
    if material.encode is None:
        raise ValueError("this probe needs a tokenizer: pass one")
    return list(material.encode(texts))


def check_num_symbols(needed: int, symbols: int, material: Material) -> None:
    if symbols < needed:
        raise ValueError(
            f"the probe needs {needed} different symbols, but a vocabulary of "
            f"{material.vocab_size} has {symbols}: use a smaller size or a larger vocabulary"
        )
