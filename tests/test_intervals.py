"""Intervals are those of documents drawn one by one, and what is compared is drawn together."""

import math

import numpy as np
import pytest

from melodi_hf.evaluation import intervals
from melodi_hf.evaluation.intervals import (
    compare,
    describe_bootstrap,
    interval,
    relative_increase,
    resample,
)

NUMBERS = np.random.default_rng(0)
TOKENS = NUMBERS.integers(50, 500, 7)
NLL = TOKENS * NUMBERS.uniform(2, 4, 7)


def drawn_one_by_one(sums):
    """For each resample, the sum over the documents drawn."""
    bits = np.random.PCG64(intervals.SEED)
    totals = []
    for _ in range(intervals.RESAMPLES):
        chosen = [int(bits.random_raw()) % len(sums) for _ in sums]
        totals.append(sum(sums[i] for i in chosen))
    return totals


def at_rank(values, part):
    """The quantile by hand: between the two values around its rank."""
    values, rank = sorted(values), part * (len(values) - 1)
    low = math.floor(rank)
    return values[low] + (rank - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def rows(nll=NLL, tokens=TOKENS):
    return [
        {"id": str(i), "tokens": int(n), "words": int(n) // 2, "bytes": 4 * int(n), "nll": float(x)}
        for i, (n, x) in enumerate(zip(tokens, nll, strict=True))
    ]


def test_resamples_are_those_drawn_one_by_one():
    positions = NUMBERS.uniform(size=(7, 3))
    drawn = resample({"nll": NLL, "tokens": TOKENS, "positions": positions})
    assert drawn["nll"] == pytest.approx(drawn_one_by_one(NLL))
    assert drawn["tokens"] == pytest.approx(drawn_one_by_one(TOKENS))
    assert drawn["positions"].shape == (intervals.RESAMPLES, 3)
    assert drawn["positions"][:, 2] == pytest.approx(drawn_one_by_one(positions[:, 2]))


def test_the_interval_holds_the_middle_of_what_was_drawn():
    drawn = resample({"nll": NLL, "tokens": TOKENS})
    nll, tokens = drawn_one_by_one(NLL), drawn_one_by_one(TOKENS)
    perplexities = [math.exp(a / b) for a, b in zip(nll, tokens, strict=True)]
    wanted = [at_rank(perplexities, 0.025), at_rank(perplexities, 0.975)]
    assert interval(np.exp(drawn["nll"] / drawn["tokens"])) == pytest.approx(wanted)
    assert wanted[0] < math.exp(NLL.sum() / TOKENS.sum()) < wanted[1]


def test_documents_in_blocks_are_drawn_as_all_at_once(monkeypatch):
    wanted = resample({"nll": NLL})["nll"]
    monkeypatch.setattr(intervals, "DRAWS_PER_BLOCK", 100)
    assert resample({"nll": NLL})["nll"].tolist() == wanted.tolist()


def test_what_is_no_number_is_left_out():
    assert interval(np.array([1.0, np.nan, 1.0, np.inf])) == [1.0, 1.0]
    assert interval(np.array([np.nan])) is None


def test_change_by_hand():
    assert relative_increase(10, 10 + 4 * math.log(1.25), 4) == pytest.approx(0.25)
    assert relative_increase(10 + 4 * math.log(2), 10, 4) == pytest.approx(-0.5)


def test_a_difference_is_as_sure_as_it_is_on_each_document():
    alike = compare(rows(), rows(NLL + 0.1 * TOKENS))
    assert alike["change"] == pytest.approx(math.expm1(0.1))
    assert alike["interval"] == pytest.approx([math.expm1(0.1)] * 2)
    drawn = resample({"nll": NLL, "tokens": TOKENS})
    low, high = interval(np.exp(drawn["nll"] / drawn["tokens"]))
    assert high / low > 1.1  # of each alone
    unlike = compare(rows(), rows(NLL + NUMBERS.uniform(0, 0.2, 7) * TOKENS))
    assert unlike["interval"][1] - unlike["interval"][0] > 0.01


def test_differences_per_word_and_byte():
    second = NLL + 0.1 * TOKENS
    by_word = compare(rows(), rows(second), "words")["change"]
    words = sum(row["words"] for row in rows())
    assert by_word == pytest.approx(math.expm1(0.1 * TOKENS.sum() / words))
    by_byte = compare(rows(), rows(second), "bytes")["change"]
    assert by_byte == pytest.approx(math.expm1(0.1 / 4))


def test_few_documents_have_no_interval():
    few = intervals.MIN_DOCUMENTS - 1
    found = compare(rows()[:few], rows()[:few])
    assert found == {"change": 0, "interval": None}
    assert compare(rows()[: few + 1], rows()[: few + 1])["interval"] == [0, 0]
    assert describe_bootstrap(few)["documents"] < describe_bootstrap(few)["fewest_documents"]


def test_other_documents_are_refused():
    with pytest.raises(ValueError, match="has 7 documents and the other 6"):
        compare(rows(), rows()[1:])
    with pytest.raises(ValueError, match=r"document '0' .* the other has '1'"):
        compare(rows()[:6], rows()[1:])
    longer = rows(tokens=TOKENS + 2)
    with pytest.raises(ValueError, match="compare models with different tokenizers by words"):
        compare(rows(), longer)
