"""What a model answers to probes: right answers by distance, and what the fact was worth.

A text of any length is read segment by segment through the memory, several side by side; choices
are read from copies of the memory after it. For each distance there are

    accuracy            of choices: is the right one the likeliest; of tokens: the part of them that
                        is the likeliest of the vocabulary, the answer's beginning being given
    low, high           Wilson's interval of 95 % with the examples as trials; where one asks for
                        several tokens it is wider than it need be, never narrower
    nll, control_nll    of the right answer per token, with the fact and without
    gain                their difference, with the 95 % interval of a bootstrap over examples
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map
from tqdm import tqdm
from transformers import PreTrainedModel

from melodi_hf.data.segments import IGNORED
from melodi_hf.evaluation.perplexity import evaluating
from melodi_hf.evaluation.probes import Example, Reading

DEVIATIONS = 1.96  # of a normal, on either side of 95 %
RESAMPLES = 2000


class Answer(NamedTuple):
    """How well one example was answered at one distance."""

    right: float  # 0 to 1
    nll: float  # of the right answer, per token


def evaluate_probe(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    segment_windows: int = 8,
    num_rows: int = 8,
    progress: bool = True,
    name: str = "probe",
) -> list[dict[str, Any]]:
    """One row for each distance, ready for JSON; `num_rows` texts are read side by side.

    Neither `segment_windows` nor `num_rows` changes what is found. Raises ValueError for ids that
    the model does not know and for no examples.
    """
    refuse_unreadable(examples, model.config.vocab_size)
    length = segment_windows * model.config.window_length
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].text.ids))
    found: dict[int, list[tuple[Answer, Answer]]] = defaultdict(list)
    total = sum(len(e.text.ids) + len(e.control.ids) for e in examples)
    bar = tqdm(desc=name, total=total, unit="tok", unit_scale=True, disable=not progress)
    with evaluating(model), bar:
        for first in range(0, len(order), num_rows):
            batch = [examples[i] for i in order[first : first + num_rows]]
            texts = answers(model, batch, [e.text for e in batch], length, bar.update)
            controls = answers(model, batch, [e.control for e in batch], length, bar.update)
            for text, control in zip(texts, controls, strict=True):
                for distance, answer in text.items():
                    found[distance].append((answer, control[distance]))
    chances = [1 / len(e.choices) for e in examples if e.choices]
    chance = float(np.mean(chances)) if chances else None
    return [summary(distance, found[distance], chance) for distance in sorted(found)]


def answers(model, examples, texts, length, report) -> list[dict[int, Answer]]:
    """For each example its answers by distance."""
    scores, memory = score(model, texts, None, length, report)
    if not examples[0].choices:
        return [by_distance(text, *row) for text, row in zip(texts, scores, strict=True)]
    counts = torch.tensor([len(e.choices) for e in examples])
    choices = [choice for e in examples for choice in e.choices]
    copies = rows_of(memory, torch.arange(len(examples)).repeat_interleave(counts))
    scores, _ = score(model, choices, copies, length)
    totals = torch.stack([nll.sum() for nll, _ in scores]).split(counts.tolist())
    return [best(e, nll) for e, nll in zip(examples, totals, strict=True)]


def best(example: Example, nll: Tensor) -> dict[int, Answer]:
    """nll: of each choice, all its tokens together."""
    right = example.choices[example.answer]
    count = int((right.targets != IGNORED).sum())
    chosen = float(nll.argmin() == example.answer)
    return {int(right.distances[-1]): Answer(chosen, float(nll[example.answer]) / count)}


def by_distance(text: Reading, nll: Tensor, right: Tensor) -> dict[int, Answer]:
    distances = text.distances[text.targets != IGNORED]
    places = {int(d): torch.from_numpy(distances == d) for d in np.unique(distances)}
    return {
        d: Answer(right[at].double().mean().item(), nll[at].double().mean().item())
        for d, at in places.items()
    }


def score(model, texts: Sequence[Reading], memory, length: int, report=None):
    """For each text the negative log-likelihood of its targets, and whether each was the likeliest
    token; and the memory, each row's as it was behind its own last token."""
    device = model.device
    ids = pad_sequence([torch.from_numpy(text.ids) for text in texts], batch_first=True)
    targets = pad_sequence(
        [torch.from_numpy(text.targets) for text in texts], batch_first=True, padding_value=IGNORED
    )
    ends = torch.tensor([len(text.ids) for text in texts])[:, None]
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in texts]
    for first in range(0, ids.shape[1], length):
        columns = torch.arange(first, min(first + length, ids.shape[1]))
        asked = (targets[:, columns] != IGNORED).any(0).nonzero()[:, 0]
        output = model(
            ids[:, columns].to(device),
            attention_mask=(columns < ends).long().to(device),
            memory=memory,
            return_memory=True,
            use_cache=False,
            logits_to_keep=asked.to(device),
        )
        memory = output.memory
        for row, logits, wanted in zip(
            found, output.logits, targets[:, columns[asked]], strict=True
        ):
            row.append(score_row(logits.float().cpu(), wanted))
        if report is not None:
            report(int((columns < ends).sum()))
    return [tuple(map(torch.cat, zip(*row, strict=True))) for row in found], memory


def score_row(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """logits: T V; wanted: T, IGNORED where this row is not asked."""
    logits, wanted = logits[wanted != IGNORED], wanted[wanted != IGNORED]
    return F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1) == wanted


def rows_of(memory, rows: Tensor):
    """The memory of some rows, in any order and number."""

    def choose(leaf):
        return leaf[rows.to(leaf.device)] if isinstance(leaf, Tensor) else leaf

    return tree_map(choose, memory)


def summary(
    distance: int, found: list[tuple[Answer, Answer]], chance: float | None
) -> dict[str, Any]:
    right, nll, control_right, control_nll = np.array(found).reshape(-1, 4).T
    low, high = wilson(float(right.mean()), len(found))
    gain_low, gain_high = bootstrap(control_nll - nll)
    return {
        "distance": distance,
        "examples": len(found),
        "accuracy": float(right.mean()),
        "low": low,
        "high": high,
        "chance": chance,
        "control_accuracy": float(control_right.mean()),
        "nll": float(nll.mean()),
        "control_nll": float(control_nll.mean()),
        "gain": float((control_nll - nll).mean()),
        "gain_low": gain_low,
        "gain_high": gain_high,
    }


def wilson(part: float, count: int) -> tuple[float, float]:
    """The interval of 95 % for a part of `count` trials (Wilson, 1927)."""
    square = DEVIATIONS**2
    middle = (part + square / (2 * count)) / (1 + square / count)
    half = math.sqrt(part * (1 - part) / count + square / (4 * count**2)) / (1 + square / count)
    return max(0.0, middle - DEVIATIONS * half), min(1.0, middle + DEVIATIONS * half)


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """The interval of 95 % for the mean, by drawing as many with replacement again and again."""
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def refuse_unreadable(examples: Sequence[Example], vocab_size: int) -> None:
    if not examples:
        raise ValueError("there are no examples to probe with")
    texts = [text for e in examples for text in (e.text, e.control, *e.choices)]
    low = min(int(text.ids.min()) for text in texts)
    high = max(int(max(text.ids.max(), text.targets.max())) for text in texts)
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"the probe has ids from {low} to {high}, but the model's vocabulary is 0 to "
            f"{vocab_size - 1}: was it made with another tokenizer?"
        )
