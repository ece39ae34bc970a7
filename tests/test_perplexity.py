"""Perplexity counts every token once, whatever the cuts, and shows what the memory is worth."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from melodi_hf import (
    MelodiConfig,
    MelodiForCausalLM,
    TransformerXLConfig,
    TransformerXLForCausalLM,
)
from melodi_hf.data.tokens import EncodedDocument
from melodi_hf.evaluation.intervals import interval, resample
from melodi_hf.evaluation.perplexity import (
    evaluate_perplexity,
    list_settings,
    position_edges,
)

VOCAB, WINDOW, START = 23, 4, 0
LENGTHS = (1, 4, 5, 37, 50, 3)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "window_length": WINDOW,
}
MELODI = SIZES | {
    "num_summary_tokens": 2,
    "num_short_memory_tokens": 2,
    "long_memory_layers": (1,),
    "num_long_memory_tokens": 1,
    "long_memory_windows": 3,
}


class Stub(nn.Module):
    """Its memory is the sum of the embeddings of all that was read."""

    def __init__(self, remembers=True):
        super().__init__()
        self.config = SimpleNamespace(window_length=WINDOW, vocab_size=VOCAB)
        self.embedding, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.dropout = nn.Dropout(0.5)
        self.remembers = remembers
        self.widths = []

    def forward(self, input_ids, memory=None, reset_memory=None, **options):
        self.widths.append(input_ids.numel())
        x = self.dropout(self.embedding(input_ids)).double().cumsum(1)
        if memory is not None:
            x = x + torch.where(reset_memory[:, None, None], 0, memory)
        logits = self.head(x.float().tanh() * 3)
        return SimpleNamespace(logits=logits, memory=x[:, -1:] if self.remembers else None)


def melodi():
    return MelodiForCausalLM(MelodiConfig(**MELODI))


def melodi_without_memory():
    sizes = MELODI | {"num_short_memory_tokens": 0, "long_memory_layers": ()}
    return MelodiForCausalLM(MelodiConfig(**sizes))


def transformer_xl():
    return TransformerXLForCausalLM(TransformerXLConfig(**SIZES))


@pytest.fixture(params=[Stub, melodi, transformer_xl], ids=lambda build: build.__name__)
def model(request):
    torch.manual_seed(0)
    model = request.param()
    with torch.no_grad():  # far from uniform, so that a wrong token or memory shows
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture
def documents():
    numbers = np.random.default_rng(0)
    return [
        EncodedDocument(
            f"document {n}", numbers.integers(1, VOCAB, n, dtype=np.int32), n + 1, 3 * n
        )
        for n in LENGTHS
    ]


def evaluate(model, documents, **options):
    return evaluate_perplexity(model, documents, start_id=START, progress=False, **options)


@torch.no_grad()
def one_forward(model, inputs):
    """Logits of a text that is read alone and in one call."""
    model.eval()
    return model(torch.tensor(inputs)[None], memory=None, use_cache=False).logits[0].double()


def by_hand(model, document, emptied=False):
    """The negative log-likelihood of each token, by one forward per document, or per window."""
    inputs = [START, *document.ids[:-1].tolist()]
    length = WINDOW if emptied else len(inputs)
    pieces = [inputs[i : i + length] for i in range(0, len(inputs), length)]
    logits = torch.cat([one_forward(model, piece) for piece in pieces])
    return F.cross_entropy(logits, torch.tensor(document.ids).long(), reduction="none").numpy()


@pytest.mark.parametrize("setting", ["carried", "emptied"])
def test_every_document_scores_what_it_scores_alone(model, documents, setting):
    rows = evaluate(model, documents)["settings"][setting]["by_document"]
    for document, row in zip(documents, rows, strict=True):
        alone = by_hand(model, document, emptied=setting == "emptied").sum()
        assert row["nll"] == pytest.approx(alone, rel=1e-5)
        assert row["tokens"] == len(document.ids)
        assert (row["id"], row["words"]) == (document.id, document.num_words)


def test_the_settings_differ_where_there_is_a_past(model, documents):
    settings = evaluate(model, documents)["settings"]
    carried, emptied = (settings[name]["by_position"] for name in ("carried", "emptied"))
    assert carried[0]["nll"] == pytest.approx(emptied[0]["nll"], rel=1e-5)
    for with_past, without in zip(carried[1:], emptied[1:], strict=True):
        assert abs(with_past["nll"] / without["nll"] - 1) > 1e-3


def test_cuts_do_not_matter(model, documents):
    reference = evaluate(model, documents)
    for options in (
        {"segment_windows": 1, "num_rows": 1},
        {"segment_windows": 3, "num_rows": 2},
        {"segment_windows": 100, "num_rows": 50},
    ):
        other = evaluate(model, documents, **options)
        for name, setting in reference["settings"].items():
            rows = zip(setting["by_document"], other["settings"][name]["by_document"], strict=True)
            for ours, theirs in rows:
                assert theirs["nll"] == pytest.approx(ours["nll"], rel=1e-5)


def test_positions_are_counted_from_the_beginning_of_the_document(model, documents):
    for name, setting in evaluate(model, documents)["settings"].items():
        alone = [by_hand(model, document, name == "emptied") for document in documents]
        for row in setting["by_position"]:
            parts = [nll[row["from"] : row["to"]] for nll in alone]
            assert row["tokens"] == sum(map(len, parts))
            assert row["nll"] == pytest.approx(sum(part.sum() for part in parts), rel=1e-5)
            assert row["perplexity"] == pytest.approx(math.exp(row["nll"] / row["tokens"]))


def test_perplexities_are_quotients_of_the_same_sum(model, documents):
    result = evaluate(model, documents)
    tokens, words = sum(LENGTHS), sum(LENGTHS) + len(LENGTHS)
    for setting in result["settings"].values():
        nll = sum(row["nll"] for row in setting["by_document"])
        assert setting["nll"] == pytest.approx(nll)
        assert setting["tokens"] == tokens
        assert setting["perplexity_per_token"] == pytest.approx(math.exp(nll / tokens))
        assert setting["perplexity_per_word"] == pytest.approx(math.exp(nll / words))
        assert setting["bits_per_byte"] == pytest.approx(nll / math.log(2) / (3 * tokens))
    carried, emptied = (result["settings"][name] for name in ("carried", "emptied"))
    ratio = carried["perplexity_per_token"] / emptied["perplexity_per_token"]
    assert result["worth"] == pytest.approx(1 - ratio)
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("build", [lambda: Stub(remembers=False), melodi_without_memory])
def test_no_memory_is_worth_nothing(build, documents):
    result = evaluate(build(), documents, segment_windows=1)
    assert result["worth"] == pytest.approx(0, abs=1e-6)


def masked_melodi():
    return MelodiForCausalLM(MelodiConfig(**MELODI, mask_empty_memory=True))


FORGETTING = {
    "short_off": {"short": 0},
    "long_off": {"long": 0},
    "queue_1": {"long": 1},
    "queue_2": {"long": 2},
}


@torch.no_grad()
def by_hand_forgetting(model, document, windows):
    """The negative log-likelihoods of one document, read alone and window by window."""
    model.eval()
    inputs = torch.tensor([START, *document.ids[:-1].tolist()])
    memory, logits = None, []
    for window in inputs.split(WINDOW):
        if memory is not None:
            memory = model.base_model.forget(memory, **windows)
        out = model(window[None], memory=memory, return_memory=True, use_cache=False)
        memory = out.memory
        logits.append(out.logits[0].double())
    targets = torch.tensor(document.ids).long()
    return F.cross_entropy(torch.cat(logits), targets, reduction="none").numpy()


@pytest.mark.parametrize("build", [melodi, masked_melodi])
def test_every_setting_scores_what_its_documents_score_alone(build, documents):
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    names = ["carried", *FORGETTING]
    settings = evaluate(model, documents, settings=names, num_rows=4)["settings"]
    assert len({round(setting["nll"], 2) for setting in settings.values()}) == len(names)
    for name, windows in FORGETTING.items():
        alone = [by_hand_forgetting(model, document, windows) for document in documents]
        for nll, row in zip(alone, settings[name]["by_document"], strict=True):
            assert row["nll"] == pytest.approx(nll.sum(), rel=1e-5)
        for row in settings[name]["by_position"]:
            parts = [nll[row["from"] : row["to"]] for nll in alone]
            assert row["nll"] == pytest.approx(sum(part.sum() for part in parts), rel=1e-5)


def test_settings_that_leave_all_or_nothing(documents):
    settings = evaluate(melodi(), documents, settings=["carried", "queue_3", "queue_99"])
    carried, *whole = (setting["nll"] for setting in settings["settings"].values())
    assert whole == pytest.approx([carried] * 2, rel=1e-6)
    settings = evaluate(transformer_xl(), documents, settings=["emptied", "short_off"])["settings"]
    assert settings["short_off"]["nll"] == pytest.approx(settings["emptied"]["nll"], rel=1e-6)


def test_all_settings_are_those_that_differ():
    assert list_settings(melodi()) == ["carried", "emptied", "short_off", "long_off", "queue_1"]
    assert list_settings(transformer_xl()) == ["carried", "emptied"]
    without = MELODI | {"num_short_memory_tokens": 0, "long_memory_windows": 20}
    long_alone = MelodiForCausalLM(MelodiConfig(**without))
    assert list_settings(long_alone) == ["carried", "emptied", "queue_1", "queue_4", "queue_16"]


def test_every_number_has_its_interval(documents):
    result = evaluate(melodi(), documents, settings=["carried", "emptied", "long_off"])
    assert result["bootstrap"]["documents"] == len(documents)
    rows = {name: each["by_document"] for name, each in result["settings"].items()}
    sums = {name: [row["nll"] for row in each] for name, each in rows.items()}
    sums |= {unit: [row[unit] for row in rows["carried"]] for unit in ("tokens", "words", "bytes")}
    drawn = resample(sums)
    for name, setting in result["settings"].items():
        nll = drawn[name]
        wanted = {
            "perplexity_per_token": np.exp(nll / drawn["tokens"]),
            "perplexity_per_word": np.exp(nll / drawn["words"]),
            "bits_per_byte": nll / math.log(2) / drawn["bytes"],
        }
        if name != "emptied":
            wanted["worth"] = 1 - np.exp((nll - drawn["emptied"]) / drawn["tokens"])
        if name != "carried":
            wanted["above_carried"] = np.exp((nll - drawn["carried"]) / drawn["tokens"]) - 1
        assert setting["intervals"].keys() == wanted.keys()
        for key, values in wanted.items():
            low, high = setting["intervals"][key]
            assert [low, high] == pytest.approx(interval(values), abs=1e-9)
            assert low <= setting[key] <= high


def test_an_interval_needs_documents_that_reach_so_far(documents):
    reaching = [sum(n > low for n in LENGTHS) for low in (0, 4, 8, 16, 32)]
    assert reaching == [6, 3, 2, 2, 2]
    setting = evaluate(Stub(), documents)["settings"]["carried"]
    first, *others = setting["by_position"]
    assert first["intervals"].keys() == {"perplexity", "worth"}
    low, high = first["intervals"]["perplexity"]
    assert low < first["perplexity"] < high
    assert all(row["intervals"] == {} for row in others)
    assert all(0 < abs(row["worth"]) < 1 for row in others)
    few = evaluate(Stub(), documents[:4])["settings"]["carried"]
    assert few["intervals"] == {}


def test_one_setting_has_no_worth(documents):
    result = evaluate(Stub(), documents, settings=["emptied"])
    assert list(result["settings"]) == ["emptied"]
    assert result["worth"] is None


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_inside_and_as_it_was_outside(documents, training):
    model = Stub().train(training)
    assert evaluate(model, documents)["worth"] == evaluate(model, documents)["worth"]
    assert model.training is training
    assert model.dropout.training is training
    model.forward = None
    with pytest.raises(TypeError):
        evaluate(model, documents)
    assert model.dropout.training is training


def test_no_more_than_a_segment_per_row_is_read_at_once(documents):
    model = Stub()
    evaluate(model, documents, segment_windows=2, num_rows=3)
    assert max(model.widths) <= 2 * WINDOW * 3


def test_running_numbers_are_shown_only_if_wanted(documents, capsys):
    evaluate(Stub(), documents)
    assert capsys.readouterr().err == ""
    evaluate_perplexity(Stub(), documents, start_id=START)
    shown = capsys.readouterr().err
    assert "carried" in shown
    assert "emptied" in shown
    assert "tok/s" in shown
    assert "perplexity" in shown


def test_edges_begin_with_the_window_and_double():
    assert position_edges(512, 4096).tolist() == [0, 512, 1024, 2048, 4096]
    assert position_edges(512, 4097).tolist() == [0, 512, 1024, 2048, 4096, 8192]
    assert position_edges(512, 3).tolist() == [0, 512]


@pytest.mark.parametrize(
    ("ids", "start_id", "message"),
    [
        ([], START, "'bad' is empty"),
        ([1, VOCAB], START, f"'bad' has ids from 1 to {VOCAB}, but .* 0 to {VOCAB - 1}"),
        ([-1, 1], START, "'bad' has ids from -1 to 1"),
        ([1], VOCAB, f"start_id {VOCAB} is outside .* {VOCAB}"),
    ],
)
def test_unreadable_documents_are_named(documents, ids, start_id, message):
    bad = EncodedDocument("bad", np.array(ids, dtype=np.int32), 1, 1)
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(Stub(), [*documents, bad], start_id=start_id, progress=False)


def test_nothing_to_score_is_refused(documents):
    with pytest.raises(ValueError, match="documents is empty"):
        evaluate(Stub(), [])
    with pytest.raises(ValueError, match=r"'forgotten': choose from .*queue_N"):
        evaluate(Stub(), documents, settings=["forgotten"])
    with pytest.raises(ValueError, match="'queue_0': choose from"):
        evaluate(melodi(), documents, settings=["queue_0"])
    with pytest.raises(ValueError, match="settings is empty"):
        evaluate(melodi(), documents, settings=[])
    with pytest.raises(ValueError, match="'long_off' needs a long-term memory"):
        evaluate(transformer_xl(), documents, settings=["carried", "long_off"])
