"""Every token is predicted once per epoch, in its document's order, in a row that carries on."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from melodi_hf.data.segments import IGNORED, Place, Segments
from melodi_hf.data.tokens import EncodedDocument

from .cases import every_case

START, PAD = 0, 1


def make_documents(random, count, longest=40):
    """Documents whose ids name their place: no two tokens of all documents are equal."""
    documents, first = [], 2
    for n in range(count):
        length = int(random.integers(1, longest))
        ids = np.arange(first, first + length, dtype=np.int32)
        documents.append(EncodedDocument(f"book {n}", ids, 1, 1))
        first += length
    return documents


def make(random, **options):
    documents = make_documents(random, int(random.integers(1, 12)))
    sizes = {
        "segment_length": int(random.integers(1, 10)),
        "num_rows": int(random.integers(1, 6)),
        "num_epochs": int(random.integers(1, 4)),
        "seed": int(random.integers(0, 100)),
    }
    return documents, Segments(documents, start_id=START, pad_id=PAD, **{**sizes, **options})


@pytest.fixture(params=range(4))
def random(request):
    return np.random.default_rng(request.param)


def targets_of(item):
    return item["shift_labels"][item["shift_labels"] != IGNORED].tolist()


def rows_of(segments, num_rows):
    return [[segments[i] for i in range(row, len(segments), num_rows)] for row in range(num_rows)]


def read_rows(segments, num_rows):
    """Read as a model does, and return (inputs, targets) of each document it was shown.

    A naive twin: it looks at rows, flags and labels, never at indices or plans.
    """
    documents = []
    for row in rows_of(segments, num_rows):
        for place, item in enumerate(row):
            if place == 0 or item["reset_memory"]:
                documents.append(([], []))
            kept = item["shift_labels"] != IGNORED
            documents[-1][0].extend(item["input_ids"][kept].tolist())
            documents[-1][1].extend(item["shift_labels"][kept].tolist())
    return [document for document in documents if document[1]]


def check_reading(documents, segments):
    """Each document is read whole, from the start token, once per epoch."""
    expected = [
        ([START, *document.ids[:-1].tolist()], document.ids.tolist()) for document in documents
    ] * segments.num_epochs
    assert sorted(read_rows(segments, segments.num_rows)) == sorted(expected)


def test_each_document_is_read_whole_once_per_epoch(random):
    documents, segments = make(random)
    check_reading(documents, segments)


def broken_items(segments, change):
    class Broken(Segments):
        def __getitem__(self, index):
            return change(index, dict(super().__getitem__(index)))

    broken = Broken.__new__(Broken)
    broken.__dict__.update(segments.__dict__)
    return broken


def never_reset(index, item):
    return {**item, "reset_memory": torch.tensor(index == 0)}


def always_reset(index, item):
    return {**item, "reset_memory": torch.tensor(True)}


def forget_the_first_token(index, item):
    labels = item["shift_labels"].clone()
    labels[0] = IGNORED
    return {**item, "shift_labels": labels}


def shift_inputs(index, item):
    return {**item, "input_ids": item["input_ids"].roll(1)}


@every_case("change", [never_reset, always_reset, forget_the_first_token, shift_inputs])
def test_the_reader_notices_what_is_broken(change):
    documents = make_documents(np.random.default_rng(0), 6)
    segments = Segments(documents, segment_length=4, num_rows=2, start_id=START, pad_id=PAD)
    check_reading(documents, segments)
    with pytest.raises(AssertionError):
        check_reading(documents, broken_items(segments, change))


def test_rows_of_another_batch_size_would_be_noticed():
    documents = make_documents(np.random.default_rng(0), 6)
    segments = Segments(documents, segment_length=4, num_rows=2, start_id=START, pad_id=PAD)
    right = {tuple(targets) for _, targets in read_rows(segments, num_rows=2)}
    assert right == {tuple(document.ids.tolist()) for document in documents}
    wrong = {tuple(targets) for _, targets in read_rows(segments, num_rows=3)}
    assert wrong != right


def test_a_small_case_by_hand():
    documents = [[10, 11, 12, 13, 14], np.array([20, 21], dtype=np.uint16), [30]]
    segments = Segments(
        documents, segment_length=2, num_rows=2, start_id=START, pad_id=PAD, seed=None
    )
    # row 0: 10 11 | 12 13 | 14 -     row 1: 20 21 | 30 - | - -
    expected = [
        ([START, 10], [10, 11], True),
        ([START, 20], [20, 21], True),
        ([11, 12], [12, 13], False),
        ([START, PAD], [30, IGNORED], True),
        ([13, PAD], [14, IGNORED], False),
        ([PAD, PAD], [IGNORED, IGNORED], True),
    ]
    items = [
        (i["input_ids"].tolist(), i["shift_labels"].tolist(), i["reset_memory"].item())
        for i in segments
    ]
    assert items == expected
    assert (segments.num_steps, len(segments)) == (3, 6)
    assert (segments.num_target_tokens, segments.num_padding_tokens) == (8, 4)
    places = [segments.document_index(i) for i in range(6)]
    assert places == [
        Place(0, 0, 0),
        Place(1, 0, 0),
        Place(0, 2, 0),
        Place(2, 0, 0),
        Place(0, 4, 0),
        None,
    ]


def test_place_says_where_the_targets_stand(random):
    documents, segments = make(random)
    for i, item in enumerate(segments):
        place = segments.document_index(i)
        if place is None:
            assert item["reset_memory"]
            assert item["input_ids"].unique().tolist() == [PAD]
            assert targets_of(item) == []
        else:
            ids = documents[place.document].ids[place.offset :][: segments.segment_length]
            assert targets_of(item) == ids.tolist()
            assert item["reset_memory"] == (place.offset == 0)


def test_counts_are_those_of_the_items(random):
    documents, segments = make(random)
    labels = torch.stack([item["shift_labels"] for item in segments])
    assert len(labels) == len(segments) == segments.num_steps * segments.num_rows
    assert segments.num_target_tokens == (labels != IGNORED).sum()
    assert segments.num_padding_tokens == (labels == IGNORED).sum()
    total = sum(len(document.ids) for document in documents)
    assert segments.num_target_tokens == total * segments.num_epochs


def test_padding_rows_stand_at_the_end_of_an_epoch_only(random):
    _, segments = make(random, num_epochs=1)
    for row in range(segments.num_rows):
        places = [segments.document_index(i) for i in range(row, len(segments), segments.num_rows)]
        filled = [place is not None for place in places]
        assert filled == sorted(filled, reverse=True)


def test_items_depend_on_nothing_but_their_index(random):
    documents, segments = make(random)
    sizes = {
        name: getattr(segments, name)
        for name in ("segment_length", "num_rows", "num_epochs", "seed", "start_id", "pad_id")
    }
    expected = list(segments)
    other = Segments(documents, **sizes)
    for i in random.permutation(len(segments)).tolist():
        for found in (other[i], other[i - len(other)], pickle.loads(pickle.dumps(other))[i]):
            assert found.keys() == expected[i].keys()
            for name, value in expected[i].items():
                torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_padding_needs_no_token_of_its_own(random):
    documents, padded = make(random, num_epochs=1)
    sizes = {name: getattr(padded, name) for name in ("segment_length", "num_rows", "seed")}
    segments = Segments(documents, start_id=START, **sizes)
    assert len(segments) == len(padded)
    for item, other in zip(segments, padded, strict=True):
        behind = other["input_ids"] == PAD
        assert (item["input_ids"][behind] == START).all()
        assert torch.equal(item["input_ids"][~behind], other["input_ids"][~behind])
        assert torch.equal(item["shift_labels"], other["shift_labels"])
    with pytest.raises(ValueError, match="start_id is None: pass a token id, such as eos"):
        Segments(documents, start_id=None, **sizes)


def order_of_epoch(segments, epoch):
    places = map(segments.document_index, range(len(segments)))
    return [place.document for place in places if place and place.epoch == epoch]


def test_epochs_and_seeds_are_in_different_orders():
    documents = make_documents(np.random.default_rng(1), 30)
    options = {"segment_length": 8, "num_rows": 2, "start_id": START, "pad_id": PAD}
    segments = Segments(documents, seed=0, num_epochs=3, **options)
    orders = [order_of_epoch(segments, epoch) for epoch in range(3)]
    orders.append(order_of_epoch(Segments(documents, seed=1, **options), 0))
    for n, order in enumerate(orders):
        assert all(order != other for other in orders[:n])
        assert sorted(set(order)) == list(range(30))
    in_order = Segments(documents, seed=None, num_epochs=2, **{**options, "num_rows": 1})
    assert [order_of_epoch(in_order, epoch) for epoch in (0, 1)] == [
        sorted(order_of_epoch(in_order, 0))
    ] * 2


def test_a_longer_run_begins_like_a_shorter_one():
    documents = make_documents(np.random.default_rng(2), 9)
    options = {"segment_length": 4, "num_rows": 2, "start_id": START, "pad_id": PAD}
    short, long = (Segments(documents, num_epochs=n, **options) for n in (1, 4))
    assert len(long) > len(short)
    assert [targets_of(item) for item in short] == [targets_of(long[i]) for i in range(len(short))]


def test_order_is_the_same_everywhere():
    """Drawn from raw bits, so that a run resumes with another version of NumPy."""
    segments = Segments(
        [[5]] * 8, segment_length=1, num_rows=1, start_id=START, pad_id=PAD, num_epochs=2
    )
    assert order_of_epoch(segments, 0) == [3, 2, 1, 6, 0, 7, 4, 5]
    assert order_of_epoch(segments, 1) == [7, 4, 5, 1, 6, 2, 0, 3]


def test_a_loader_gives_steps():
    documents = make_documents(np.random.default_rng(3), 7)
    segments = Segments(
        documents, segment_length=5, num_rows=3, start_id=START, pad_id=PAD, num_epochs=2
    )
    batches = list(DataLoader(segments, batch_size=3))
    assert len(batches) == segments.num_steps
    for step, batch in enumerate(batches):
        assert batch["input_ids"].shape == batch["shift_labels"].shape == (3, 5)
        assert batch["input_ids"].dtype == batch["shift_labels"].dtype == torch.int64
        assert batch["reset_memory"].dtype == torch.bool
        for row in range(3):
            item = segments[step * 3 + row]
            assert torch.equal(batch["shift_labels"][row], item["shift_labels"])
            assert batch["reset_memory"][row] == item["reset_memory"]


def test_ids_are_not_copied():
    ids = np.arange(5, dtype=np.uint16)
    segments = Segments([ids], segment_length=2, num_rows=1, start_id=START, pad_id=PAD)
    assert segments.ids[0] is ids
    wide = Segments([ids.astype(np.int64)], segment_length=2, num_rows=1, start_id=0, pad_id=1)
    assert wide.ids[0].dtype == np.int32


@every_case(
    ("changed", "message"),
    [
        ({"segment_length": 0}, "segment_length must be 1 or more, got 0"),
        ({"num_rows": 0}, "num_rows must be 1 or more, got 0"),
        ({"num_epochs": 0}, "num_epochs must be 1 or more, got 0"),
        ({"start_id": 100}, "start_id must be from 0 to 99, got 100"),
        ({"pad_id": -1}, "pad_id must be from 0 to 99, got -1"),
        ({"documents": []}, "at least one document"),
        ({"documents": [[3], []]}, r"document '1' has ids of shape \(0,\)"),
        ({"documents": [[[3]]]}, r"document '0' has ids of shape \(1, 1\)"),
        ({"documents": [[0.5]]}, "type float64"),
        ({"documents": [[3, 100, 7]]}, "id of document '0' must be from 0 to 99, got 100"),
        (
            {"documents": [EncodedDocument("Emma", np.array([3, -2]), 1, 1)], "vocab_size": None},
            "id of document 'Emma' must be 0 or more, got -2",
        ),
    ],
)
def test_wrong_arguments_are_refused(changed, message):
    given = {
        "documents": [[3, 99]],
        "segment_length": 2,
        "num_rows": 1,
        "start_id": START,
        "pad_id": PAD,
        "vocab_size": 100,
    }
    assert len(Segments(**given)) == 1
    with pytest.raises(ValueError, match=message):
        Segments(**{**given, **changed})


def test_an_index_beyond_the_end_is_refused():
    segments = Segments([[3, 4]], segment_length=2, num_rows=1, start_id=START, pad_id=PAD)
    assert segments[-1]["shift_labels"].tolist() == [3, 4]
    for index in (1, -2):
        with pytest.raises(IndexError, match="there are 1 segments"):
            segments[index]
