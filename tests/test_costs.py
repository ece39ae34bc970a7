"""Promise: the analytic counts are those of the published arithmetic, and of what really runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from melodi_hf import (
    BlockRecurrentConfig,
    BlockRecurrentForCausalLM,
    CompressiveTransformerConfig,
    CompressiveTransformerForCausalLM,
    ElasticMemoryConfig,
    ElasticMemoryForCausalLM,
    MelodiCache,
    MelodiConfig,
    MelodiForCausalLM,
    MemorizingTransformerConfig,
    TransformerXLConfig,
)
from melodi_hf.models import modules

from .cases import every_case

PAPER = MelodiConfig()
TINY = MelodiConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, head_dim=16,
    intermediate_size=64, window_length=8, num_summary_tokens=4, num_short_memory_tokens=4,
    long_memory_layers=(1,), num_long_memory_tokens=2, long_memory_windows=6,
    attn_implementation="eager",
)  # fmt: skip


TINY_XL = TransformerXLConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
    intermediate_size=64, window_length=8,
)  # fmt: skip

TINY_COMPRESSIVE = CompressiveTransformerConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
    intermediate_size=64, window_length=8, memory_length=16, compressed_memory_length=6,
    attn_implementation="eager",
)  # fmt: skip


TINY_RECURRENT = BlockRecurrentConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, head_dim=16,
    intermediate_size=64, window_length=8, recurrent_layers=(0, 2), num_state_vectors=5,
    attn_implementation="eager",
)  # fmt: skip


TINY_ELASTIC = ElasticMemoryConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, head_dim=16,
    intermediate_size=64, window_length=8, memory_layers=(1,), memory_order=6, num_memory_samples=5,
    attn_implementation="eager",
)  # fmt: skip


def test_paper_row_costs_468_megaflops_per_token():
    per_token = PAPER.forward_flops(65536, with_logits=False) / 65536
    assert per_token / 1e6 == pytest.approx(468.1, abs=0.05)


def test_logits_of_the_paper_row_cost_66_megaflops_per_token():
    with_logits = PAPER.forward_flops(512) - PAPER.forward_flops(512, with_logits=False)
    assert with_logits / 512 / 1e6 == pytest.approx(65.8, abs=0.05)


def test_transformer_xl_costs_327_megaflops_per_token():
    per_token = TransformerXLConfig().forward_flops(4096, with_logits=False) / 4096
    assert per_token / 1e6 == pytest.approx(327.2, abs=0.05)


def test_dense_memory_of_the_comparison_costs_629_megaflops_per_token():
    """327.2 of the stack, 268.4 of the memory, 25.2 of the side layer, 8.4 of the segment in it."""
    side = {"placement": "side", "retrieval": "dense", "segment_windows": 8}
    config = MemorizingTransformerConfig(**side)
    per_token = config.forward_flops(4096, with_logits=False) / 4096
    assert per_token / 1e6 == pytest.approx(327.2 + 268.4 + 25.2 + 8.4, abs=0.1)
    nearest = MemorizingTransformerConfig(**side | {"retrieval": "top_k"})
    fewer = nearest.forward_flops(4096, with_logits=False) / 4096
    assert per_token - fewer == 2 * (65536 - 32) * 1024  # their values are not read


def test_training_costs_three_times_reading():
    assert PAPER.training_flops(4096) == 3 * PAPER.forward_flops(4096)


def test_fewer_filled_slots_cost_less():
    assert PAPER.forward_flops(512, queue_filled=0) < PAPER.forward_flops(512)


@pytest.fixture
def full_queue(monkeypatch):
    """Every slot of the queue is looked at, as if it were full."""
    monkeypatch.setattr(modules, "count_empty_in_all_rows", lambda k, filled: 0)


@pytest.mark.usefixtures("full_queue")
@every_case("num_tokens", [8, 24, 29, 5])
def test_what_runs_is_what_is_counted(num_tokens):
    # The plain implementation computes hidden pairs too: they are added to the count here.
    model = MelodiForCausalLM(TINY).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, 50, (1, num_tokens)), use_cache=False, return_memory=True)
    windows, rest = divmod(num_tokens, 8)
    sees = lambda rows: rows * 4 + rows * (rows - 1) // 2  # noqa: E731
    hidden = windows * (12 * 16 - sees(12)) + (rest * (4 + rest) - sees(rest))
    waste = 2 * 3 * hidden * 2 * 32 + projected_queue(TINY)
    assert counter.get_total_flops() == TINY.forward_flops(num_tokens) + waste


@every_case(("num_tokens", "sampling"), [(8, "uniform"), (29, "uniform"), (24, "exponential")])
def test_what_an_elastic_memory_runs_is_what_is_counted(num_tokens, sampling):
    """Its banks are not counted: they are made in the first reading."""
    model = ElasticMemoryForCausalLM(TINY_ELASTIC).eval().requires_grad_(False)
    model.set_sampling(sampling)
    ids = torch.randint(0, 50, (1, num_tokens))
    model(ids, use_cache=False, return_memory=True)
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False, return_memory=True)
    windows, rest = divmod(num_tokens, 8)
    hidden = windows * (64 - 28) + rest * rest - rest * (rest - 1) // 2  # in each of three layers
    waste = 2 * 3 * hidden * 2 * 32
    assert counter.get_total_flops() == TINY_ELASTIC.forward_flops(num_tokens) + waste


def test_an_elastic_memory_of_the_first_size_costs_little_per_token():
    """2 (4d (N² / W + N) / 2 + 2 M N d / W) of one layer beside the products of its block."""
    with_memory = ElasticMemoryConfig(num_memory_samples=540, memory_layers=(6,))
    without = ElasticMemoryConfig(memory_layers=())
    added = with_memory.forward_flops(2048) - without.forward_flops(2048)
    attended = 4 * 540 * 1024
    taken_in, recalled = 4 * 1024 * (540 * 540 / 2048 + 540), 4 * 540 * 540 * 1024 / 2048
    assert taken_in / 1e6 == pytest.approx(2.8, abs=0.05)
    assert added / 2048 == pytest.approx(attended + taken_in + recalled)


def projected_queue(config):  # in training the queue's tokens are projected once per call
    return 2 * 2 * config.hidden_size * 32 * config.long_memory_length


@every_case(
    ("num_tokens", "kind"),
    [(24, "mean_pool"), (29, "conv"), (24, "dilated_conv"), (29, "most_used")],
)
def test_what_a_compressive_transformer_runs_is_what_is_counted(kind, num_tokens):
    # The plain implementation computes hidden pairs too, and a call of its own begins with keys and
    # values of both memories: they are added to the count here.
    sizes = TINY_COMPRESSIVE.to_dict() | {"compression": kind, "compression_loss": "none"}
    config = CompressiveTransformerConfig(**sizes, attn_implementation="eager")
    model = CompressiveTransformerForCausalLM(config).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, 50, (1, num_tokens)), use_cache=False, return_memory=True)
    windows, rest = divmod(num_tokens, 8)
    hidden = 2 * (windows * 36 + rest * (rest + 1) // 2)  # scores, values
    hidden += windows * 36 * (kind == "most_used")  # the scores that rank the states
    waste = 2 * 2 * 32 * (hidden + 2 * 32 * 22)
    assert counter.get_total_flops() == config.forward_flops(num_tokens) + waste


def test_decoding_with_two_memories_reads_keys_and_values_of_both():
    few = TINY_COMPRESSIVE.to_dict() | {"compressed_memory_length": 4}
    more, less = (c.decoding_bytes(3, 2) for c in (TINY_COMPRESSIVE, type(TINY_COMPRESSIVE)(**few)))
    assert more - less == 2 * 2 * 2 * 32 * 2  # slots, layers, keys and values, channels, bytes


def test_a_state_costs_25_megaflops_per_token():
    with_state = BlockRecurrentConfig().forward_flops(4096, with_logits=False)
    without = TransformerXLConfig().forward_flops(4096, with_logits=False)
    assert (with_state - without) / 4096 / 1e6 == pytest.approx(25.2, abs=0.05)


@every_case(
    ("gate", "gate_configuration", "num_tokens", "reads_previous"),
    [  # each gate, each configuration, and both ways of reading and ending
        ("fixed", "skip", 29, True),
        ("fixed", "dual", 24, False),
        ("lstm", "single", 24, True),
        ("lstm", "dual", 29, False),
        ("full", "skip", 29, False),
        ("full", "single", 24, True),
        ("full", "dual", 29, True),
    ],
)
def test_what_runs_with_a_state_is_what_is_counted(
    gate, gate_configuration, num_tokens, reads_previous
):
    config = BlockRecurrentConfig(
        **TINY_RECURRENT.to_dict()
        | {
            "gate": gate,
            "gate_configuration": gate_configuration,
            "state_reads_previous_window": reads_previous,
        },
        attn_implementation="eager",
    )
    model = BlockRecurrentForCausalLM(config).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, 50, (1, num_tokens)), use_cache=False, return_memory=True)
    windows, rest = divmod(num_tokens, 8)
    hidden = windows * 8 * 8 + rest * (8 + rest) - rest * 8  # pairs that are computed, and hidden
    waste = 2 * 3 * hidden * 2 * 32
    assert counter.get_total_flops() == config.forward_flops(num_tokens) + waste


def test_decoding_reads_the_keys_and_values_of_the_state():
    config, fewer = BlockRecurrentConfig(), BlockRecurrentConfig(num_state_vectors=511)
    assert config.decoding_bytes(0, 2) - fewer.decoding_bytes(0, 2) == 2 * 1024 * 2
    without = BlockRecurrentConfig(recurrent_layers=()).decoding_bytes(0, 2)
    assert without == TransformerXLConfig().decoding_bytes(0, 2)
    assert config.decoding_bytes(0, 2) - without == (512 * 2 * 1024 + 2 * 1024 * 1024) * 2


def test_empty_slots_of_the_queue_cost_nothing_but_one(monkeypatch):
    """8 windows: the first finds 12 empty slots, the next 10, the last two none."""
    model = MelodiForCausalLM(TINY).eval().requires_grad_(False)
    ids, counts = torch.randint(0, 50, (1, 64)), []
    for empty in (modules.count_empty_in_all_rows, lambda k, filled: 0):
        monkeypatch.setattr(modules, "count_empty_in_all_rows", empty)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids, use_cache=False, return_memory=True)
        counts.append(counter.get_total_flops())
    slots, pushed = TINY.long_memory_length, TINY.num_long_memory_tokens
    saved = sum(max(0, slots - pushed * window - 1) for window in range(8))
    assert counts[1] - counts[0] == saved * 12 * 2 * 2 * 32 > 0  # queries, scores and values


@pytest.mark.usefixtures("full_queue")
def test_closing_a_window_costs_what_runs_beside_its_last_token():
    model = MelodiForCausalLM(TINY).eval().requires_grad_(False)
    cache = MelodiCache(TINY)
    model(torch.randint(0, 50, (1, 7)), cache=cache)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, 50, (1, 1)), cache=cache)
    token = 2 * (body_products_of_the_last_token(TINY) + 32 * 50)
    hidden = 5 * 16 - sum(4 + slot for slot in range(7, 12))  # computed and thrown away
    assert counter.get_total_flops() == token + TINY.window_end_flops() + 2 * 3 * hidden * 2 * 32


def body_products_of_the_last_token(config):
    queue = config.long_memory_length * 2 * 32
    pairs = (4 + config.window_length - 1) * 2 * 32
    return 3 * (32 * (4 * 32 + 2 * 64) + pairs) + queue


@every_case("config", [TINY, TINY_XL, TINY_COMPRESSIVE, TINY_RECURRENT, TINY_ELASTIC])
def test_cache_holds_the_bytes_that_are_counted(config):
    from transformers import AutoModelForCausalLM

    cache = MelodiCache(config)
    AutoModelForCausalLM.from_config(config)(torch.randint(0, 50, (3, 21)), cache=cache)
    assert cache.memory_bytes() == 3 * config.cache_bytes(4)


def test_coefficients_of_halves_are_counted_as_they_are_held():
    cache, model = MelodiCache(TINY_ELASTIC), ElasticMemoryForCausalLM(TINY_ELASTIC).bfloat16()
    with torch.no_grad():
        model(torch.randint(0, 50, (3, 21)), cache=cache)
    assert cache.memory_bytes() == 3 * TINY_ELASTIC.cache_bytes(2)
    assert 2 * TINY_ELASTIC.cache_bytes(2) == TINY_ELASTIC.cache_bytes(4) + 2 * 6 * 32 * 4


def test_decoding_reads_more_the_fuller_the_window_and_never_more_than_64_megabytes_of_memory():
    weights = MelodiConfig(long_memory_layers=(), num_short_memory_tokens=0).decoding_bytes(0, 2)
    memory = PAPER.decoding_bytes(511, 2) - weights
    assert PAPER.decoding_bytes(0, 2) < PAPER.decoding_bytes(511, 2)
    assert memory / 2**20 == pytest.approx(62, abs=1)
