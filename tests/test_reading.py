"""However a document is cut into calls, and whatever it is padded with, it is read the same."""

import random

import pytest
import torch

from melodi_hf import MelodiCache

from .models import (
    DOCUMENT,
    EACH,
    FEW,
    SYSTEMS,
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


CUTS = {
    "anywhere": None,
    "at windows": [WINDOW] * (DOCUMENT // WINDOW) + [DOCUMENT % WINDOW],
    "after each token": [1] * DOCUMENT,
}


@pytest.mark.parametrize("cut", CUTS)
def test_pieces_of_any_length_equal_one_call(model, cut):
    ids = draw(2, DOCUMENT)
    with torch.no_grad():
        wanted = model(ids).logits
        for seed, way in enumerate(WAYS if cut == "anywhere" else WAYS[1:]):
            pieces = ids.split(CUTS[cut] or random_lengths(seed), dim=1)
            assert_near(way(model, pieces), wanted)
            if cut == "after each token":
                break  # of training it would be the same once more


@pytest.mark.parametrize("name", SYSTEMS)
def test_window_of_one_token(name):
    sizes = {"compression_rate": 1} if name.startswith("compressive") else {}
    model, ids = build(name, window_length=1, **sizes), draw(2, 9)
    with torch.no_grad():
        logits = model(ids).logits
        for way in (read_with_melodi_cache, read_with_memory):
            assert_near(way(model, ids.split([1, 3, 5], dim=1)), logits)
    assert_differ(logits[:, 1:], logits[:, :-1])


def padded(lengths, columns, side):
    """Rows of so many tokens among so many columns -> ids, mask."""
    mask = torch.zeros(len(lengths), columns, dtype=torch.long)
    sides = [side] * len(lengths) if isinstance(side, str) else side
    for row, length, side in zip(mask, lengths, sides, strict=True):
        places = {
            "left": torch.arange(columns - length, columns),
            "right": torch.arange(length),
            "middle": torch.randperm(columns)[:length],
        }[side]
        row[places] = 1
    return draw(*mask.shape), mask


def test_padded_rows_equal_the_rows_alone(model):
    """A whole row, and rows with padding on the left, on the right and anywhere."""
    lengths = (DOCUMENT, 3, 2 * WINDOW, 2 * WINDOW + 1)
    ids, mask = padded(lengths, DOCUMENT, ("left", "left", "right", "middle"))
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        for row, (tokens, real) in enumerate(zip(ids, mask.bool(), strict=True)):
            alone = model(tokens[real][None]).logits[0]
            assert_near(together[row, real], alone)


def test_without_the_mask_padding_is_read():
    model = build("melodi")
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


@pytest.mark.parametrize("name", FEW)
def test_mask_of_all_columns_equals_that_of_the_call(name):
    model = build(name)
    ids, mask = padded((DOCUMENT - 4, WINDOW + 3), DOCUMENT, "left")
    caches = MelodiCache(model.config), MelodiCache(model.config)
    with torch.no_grad():
        for begin, end in ((0, 13), (13, DOCUMENT)):
            piece = ids[:, begin:end]
            short = model(piece, attention_mask=mask[:, begin:end], cache=caches[0])
            full = model(piece, attention_mask=mask[:, :end], cache=caches[1])
            assert_near(short.logits, full.logits, atol=0)


@pytest.mark.parametrize("name", FEW)
def test_ids_of_padding_change_nothing(name):
    model = build(name)
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
