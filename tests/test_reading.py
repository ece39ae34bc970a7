"""However a document is cut into calls, and whatever it is padded with, it is read the same."""

import random

import pytest
import torch

from melodi_hf import MelodiCache

from .models import (
    DOCUMENT,
    EACH,
    SYSTEMS,
    VARIED,
    WAYS,
    WINDOW,
    assert_differ,
    assert_near,
    build,
    draw,
    read_with_melodi_cache,
    read_with_memory,
)


def random_lengths(seed, total=DOCUMENT, longest=2 * WINDOW + 3):
    """Lengths of pieces, from 1 up."""
    generator, lengths = random.Random(seed), []
    while sum(lengths) < total:
        lengths.append(generator.randint(1, min(longest, total - sum(lengths))))
    return lengths


@pytest.mark.parametrize(("way", "seed"), [*zip(WAYS, range(3), strict=True), (WAYS[2], 3)])
def test_calls_of_any_length_equal_one_call(model, way, seed):
    ids = draw(2, DOCUMENT)
    pieces = ids.split(random_lengths(seed), dim=1)
    with torch.no_grad():
        assert_near(way(model, pieces), model(ids).logits)


@pytest.mark.parametrize("way", [read_with_melodi_cache, read_with_memory])
def test_window_by_window_equals_one_call(model, way):
    ids = draw(2, DOCUMENT)
    with torch.no_grad():
        assert_near(way(model, ids.split(WINDOW, dim=1)), model(ids).logits)


@pytest.mark.parametrize("name", VARIED)
def test_token_by_token_equals_one_call(name):
    model, ids = build(name), draw(2, DOCUMENT)
    with torch.no_grad():
        assert_near(read_with_melodi_cache(model, ids.split(1, dim=1)), model(ids).logits)


def test_what_was_read_before_matters(model):
    ids = draw(1, DOCUMENT)
    with torch.no_grad():
        whole, rest = model(ids).logits[:, 12:], model(ids[:, 12:]).logits
    assert_differ(whole[:, 0], rest[:, 0])


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("way", [read_with_melodi_cache, read_with_memory])
def test_window_of_one_token(name, way):
    sizes = {"compression_rate": 1} if name.startswith("compressive") else {}
    model, ids = build(name, window_length=1, **sizes), draw(2, 9)
    with torch.no_grad():
        logits = model(ids).logits
        assert_near(way(model, ids.split([1, 3, 5], dim=1)), logits)
    assert_differ(logits[:, 1:], logits[:, :-1])


def test_beginning_of_a_document_does_not_need_its_end(model):
    ids = draw(2, DOCUMENT)
    with torch.no_grad():
        whole = model(ids).logits
        for length in (1, WINDOW - 1, WINDOW, WINDOW + 1):
            assert_near(model(ids[:, :length]).logits, whole[:, :length])


def padded(lengths, columns, side):
    """Rows of so many tokens among so many columns -> ids, mask."""
    mask = torch.zeros(len(lengths), columns, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        places = {
            "left": torch.arange(columns - length, columns),
            "right": torch.arange(length),
            "middle": torch.randperm(columns)[:length],
        }[side]
        row[places] = 1
    return draw(*mask.shape), mask


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padded_rows_equal_the_rows_alone(model, side):
    ids, mask = padded((DOCUMENT, 3, 2 * WINDOW), DOCUMENT, side)
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        for row, (tokens, real) in enumerate(zip(ids, mask.bool(), strict=True)):
            alone = model(tokens[real][None]).logits[0]
            assert_near(together[row, real], alone)


def test_without_the_mask_padding_is_read(model):
    ids, mask = padded((DOCUMENT, 3), DOCUMENT, "left")
    with torch.no_grad():
        masked, unmasked = model(ids, attention_mask=mask).logits, model(ids).logits
    assert_near(masked[0], unmasked[0])
    assert_differ(masked[1, -1], unmasked[1, -1])


@pytest.mark.parametrize(("side", "carrier"), [("left", "cache"), ("middle", "memory")])
def test_padded_rows_continued_equal_the_rows_alone(model, side, carrier):
    """Three calls; in the second one row has no token at all."""
    calls = [
        padded(lengths, columns, side)
        for lengths, columns in (((11, 4, 8), 11), ((0, 10, 2), 10), ((9, 9, 13), 13))
    ]
    rows = [[] for _ in range(3)]
    carried = {"cache": MelodiCache(model.config)} if carrier == "cache" else {}
    with torch.no_grad():
        for ids, mask in calls:
            if carrier == "memory":
                carried["return_memory"] = True
            output = model(ids, attention_mask=mask, **carried)
            if carrier == "memory":
                carried["memory"] = output.memory
            for row, real in enumerate(mask.bool()):
                rows[row].append((ids[row, real], output.logits[row, real]))
        for row in rows:
            tokens, logits = (torch.cat(parts) for parts in zip(*row, strict=True))
            assert_near(logits, model(tokens[None]).logits[0])


def test_mask_of_all_columns_equals_that_of_the_call(model):
    ids, mask = padded((DOCUMENT - 4, WINDOW + 3), DOCUMENT, "left")
    caches = MelodiCache(model.config), MelodiCache(model.config)
    with torch.no_grad():
        for begin, end in ((0, 13), (13, DOCUMENT)):
            piece = ids[:, begin:end]
            short = model(piece, attention_mask=mask[:, begin:end], cache=caches[0])
            full = model(piece, attention_mask=mask[:, :end], cache=caches[1])
            assert_near(short.logits, full.logits, atol=0)


def test_padding_has_the_logits_of_nothing(model):
    ids, mask = padded((5, 3), 5, "left")
    other = torch.where(mask.bool(), ids, ids % 7 + 1)
    with torch.no_grad():
        assert_near(
            model(ids, attention_mask=mask).logits,
            model(other, attention_mask=mask).logits,
            atol=0,
        )


@pytest.mark.parametrize("name", EACH)
def test_call_of_padding_alone(name):
    """The first piece of a batch that is padded by more than a piece."""
    model = build(name)
    ids, mask = padded((WINDOW + 3, 6), DOCUMENT, "left")
    cache = MelodiCache(model.config)
    with torch.no_grad():
        model(ids[:, :10], attention_mask=mask[:, :10], cache=cache)
        logits = model(ids[:, 10:], attention_mask=mask, cache=cache).logits
        assert_near(logits, model(ids, attention_mask=mask).logits[:, 10:])
