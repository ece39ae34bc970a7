"""Documents are encoded once, found again at once, and never taken for whole when they are not."""

import errno
import itertools
import json
import os
import resource
import shutil
import threading
import time

import numpy as np
import pytest

from melodi_hf.data import prepared, tokens
from melodi_hf.data.prepared import Prepared, prepare_documents
from melodi_hf.data.report import Report
from melodi_hf.data.segments import Segments
from melodi_hf.data.text import Source, read_documents, standard_library_documents
from melodi_hf.data.tokens import encode_documents, train_tokenizer

LENGTHS = [300, 20, 1, 700, 150, 90, 400, 2]  # in words


def words(length):
    return " ".join(f"word{number % 17}" for number in range(length))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(standard_library_documents(limit=2), 300, progress=False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(prepared.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 500)  # several batches
    return tmp_path / "cache"


@pytest.fixture
def books(tmp_path):
    """Eight documents, and four lines that are none: the last line is one of them."""
    lines = [json.dumps({"id": f"é{n}", "text": words(k)}) for n, k in enumerate(LENGTHS)]
    lines[2:2] = ["not JSON"]
    lines[5:5] = ['{"text": ""}', lines[0]]
    (tmp_path / "books.jsonl").write_text("\n".join([*lines, "{"]))
    return tmp_path / "books.jsonl"


def contents(documents):
    return [(d.id, d.ids.tolist(), d.num_words, d.num_bytes) for d in documents]


def the_folder(cache):
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    return folder


def state(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_prepared_documents_are_those_encoded_in_memory(books, tokenizer, cache):
    report = Report()
    expected = encode_documents(read_documents(books).documents(report), tokenizer)
    found = prepare_documents(read_documents(books), tokenizer)
    assert contents(found) == contents(expected)
    assert found[0].ids.dtype == np.uint16
    assert len(found) == 8
    assert contents(found[2:4]) == contents(expected[2:4])
    assert found.num_tokens == sum(len(document.ids) for document in expected)
    assert found.report.as_dict() == report.as_dict()
    assert report.counts == {"not JSON": 2, "empty": 1, "repeated": 1}
    sizes = {"segment_length": 64, "num_rows": 3, "start_id": 0, "pad_id": 1, "vocab_size": 300}
    for one, other in zip(Segments(found, **sizes), Segments(expected, **sizes), strict=True):
        for name, tensor in one.items():
            assert tensor.dtype == other[name].dtype
            assert tensor.equal(other[name])


def test_large_vocabularies_take_four_bytes(books, tokenizer, cache, monkeypatch):
    expected = contents(prepare_documents(read_documents(books), tokenizer))
    shutil.rmtree(cache)
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: 2**16 + 1)
    found = prepare_documents(read_documents(books), tokenizer)
    assert found[0].ids.dtype == np.uint32
    assert contents(found) == expected


def test_the_second_time_nothing_is_read(books, tokenizer, cache, monkeypatch):
    first = prepare_documents(read_documents(books), tokenizer)
    monkeypatch.delattr(Source, "read")
    monkeypatch.delattr(prepared, "batch_encoder")
    again = prepare_documents(read_documents(books), tokenizer)
    assert contents(again) == contents(first)
    assert again.as_dict() == first.as_dict()
    assert again.report.counts == {"not JSON": 2, "empty": 1, "repeated": 1}


def test_whatever_changes_the_ids_is_prepared_anew(books, tokenizer, cache):
    def names():
        return {path.name for path in cache.iterdir() if path.is_dir()}

    other = train_tokenizer(standard_library_documents(limit=1), 300, progress=False)
    changes = [
        lambda: prepare_documents(read_documents(books), tokenizer),
        lambda: prepare_documents(read_documents(books), other),
        lambda: prepare_documents(read_documents(books, limit=2), tokenizer),
        lambda: prepare_documents(read_documents(books, min_tokens=9), tokenizer),
        lambda: (os.utime(books, (1, 1)), prepare_documents(read_documents(books), tokenizer)),
        lambda: (
            books.write_text('{"text": "changed"}'),
            os.utime(books, (1, 1)),
            prepare_documents(read_documents(books), tokenizer),
        ),
    ]
    for number, change in enumerate(changes, start=1):
        change()
        assert len(names()) == number
        tokenizer.backend_tokenizer.enable_truncation(4)  # which is not used
    tokenizer.backend_tokenizer.no_truncation()
    assert contents(prepare_documents(read_documents(books), tokenizer))[0][0] == "0"


def test_fingerprint_tells_the_same_ids_anywhere(books, tokenizer, cache, tmp_path):
    def fingerprint(path):
        return prepare_documents(read_documents(path), tokenizer).as_dict()["fingerprint"]

    copy = tmp_path / "copy.jsonl"
    shutil.copy(books, copy)
    assert fingerprint(copy) == fingerprint(books)
    copy.write_text(copy.read_text().replace("word16", "word15", 1))
    assert fingerprint(copy) != fingerprint(books)


def test_shorter_documents_are_left_out_and_not_counted_by_the_limit(
    books, tokenizer, cache, monkeypatch
):
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 10**6)  # all of them, if nothing is done
    whole = prepare_documents(read_documents(books), tokenizer)
    lengths = [len(document.ids) for document in whole]
    least = sorted(lengths)[3] + 1  # which the fourth has in bytes, but not in tokens
    long = [document for document in whole if len(document.ids) >= least]
    found = prepare_documents(read_documents(books, min_tokens=least), tokenizer)
    assert contents(found) == contents(long)
    assert found.report.counts[f"shorter than {least:,} tokens"] == 4
    three = prepare_documents(read_documents(books, min_tokens=least, limit=3), tokenizer)
    assert contents(three) == contents(long[:3])
    # Nothing behind the third is read: the line that is no JSON there is not told of.
    assert three.report.counts["not JSON"] == 1


# Stopped


class Stop(BaseException):
    """What ends a process."""


def stopped_after(batches, monkeypatch):
    """Let so many batches be encoded, and stop in the next."""
    counter = itertools.count()

    def encoder(tokenizer, right=tokens.batch_encoder):
        encode = right(tokenizer)

        def stop(texts):
            if next(counter) == batches:
                raise Stop
            return encode(texts)

        return stop

    monkeypatch.setattr(prepared, "batch_encoder", encoder)


@pytest.mark.parametrize("batches", range(6))
def test_stopped_anywhere_it_goes_on(books, tokenizer, cache, monkeypatch, batches):
    expected = contents(prepare_documents(read_documents(books), tokenizer))
    whole = state(the_folder(cache))
    shutil.rmtree(cache)
    with monkeypatch.context() as patch:
        stopped_after(batches, patch)
        with pytest.raises(Stop):
            prepare_documents(read_documents(books), tokenizer)
    folder = the_folder(cache)
    assert prepared.read_manifest(folder) is None
    # What a process that is killed may leave beyond: ids of which the journal does not know, and
    # half of a line.
    with (
        (folder / prepared.IDS_FILE).open("ab") as ids,
        (folder / prepared.JOURNAL_FILE).open("ab") as lines,
    ):
        ids.write(b"12345")
        lines.write(b'{"documents": [["a')
    encoded = []

    def encoder(tokenizer, right=tokens.batch_encoder):
        encode = right(tokenizer)
        return lambda texts: (encoded.extend(texts), encode(texts))[1]

    monkeypatch.setattr(prepared, "batch_encoder", encoder)
    assert contents(prepare_documents(read_documents(books), tokenizer)) == expected
    assert state(folder) == whole
    journal = whole[prepared.JOURNAL_FILE].splitlines()
    done = sum(len(json.loads(line)["documents"]) for line in journal[:batches])
    assert len(encoded) in (8 - done, 9 - done)  # and the repeated one


def test_a_folder_that_lost_a_part_is_mended(books, tokenizer, cache):
    expected = contents(prepare_documents(read_documents(books), tokenizer))
    folder = the_folder(cache)
    whole = state(folder)
    for size in (1001, 0):
        os.truncate(folder / prepared.IDS_FILE, size)
        assert contents(prepare_documents(read_documents(books), tokenizer)) == expected
        assert state(folder) == whole


def test_of_several_at_a_time_one_prepares(books, tokenizer, cache, monkeypatch, capfd):
    calls, results = [], []

    def slowly(*args, right=prepared.write_prepared):
        calls.append(args)
        time.sleep(0.5)
        return right(*args)

    monkeypatch.setattr(prepared, "write_prepared", slowly)
    threads = [
        threading.Thread(
            target=lambda: results.append(prepare_documents(read_documents(books), tokenizer))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(results) == 3
    assert all(contents(found) == contents(results[0]) for found in results)
    told = capfd.readouterr().err
    assert told.count("waiting for another process that prepares these documents") == 2


# Where


def test_disk_that_is_full_is_told_and_gone_on_with(books, tokenizer, cache):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(
            OSError, match=rf"cannot write .* {cache} .* or set {prepared.CACHE_VARIABLE}"
        ) as full:
            prepare_documents(read_documents(books), tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert full.value.errno == errno.EFBIG
    there = (the_folder(cache) / prepared.JOURNAL_FILE).read_bytes()
    assert there.count(b"\n") >= 1
    expected = encode_documents(read_documents(books).documents(Report()), tokenizer)
    assert contents(prepare_documents(read_documents(books), tokenizer)) == contents(expected)
    assert (
        (the_folder(cache) / prepared.JOURNAL_FILE)
        .read_bytes()
        .startswith(there.rsplit(b"\n", 1)[0])
    )


def test_a_folder_that_was_named_and_cannot_be_written_to_is_refused(books, tokenizer, monkeypatch):
    monkeypatch.setenv(prepared.CACHE_VARIABLE, str(books / "below a file"))
    with pytest.raises(
        OSError, match=rf"cannot be written to .*set {prepared.CACHE_VARIABLE} to another folder"
    ):
        prepare_documents(read_documents(books), tokenizer)


def test_a_folder_that_nobody_named_is_replaced(books, tokenizer, monkeypatch, capfd, tmp_path):
    expected = contents(prepare_documents(read_documents(books), tokenizer))
    monkeypatch.delenv(prepared.CACHE_VARIABLE)
    monkeypatch.setattr(prepared, "HF_HOME", str(books / "below a file"))
    monkeypatch.setattr(prepared.tempfile, "tempdir", str(tmp_path))
    assert contents(prepare_documents(read_documents(books), tokenizer)) == expected
    assert "encoded again each time; set MELODI_HF_CACHE" in capfd.readouterr().err
    monkeypatch.setattr(prepared, "HF_HOME", str(tmp_path / "home"))
    prepare_documents(read_documents(books), tokenizer)
    assert capfd.readouterr().err == ""
    assert the_folder(tmp_path / "home" / "melodi_hf")


def test_a_tokenizer_written_in_python_is_not_trusted_to_be_the_same(books, cache):
    from transformers import ByT5Tokenizer

    found = prepare_documents(read_documents(books), ByT5Tokenizer())
    assert found[2].ids.tolist() == [byte + 3 for byte in b"word0"]
    assert not cache.exists()


def test_no_document_left_is_refused_and_leaves_nothing_whole(books, tokenizer, cache):
    for _ in range(2):
        with pytest.raises(ValueError, match=r"has no documents \(.*9 shorter than 99,999 tokens"):
            prepare_documents(read_documents(books, min_tokens=99_999), tokenizer)
    books.write_text('{"body": "x"}')
    with pytest.raises(ValueError, match="as text_field"):
        prepare_documents(read_documents(books), tokenizer)


def test_opening_takes_no_copy_of_the_ids(books, tokenizer, cache):
    found = prepare_documents(read_documents(books), tokenizer)
    assert isinstance(found, Prepared)
    assert np.shares_memory(found[0].ids, found.ids)
    assert not found.ids.flags.writeable
    segments = Segments(found, segment_length=8, num_rows=2, start_id=0, pad_id=1)
    assert all(np.shares_memory(ids, found.ids) for ids in segments.ids)
