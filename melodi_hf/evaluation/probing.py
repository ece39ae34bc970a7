"""Evaluate a model on probes: accuracy by distance, and the gain from the fact.

Texts are read in batches, segment by segment with memory; choices are scored from copies of the
memory after the text. For each distance:

    accuracy            with choices: the correct one has the highest probability; with tokens: part
                        of them with the highest probability, given the preceding answer tokens
    low, high           95 % Wilson interval with examples as trials; conservative if an answer has
                        several tokens
    nll, control_nll    of the correct answer per token, with and without the fact
    gain                their difference, with a 95 % bootstrap interval over examples
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
from melodi_hf.evaluation.perplexity import evaluation_mode
from melodi_hf.evaluation.probes import Example, ProbeText

Z_95 = 1.96  # 97.5 % quantile of the normal distribution
RESAMPLES = 2000


class Answer(NamedTuple):
    """The score of one example at one distance."""

    right: float  # 0 to 1
    nll: float  # of the correct answer, per token


def evaluate_probe(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    segment_windows: int = 8,
    num_rows: int = 8,
    progress: bool = True,
    name: str = "probe",
) -> list[dict[str, Any]]:
    """Score examples; return one row per distance as JSON data.

    `segment_windows` and `num_rows` (batch size) do not change the results. Raises ValueError for
    ids outside the vocabulary and for no examples.
    """
    check_ids(examples, model.config.vocab_size)
    length = segment_windows * model.config.window_length
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].text.ids))
    found: dict[int, list[tuple[Answer, Answer]]] = defaultdict(list)
    total = sum(len(e.text.ids) + len(e.control.ids) for e in examples)
    bar = tqdm(desc=name, total=total, unit="tok", unit_scale=True, disable=not progress)
    with evaluation_mode(model), bar:
        for first in range(0, len(order), num_rows):
            batch = [examples[i] for i in order[first : first + num_rows]]
            texts = answer_examples(model, batch, [e.text for e in batch], length, bar.update)
            controls = answer_examples(model, batch, [e.control for e in batch], length, bar.update)
            for text, control in zip(texts, controls, strict=True):
                for distance, answer in text.items():
                    found[distance].append((answer, control[distance]))
    chances = [1 / len(e.choices) for e in examples if e.choices]
    chance = float(np.mean(chances)) if chances else None
    return [summarize(distance, found[distance], chance) for distance in sorted(found)]


def answer_examples(model, examples, texts, length, report) -> list[dict[int, Answer]]:
    """Return the answers of each example by distance."""
    scores, memory = score_texts(model, texts, None, length, report)
    if not examples[0].choices:
        return [answers_by_distance(text, *row) for text, row in zip(texts, scores, strict=True)]
    counts = torch.tensor([len(e.choices) for e in examples])
    choices = [choice for e in examples for choice in e.choices]
    copies = select_rows(memory, torch.arange(len(examples)).repeat_interleave(counts))
    scores, _ = score_texts(model, choices, copies, length)
    totals = torch.stack([nll.sum() for nll, _ in scores]).split(counts.tolist())
    return [score_choices(e, nll) for e, nll in zip(examples, totals, strict=True)]


def score_choices(example: Example, nll: Tensor) -> dict[int, Answer]:
    """Score the choices of an example by the total NLL of each."""
    right = example.choices[example.answer]
    count = int((right.targets != IGNORED).sum())
    chosen = float(nll.argmin() == example.answer)
    return {int(right.distances[-1]): Answer(chosen, float(nll[example.answer]) / count)}


def answers_by_distance(text: ProbeText, nll: Tensor, right: Tensor) -> dict[int, Answer]:
    distances = text.distances[text.targets != IGNORED]
    places = {int(d): torch.from_numpy(distances == d) for d in np.unique(distances)}
    return {
        d: Answer(right[at].double().mean().item(), nll[at].double().mean().item())
        for d, at in places.items()
    }


def score_texts(model, texts: Sequence[ProbeText], memory, length: int, report=None):
    """Score texts: return NLL and correctness of their targets, and the memory after each text."""
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
    """Score the targets of a row; logits: T V; wanted: T, IGNORED without a target."""
    logits, wanted = logits[wanted != IGNORED], wanted[wanted != IGNORED]
    return F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1) == wanted


def select_rows(memory, rows: Tensor):
    """Select rows of a memory, with repetition."""

    def choose(leaf):
        return leaf[rows.to(leaf.device)] if isinstance(leaf, Tensor) else leaf

    return tree_map(choose, memory)


def summarize(
    distance: int, found: list[tuple[Answer, Answer]], chance: float | None
) -> dict[str, Any]:
    right, nll, control_right, control_nll = np.array(found).reshape(-1, 4).T
    low, high = wilson_interval(float(right.mean()), len(found))
    gain_low, gain_high = bootstrap_interval(control_nll - nll)
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


def wilson_interval(part: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion of `count` trials (Wilson, 1927)."""
    square = Z_95**2
    middle = (part + square / (2 * count)) / (1 + square / count)
    half = math.sqrt(part * (1 - part) / count + square / (4 * count**2)) / (1 + square / count)
    return max(0.0, middle - Z_95 * half), min(1.0, middle + Z_95 * half)


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean."""
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def check_ids(examples: Sequence[Example], vocab_size: int) -> None:
    if not examples:
        raise ValueError("examples is empty: pass at least one")
    texts = [text for e in examples for text in (e.text, e.control, *e.choices)]
    low = min(int(text.ids.min()) for text in texts)
    high = max(int(max(text.ids.max(), text.targets.max())) for text in texts)
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"the probe has ids from {low} to {high}, but the model's vocabulary is 0 to "
            f"{vocab_size - 1}: make it with the tokenizer of the model"
        )
