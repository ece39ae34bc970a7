"""How fast the rows of a comparison train and decode, measured side by side in one process.

A machine with other work on it is slower from one minute to the next, so rounds go through all rows
again and again, and medians are told; beside the time on the wall, that of the processor.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from record import environment
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from parts.recipe import Recipe

STEPS = 2  # of training, in a round
DECODED = 64  # tokens, in a round
READ = 2304  # tokens before the first that is decoded: longer memories are full by then


class Time(NamedTuple):
    """What a round took."""

    wall: float  # seconds
    processor: float  # seconds


def measure_speed(recipes: Mapping[str, Recipe], rounds: int) -> dict[str, Any]:
    """Tokens per second of each row, in training and in decoding, for JSON.

    The rows are those of a benchmark; "rounds" holds the seconds of every round.
    """
    work = {row: works(recipe) for row, recipe in recipes.items()}
    times: dict[str, dict[str, list[Time]]] = {
        row: {name: [] for name in each} for row, each in work.items()
    }
    for _ in tqdm(range(rounds + 1), desc="rounds", unit="round"):  # the first warms up
        for row, each in work.items():
            for name, (once, _) in each.items():
                times[row][name].append(timed(once))
    seconds = {row: {name: t[1:] for name, t in each.items()} for row, each in times.items()}
    first = next(iter(recipes))
    rows = [
        {"row": row, **speeds(work[row], each), **ratios(each, seconds[first], first)}
        for row, each in seconds.items()
    ]
    return {"rows": rows, "rounds": seconds, "decoded": DECODED, "read": READ, **environment()}


def timed(once: Callable[[], None]) -> Time:
    wall, processor = time.perf_counter(), time.process_time()
    once()
    return Time(time.perf_counter() - wall, time.process_time() - processor)


def works(recipe: Recipe) -> dict[str, tuple[Callable[[], None], int]]:
    """What is measured: name -> (what does it once, its tokens)."""
    torch.manual_seed(recipe.training.seed)
    config = recipe.model_config(vocab_size=recipe.tokenizer.vocab_size)
    model = AutoModelForCausalLM.from_config(config)
    shape = (recipe.training.num_rows, recipe.data.segment_length)
    return {
        "training": (training(model, recipe, shape), STEPS * shape[0] * shape[1]),
        "decoding": (decoding(model), DECODED),
    }


def training(model: PreTrainedModel, recipe: Recipe, shape: tuple[int, int]) -> Callable[[], None]:
    """Steps as in training: forward, backward, clipping, update, the memory carried."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.training.learning_rate)
    ids = torch.randint(0, model.config.vocab_size, shape)
    held: dict[str, Any] = {"memory": None}

    def once() -> None:
        model.train()
        for _ in range(STEPS):
            out = model(ids, labels=ids, memory=held["memory"], return_memory=True)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            held["memory"] = out.memory

    return once


def decoding(model: PreTrainedModel) -> Callable[[], None]:
    """One row, token by token behind a document that is long already."""
    held: dict[str, Any] = {}

    @torch.inference_mode()
    def once() -> None:
        model.eval()
        if not held:
            ids = torch.randint(0, model.config.vocab_size, (1, READ))
            held.update(read(model, ids, None))
        for _ in range(DECODED):
            held.update(read(model, held["next"], held["memory"]))

    return once


def read(model: PreTrainedModel, ids: torch.Tensor, memory: Any) -> dict[str, Any]:
    out = model(ids, cache=memory, use_cache=True, logits_to_keep=1)
    return {"next": out.logits.argmax(-1), "memory": out.cache}


def speeds(work: Mapping[str, tuple[Any, int]], seconds: Mapping[str, list[Time]]) -> dict:
    """Tokens per second on the wall and of the processor, medians."""
    found = {}
    for name, (_, tokens) in work.items():
        wall, processor = map(statistics.median, zip(*seconds[name], strict=True))
        found[f"{name}_tokens_per_second"] = round(tokens / wall, 1)
        found[f"{name}_tokens_per_processor_second"] = round(tokens / processor, 1)
    return found


def ratios(
    seconds: Mapping[str, list[Time]], base: Mapping[str, list[Time]], first: str
) -> dict[str, float]:
    """How many times the seconds of the first row, round by round, the median."""
    return {
        f"{name}_time_over_{first}": round(
            statistics.median(
                one.wall / other.wall for one, other in zip(times, base[name], strict=True)
            ),
            3,
        )
        for name, times in seconds.items()
    }
