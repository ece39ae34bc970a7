"""Measure the training and decoding speed of the rows of a comparison in one process.

The load of a machine varies, so rounds alternate between all rows and medians are reported, for
wall time and for CPU time.
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

STEPS = 2  # training steps per round
DECODED = 64  # tokens per round
READ = 2304  # tokens read before decoding, enough to fill every memory


class Time(NamedTuple):
    """The times of one round."""

    wall: float  # seconds
    processor: float  # seconds


def measure_speed(recipes: Mapping[str, Recipe], rounds: int) -> dict[str, Any]:
    """Measure tokens per second of each row in training and decoding; return JSON data.

    The format is that of a benchmark; "rounds" holds the seconds of every round.
    """
    work = {row: make_workloads(recipe) for row, recipe in recipes.items()}
    times: dict[str, dict[str, list[Time]]] = {
        row: {name: [] for name in each} for row, each in work.items()
    }
    for _ in tqdm(range(rounds + 1), desc="rounds", unit="round"):  # the first warms up
        for row, each in work.items():
            for name, (once, _) in each.items():
                times[row][name].append(measure_time(once))
    seconds = {row: {name: t[1:] for name, t in each.items()} for row, each in times.items()}
    first = next(iter(recipes))
    rows = [
        {"row": row, **median_speeds(work[row], each), **median_ratios(each, seconds[first], first)}
        for row, each in seconds.items()
    ]
    return {"rows": rows, "rounds": seconds, "decoded": DECODED, "read": READ, **environment()}


def measure_time(once: Callable[[], None]) -> Time:
    wall, processor = time.perf_counter(), time.process_time()
    once()
    return Time(time.perf_counter() - wall, time.process_time() - processor)


def make_workloads(recipe: Recipe) -> dict[str, tuple[Callable[[], None], int]]:
    """Make the workloads: name -> (function that runs it once, its tokens)."""
    torch.manual_seed(recipe.training.seed)
    config = recipe.model_config(vocab_size=recipe.tokenizer.vocab_size)
    model = AutoModelForCausalLM.from_config(config)
    shape = (recipe.training.num_rows, recipe.data.segment_length)
    return {
        "training": (training(model, recipe, shape), STEPS * shape[0] * shape[1]),
        "decoding": (decoding(model), DECODED),
    }


def training(model: PreTrainedModel, recipe: Recipe, shape: tuple[int, int]) -> Callable[[], None]:
    """Make a training step: forward, backward, clipping, update, with the memory carried."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.training.learning_rate)
    ids = torch.randint(0, model.config.vocab_size, shape)
    state: dict[str, Any] = {"memory": None}

    def once() -> None:
        model.train()
        for _ in range(STEPS):
            out = model(ids, labels=ids, memory=state["memory"], return_memory=True)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            state["memory"] = out.memory

    return once


def decoding(model: PreTrainedModel) -> Callable[[], None]:
    """Make a decoding workload: one row, token by token, after a long document."""
    state: dict[str, Any] = {}

    @torch.inference_mode()
    def once() -> None:
        model.eval()
        if not state:
            ids = torch.randint(0, model.config.vocab_size, (1, READ))
            state.update(read(model, ids, None))
        for _ in range(DECODED):
            state.update(read(model, state["next"], state["memory"]))

    return once


def read(model: PreTrainedModel, ids: torch.Tensor, memory: Any) -> dict[str, Any]:
    out = model(ids, cache=memory, use_cache=True, logits_to_keep=1)
    return {"next": out.logits.argmax(-1), "memory": out.cache}


def median_speeds(work: Mapping[str, tuple[Any, int]], seconds: Mapping[str, list[Time]]) -> dict:
    """Return the median tokens per second of wall time and of CPU time."""
    found = {}
    for name, (_, tokens) in work.items():
        wall, processor = map(statistics.median, zip(*seconds[name], strict=True))
        found[f"{name}_tokens_per_second"] = round(tokens / wall, 1)
        found[f"{name}_tokens_per_processor_second"] = round(tokens / processor, 1)
    return found


def median_ratios(
    seconds: Mapping[str, list[Time]], base: Mapping[str, list[Time]], first: str
) -> dict[str, float]:
    """Return the median over rounds of the time relative to the first row."""
    return {
        f"{name}_time_over_{first}": round(
            statistics.median(
                one.wall / other.wall for one, other in zip(times, base[name], strict=True)
            ),
            3,
        )
        for name, times in seconds.items()
    }
