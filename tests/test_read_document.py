"""A document is read once, from any source and however it comes in parts, in constant memory."""

import copy
import gc
import io
import json
import random
import subprocess
import sys
import weakref
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast

from melodi_hf import MelodiCache
from melodi_hf.data.text import Document
from melodi_hf.data.tokens import train_tokenizer
from melodi_hf.models import reading

from .cases import every_case
from .models import (
    DOCUMENT,
    FEW,
    VOCABULARY,
    WINDOW,
    assert_differ,
    assert_equal,
    assert_near,
    build,
    draw,
    tensors_of,
    tokens_read,
)

ROOT = Path(__file__).resolve().parents[1]

# Words of all kinds, runs of blanks, several line ends, letters of one to four bytes.
TEXT = (
    'The quick brown fox -- isn\'t it? -- said: "no";  3141592653 times.\r\n\r\n'
    "\tdef f(x):\n        return x **  2\n\n\n日本語のテキスト、😀😀 e\u0301lan  ﬁn </s> <pad> . "
) * 40


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([Document("a", TEXT)], 400, progress=False)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 300)
    monkeypatch.setattr(reading, "CONTEXT", 80)


def parts_of(whole, longest, seed=0):
    """A text or a row of ids in parts of random lengths."""
    generator, begin = random.Random(seed), 0
    while begin < len(whole):
        end = begin + generator.randint(1, longest)
        yield whole[begin:end]
        begin = end


def next_logits(model, cache, ids):
    with torch.no_grad():
        return model(ids, cache=cache).logits


def test_the_name_is_free():
    assert not hasattr(PreTrainedModel, "read_document")
    assert not hasattr(GenerationMixin, "read_document")


# Cuts and sources


@pytest.mark.parametrize("longest", [3, 2 * WINDOW + 3])
@pytest.mark.parametrize("name", FEW)
def test_any_parts_in_any_pieces_give_the_memory_of_one_call(name, longest):
    model = build(name)
    ids, more = draw(2, DOCUMENT), draw(2, 9)
    with torch.no_grad():
        wanted = model(torch.cat((ids, more), dim=1)).logits[:, -9:]
        alone = model(more).logits
    for piece_length in (1, WINDOW - 1, 2 * WINDOW, None):
        parts = (part.T for part in parts_of(ids.T, longest))
        cache = model.read_document(parts, piece_length=piece_length)
        assert cache.get_seq_length() == ids.shape[1]
        found = next_logits(model, cache, more)
        assert_near(found, wanted)
        assert_differ(found, alone)


SOURCES = {
    "tensor": lambda ids: ids,
    "rows": lambda ids: ids[None],
    "int32": lambda ids: ids.int(),
    "list": lambda ids: ids.tolist(),
    "tuple": lambda ids: tuple(ids.tolist()),
    "array": lambda ids: ids.numpy().astype("uint16"),
    "single tensors in a list": lambda ids: list(ids),
    "encoding": lambda ids: {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)},
    "integers": lambda ids: iter(ids.tolist()),
    "integers of numpy": lambda ids: iter(ids.numpy()),
    "single tensors": lambda ids: iter(ids),
    "lists": lambda ids: iter([ids[:5].tolist(), [], ids[5:].tolist()]),
    "split": lambda ids: ids[None].split(4, dim=1),
    "mixed": lambda ids: chain(ids[:3].tolist(), [ids[3:9], ids[None, 9:12]], ids[12:].tolist()),
}


def test_all_sources_give_the_same_memory():
    model, ids, more = build("melodi"), draw(DOCUMENT), draw(1, 5)
    wanted = next_logits(model, model.read_document(ids), more)
    for source in SOURCES.values():
        assert_equal(next_logits(model, model.read_document(source(ids)), more), wanted)


def test_ids_in_a_file_are_read(tmp_path):
    """A mapped array that must not be written to, as ids of large corpora are kept."""
    model, ids = build("melodi"), draw(DOCUMENT)
    ids.numpy().astype("uint16").tofile(tmp_path / "ids.bin")
    mapped = np.memmap(tmp_path / "ids.bin", dtype="uint16", mode="r")
    cache = model.read_document(mapped)
    more = draw(1, 3)
    wanted = next_logits(model, model.read_document(ids), more)
    assert_equal(next_logits(model, cache, more), wanted)


@pytest.mark.parametrize("name", FEW)
def test_reading_goes_on_from_an_earlier_cache(name):
    model, ids, more = build(name), draw(1, DOCUMENT), draw(1, 5)
    wanted = next_logits(model, model.read_document(ids), more)
    cache = model.read_document(ids[:, :11])
    assert model.read_document(ids[:, 11:], cache=cache) is cache
    assert_near(next_logits(model, cache, more), wanted)


@pytest.mark.parametrize("name", FEW)
def test_generation_goes_on_from_what_was_read(name):
    model, ids = build(name), draw(1, DOCUMENT)
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False)[:, DOCUMENT:]
    cache = model.read_document(ids[:, :-1])
    mask = torch.ones_like(ids)
    found = model.generate(
        ids[:, -1:], attention_mask=mask, cache=cache, max_new_tokens=6, do_sample=False
    )
    assert_equal(found[:, 1:], wanted)


# Several documents


PADDED = {  # mask of a batch of two rows, 1 at tokens
    "left": lambda: torch.arange(DOCUMENT) >= torch.tensor([[0], [WINDOW + 3]]),
    "right": lambda: torch.arange(DOCUMENT) < torch.tensor([[WINDOW + 3], [DOCUMENT]]),
    "in the middle": lambda: (torch.arange(DOCUMENT) - torch.tensor([[9], [14]])).abs() > 5,
    "both ends": lambda: (torch.arange(DOCUMENT) - torch.tensor([[9], [14]])).abs() < 5,
    "none": lambda: torch.ones(2, DOCUMENT, dtype=torch.bool),
}


def assert_rows_are_as_alone(model, cache, documents):
    """documents: ids T."""
    assert tokens_read(cache).tolist() == [len(ids) for ids in documents]
    following = draw(len(documents), WINDOW + 2)
    found = next_logits(model, cache.clone(), following)
    for row, ids in enumerate(documents):
        wanted = next_logits(model, model.read_document(ids), following[row : row + 1])
        assert_near(found[row : row + 1], wanted)


@pytest.mark.parametrize(
    ("name", "padding"),
    [("melodi", padding) for padding in PADDED] + [(name, "both ends") for name in FEW[1:]],
)
def test_rows_of_a_padded_batch_are_read_as_if_alone(name, padding):
    model, ids, mask = build(name), draw(2, DOCUMENT), PADDED[padding]()
    documents = [row[real] for row, real in zip(ids, mask, strict=True)]
    padded = ids.masked_fill(~mask, 0)
    for kind in (torch.Tensor.bool, torch.Tensor.long, torch.Tensor.numpy, torch.Tensor.tolist):
        for length in (5, None):
            cache = model.read_document(padded, attention_mask=kind(mask), piece_length=length)
            assert cache.get_seq_length() == DOCUMENT
        assert_rows_are_as_alone(model, cache, documents)
    encoding = {"input_ids": padded, "attention_mask": mask.long()}
    assert_rows_are_as_alone(model, model.read_document(encoding), documents)
    encoding = {key: value.tolist() for key, value in encoding.items()}
    assert_rows_are_as_alone(model, model.read_document(encoding), documents)


@pytest.mark.parametrize(
    ("name", "piece_length"), [("melodi", 3), ("melodi", None), *((n, 2 * WINDOW) for n in FEW)]
)
def test_documents_of_different_lengths_are_read_as_if_alone(name, piece_length):
    model = build(name)
    documents = [draw(n) for n in (DOCUMENT, 1, 3 * WINDOW, WINDOW + 3)]
    kinds = [
        list(documents),
        [ids.tolist() for ids in documents],
        [ids[None] for ids in documents],
        [documents[0].numpy(), documents[1].tolist(), documents[2].split(5), iter(documents[3])],
        {"input_ids": [ids.tolist() for ids in documents]},
        {
            "input_ids": [[0, *ids.tolist()] for ids in documents],
            "attention_mask": [[0] + [1] * len(ids) for ids in documents],
        },
    ]
    for source in kinds:
        cache = model.read_document(source, piece_length=piece_length)
        assert_rows_are_as_alone(model, cache, documents)
    more = [draw(n) for n in (2, WINDOW, 0, 3)]
    model.read_document(more, cache=cache, piece_length=piece_length)
    whole = [torch.cat(pair) for pair in zip(documents, more, strict=True)]
    assert_rows_are_as_alone(model, cache, whole)


def test_texts_are_several_documents(tokenizer, small_blocks, tmp_path):
    model = text_model(tokenizer)
    texts = [TEXT[:900], "quick", TEXT[40:300]]
    ids = [torch.tensor(ids_read(model, text, tokenizer=tokenizer)) for text in texts]
    file = tmp_path / "third"
    file.write_text(texts[2], encoding="utf-8", newline="")
    for source in (texts, [texts[0], parts_of(texts[1], 2), file]):
        cache = model.read_document(source, tokenizer=tokenizer, piece_length=50)
        assert_rows_are_as_alone(model, cache, ids)
    encoding = tokenizer(texts)
    ids = [torch.tensor(row) for row in encoding["input_ids"]]
    assert_rows_are_as_alone(model, model.read_document(encoding), ids)
    encoding = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    assert_rows_are_as_alone(model, model.read_document(encoding), ids)


def test_generation_goes_on_from_a_padded_batch():
    """The cache has the columns of the batch, so that all ids and their mask go on from it."""
    model, ids, mask = build("melodi"), draw(2, DOCUMENT), PADDED["right"]().long()
    whole, question = torch.cat((ids, draw(2, 3)), dim=1), torch.ones(2, 3, dtype=torch.long)
    how = {"attention_mask": torch.cat((mask, question), dim=1), "max_new_tokens": 5}
    cache = model.read_document(ids, attention_mask=mask)
    assert_equal(model.generate(whole, cache=cache, **how), model.generate(whole, **how))


def test_several_documents_are_read_in_constant_memory():
    model, most, alive = build("melodi"), 0, set()

    def parts(parts_left, row):
        nonlocal most
        for i in range(parts_left):
            ids = draw(3 * WINDOW)
            alive.add((row, i))
            weakref.finalize(ids, alive.discard, (row, i))
            yield ids
            del ids
            most = max(most, len(alive))

    model.read_document([parts(50, 0), parts(5, 1)], piece_length=WINDOW)
    assert most <= 6


@every_case(
    ("source", "mask", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), r"shape \(2, 4\) and the ids \(2, 3\)"),
        (draw(2, 3), torch.full((2, 3), 0.5), "numbers other than 0 and 1"),
        (draw(2, 3), torch.tensor([[1, 0, 0], [0, 0, 0]]), "no token in row 1"),
        ([[1, 2], [3]], [[1, 1], [1]], "no batch of integers"),
        ("a word", [1], "a str that is no batch of integers"),
        (iter([1]), [1], "no batch of integers"),
    ],
)
def test_masks_that_do_not_fit(source, mask, message):
    with pytest.raises(ValueError, match=message):
        build("melodi").read_document(source, attention_mask=mask)


# Text


def trained(pre_tokenizer, normalizer=None):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    # Of a part of the text, so that other letters are unknown.
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT[:100]], trainer)
    return tokenizer


BLANK = "\u2581"
WORDS_AND_LINE_ENDS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZERS = {
    "bytes": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "bytes after a blank": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "punctuation with line ends": lambda: trained(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS_AND_LINE_ENDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    ),
    "blanks as letters": lambda: trained(pre_tokenizers.Metaspace(prepend_scheme="always")),
    "normalised": lambda: trained(
        pre_tokenizers.Split(Regex(f"{BLANK}+[^{BLANK}]*"), "isolated"),
        normalizers.Sequence(
            [
                normalizers.NFKC(),
                normalizers.Replace(Regex(" {2,}"), " "),
                normalizers.Prepend(BLANK),
                normalizers.Replace(" ", BLANK),
            ]
        ),
    ),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_of_a_text_in_parts_are_those_of_the_whole(kind, small_blocks):
    tokenizer = TOKENIZERS[kind]()
    whole = tokenizer.encode(TEXT).ids
    for longest in (1, 7, 1000):
        parts = parts_of(TEXT, longest)
        assert [i for ids in reading.text_ids(parts, tokenizer) for i in ids] == whole
    # Each part alone would give others:
    assert [i for part in parts_of(TEXT, 7) for i in tokenizer.encode(part).ids] != whole


@every_case("letters", ["木", "x", " ", "\n", "日本"])
def test_a_text_without_words_is_read_in_blocks(letters, small_blocks):
    tokenizer = TOKENIZERS["blanks as letters"]()
    blocks = list(reading.text_ids(repeat(letters * 50, 200), tokenizer))
    assert len(blocks) > 10
    assert max(map(len, blocks)) < 500


def text_model(tokenizer, **changes):
    sizes = {"vocab_size": len(tokenizer), "window_length": 64, "bos_token_id": 0}
    return build("melodi", **sizes | changes)


def ids_read(model, *args, **kwargs):
    """What the model was given."""
    given = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, x: given.append(x[0]))
    try:
        model.read_document(*args, **kwargs)
    finally:
        hook.remove()
    assert all(ids.shape[0] == 1 for ids in given)
    return torch.cat(given, dim=1)[0].tolist()


def test_a_text_file_is_read_behind_the_start_token(tokenizer, tmp_path, small_blocks):
    file, model = tmp_path / "book.txt", text_model(tokenizer)
    file.write_text(TEXT, encoding="utf-8", newline="")
    wanted = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert wanted[0] != 0
    with file.open(encoding="utf-8", newline="") as lines:
        assert ids_read(model, lines, tokenizer=tokenizer) == [0, *wanted]
    for source in (TEXT, file, [TEXT], [file]):
        assert ids_read(model, source, tokenizer=tokenizer) == [0, *wanted]
    file.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())  # a mark of the encoding, which is no text
    assert ids_read(model, file, tokenizer=tokenizer) == [0, *wanted]
    bare = {"tokenizer": tokenizer, "add_special_tokens": False}
    assert ids_read(model, TEXT, **bare) == wanted
    unstarted = text_model(tokenizer, bos_token_id=None)
    assert ids_read(unstarted, TEXT, tokenizer=tokenizer) == wanted


def test_files_that_cannot_be_read(tokenizer, tmp_path):
    model, file = text_model(tokenizer), tmp_path / "latin.txt"
    file.write_bytes(TEXT[:80].encode() + b"na\xefve \n")
    with pytest.raises(ValueError, match=r"latin.txt is not text in UTF-8 .*encoding=\.\.\."):
        model.read_document(file, tokenizer=tokenizer)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        model.read_document(tmp_path / "nowhere", tokenizer=tokenizer)
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        model.read_document(tmp_path, tokenizer=tokenizer)
    file.write_text(TEXT)
    with pytest.raises(ValueError, match=r"gives a str, 'The quick brown.*tokenizer= and text"):
        model.read_document(file)


@pytest.mark.parametrize("split", [False, True])
def test_special_tokens_in_a_text_are_read_as_the_tokenizer_reads_them(
    tokenizer, small_blocks, split
):
    tokenizer, rng = copy.deepcopy(tokenizer), random.Random(0)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<a longer one>"]})
    tokenizer.split_special_tokens = split
    model = text_model(tokenizer)
    words = ["quick", " brown", "\n", " ", "</s>", "<turn>", "<a longer one>", "<", "turn>"]
    text = "".join(rng.choices(words, k=600))
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    special = {1, len(tokenizer) - 1, len(tokenizer) - 2}
    assert (len(special & set(wanted)) > 1) is not split
    for longest in (1, 7, 1000):
        assert ids_read(model, parts_of(text, longest), tokenizer=tokenizer) == [0, *wanted]


def test_a_text_may_bring_its_start_token(tokenizer):
    start, word = tokenizer.convert_ids_to_tokens(0), "quick"
    model, wanted = text_model(tokenizer), tokenizer(word, add_special_tokens=False)["input_ids"]
    assert ids_read(model, start + word, tokenizer=tokenizer) == [0, *wanted]
    assert ids_read(model, iter([start, word]), tokenizer=tokenizer) == [0, *wanted]


def test_half_of_a_surrogate_pair_is_refused(tokenizer):
    model = text_model(tokenizer)
    for source in ("quick \udc80", iter(["quick ", "\ud800", " brown"])):
        with pytest.raises(ValueError, match=r"after 'quick ', half of a surrogate pair"):
            model.read_document(source, tokenizer=tokenizer)


def test_only_the_beginning_of_a_document_has_a_start_token(tokenizer):
    model, word = text_model(tokenizer), "quick"
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    cache = model.read_document([5])
    assert ids_read(model, word, tokenizer=tokenizer, cache=cache) == ids
    assert ids_read(model, iter([7, word, 8, word]), tokenizer=tokenizer) == [7, *ids, 8, *ids]
    assert ids_read(model, iter(["", word, "", [8], word]), tokenizer=tokenizer) == [
        0,
        *ids,
        8,
        *ids,
    ]


def test_what_the_tokenizer_puts_before_texts_is_read_once(tokenizer, small_blocks):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    around = [("</s>", 0), ("<pad>", 1)]
    backend.post_processor = processors.TemplateProcessing("<pad> $A </s>", None, around)
    backend.enable_truncation(4)
    special = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "quick brown fox " * 100
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids_read(text_model(tokenizer), text, tokenizer=special) == [1, *wanted]
    assert special.backend_tokenizer.truncation is not None  # the user's is left as it was


# Memory


def test_nothing_of_the_source_is_kept():
    model, alive, most = build("melodi"), set(), 0

    def parts():
        nonlocal most
        for i in range(50):
            ids = draw(3 * WINDOW)
            alive.add(i)
            weakref.finalize(ids, alive.discard, i)
            yield ids
            del ids
            most = max(most, len(alive))

    model.read_document(parts(), piece_length=WINDOW)
    assert most <= 3
    assert len(alive) <= 1


def test_the_source_is_asked_only_for_what_is_read_next():
    model, cache = build("melodi"), MelodiCache(build("melodi").config)

    def parts():
        for given in range(0, 10 * WINDOW, WINDOW):
            assert given - cache.get_seq_length() <= 2 * WINDOW
            yield draw(WINDOW)

    model.read_document(parts(), cache=cache, piece_length=2 * WINDOW)
    assert cache.get_seq_length() == 10 * WINDOW


def test_no_graph_is_kept_and_the_cache_goes_on_to_be_written():
    model = build("melodi")
    cache = model.read_document(draw(1, DOCUMENT))
    held = tensors_of(cache)
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in held)
    model(draw(1, 3), cache=cache).logits.sum().backward()


def peaks(tmp_path, *tokens):
    """Megabytes that reads of so many tokens need, each in a process of its own."""
    file = tmp_path / "peaks.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "read_million.py"), "--tiny"]
    subprocess.run([*script, "--output", str(file), "--tokens", *map(str, tokens)], check=True)
    return {row["tokens"]: row["peak MB"] for row in json.loads(file.read_text())["rows"]}


def test_a_longer_read_needs_no_more_memory(tmp_path):
    found = peaks(tmp_path, 2_000, 30_000)
    assert found[30_000] < found[2_000] + 2


@pytest.mark.slow
def test_a_read_of_a_million_tokens_needs_the_memory_of_one_of_ten_thousand(tmp_path):
    found = peaks(tmp_path, 10_000, 1_000_000)
    assert found[1_000_000] < found[10_000] + 2  # its ids alone are 8 MB


def read_and_reset(model, rows, times):
    """Read one token per row into a cache, empty it, `times` times; bytes and objects gained."""
    cache, ids = MelodiCache(model.config), draw(rows, 1)

    def work(times):
        for _ in range(times):
            model(ids, cache=cache, logits_to_keep=1)
            cache.reset()

    def held():
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096, len(gc.get_objects())

    with torch.no_grad():
        work(300)  # what is made once is made
        before = held()
        work(times)
    after = held()
    return after[0] - before[0], after[1] - before[1]


LEAST = {
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 1,
    "head_dim": 4,
    "intermediate_size": 8,
}
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="counts the pages that Linux shows"
)


@needs_proc
@pytest.mark.parametrize(
    ("rows", "times"), [(100, 400), pytest.param(1, 100_000, marks=pytest.mark.slow)]
)
def test_reads_and_resets_leak_nothing(rows, times):
    """Rows are documents: each is read and forgotten `times` times."""
    model = build("melodi", **LEAST, long_memory_layers=(0,))
    new_bytes, new_objects = read_and_reset(model, rows, times)
    assert new_objects < times // 100
    assert new_bytes < 4e6  # what the allocator holds back varies by one or two


# Refusals


NOT_DOCUMENTS = {
    "no tokens": ([], "the document is empty"),
    "nothing": (iter([]), "the document is empty"),
    "no columns": (torch.zeros(2, 0, dtype=torch.long), "the document is empty"),
    "no letters": (iter(["", ""]), "the document is empty"),
    "fractions": (torch.rand(3), r"ids of type torch.float32 and shape \(3,\): they must be int"),
    "truths": (torch.ones(3, dtype=torch.bool), "ids of type torch.bool"),
    "cube": (torch.ones(1, 1, 1, dtype=torch.long), r"shape \(1, 1, 1\)"),
    "list of all kinds": ([1, "a"], "a list that is no batch of integers"),
    "fraction in a list": ([1, 2.5], "ids of type torch.float32"),
    "texts": (("a", "b"), r"a tuple of str, which could be several .*one list.*iter\(source\)"),
    "lists": (([1], [2]), "a tuple of list, which could be several documents or one"),
    "lists in lists": ([[[1], [2]], [3]], "a list of list, which could be several documents"),
    "texts in lists": ([["a"], ["b"]], "a list of str, which could be several documents"),
    "an empty document": ([[1], []], "document 1 of the list is empty"),
    "empty documents": ([[], []], "the document is empty"),
    "parts of a batch": ([draw(2, 3), draw(2, 1)], r"document 0 of the list has 2 rows: .*iter\("),
    "no rows": (torch.zeros(0, 3, dtype=torch.long), r"shape \(0, 3\): .*at least 1 row"),
    "bytes": (b"ab", "the source is a bytes, b'ab': give ids"),
    "binary file": (io.BytesIO(b"ab"), "the source gives a bytes, b'ab': .*opened in text mode"),
    "encoding": ({"attention_mask": [1]}, "a dict with attention_mask: it must have input_ids"),
    "encodings": (
        [{"input_ids": [1]}],
        r"the source is a dict, .*: give ids .*input_ids of a mapping",
    ),
    "name of a file": (__file__, r"may be a path: .*give pathlib.Path\(.*give iter\(\['"),
    "name of no file": ("book.txt", r"'book.txt', which .*pathlib.Path\('book.txt'\), .* 8 char"),
    "names of files": (["a.txt", "b.txt"], "the string 'a.txt', which may be a path"),
    "number": (3, "the source is a int, 3: give ids"),
    "none": (None, "the source is a NoneType, None: give ids"),
    "rows that change": (iter([draw(2, 3), draw(3)]), "gives 1 rows after parts of 2"),
    "unknown": ([1, VOCABULARY], f"input_ids contain {VOCABULARY}: the vocabulary has the ids"),
    "negative": ([1, -1], "input_ids contain -1"),
}


@every_case("case", NOT_DOCUMENTS)
def test_what_is_not_a_document(case, tokenizer):
    source, message = NOT_DOCUMENTS[case]
    text = {"tokenizer": tokenizer} if case == "no letters" else {}
    model = text_model(tokenizer) if text else build("melodi")
    with pytest.raises(ValueError, match=message):
        model.read_document(source, **text)


def test_text_needs_a_tokenizer_that_fits(tokenizer):
    model = build("melodi")
    with pytest.raises(ValueError, match=r"gives a str, 'a word': .*tokenizer= and text"):
        model.read_document("a word")
    with pytest.raises(ValueError, match=f"has {len(tokenizer)} tokens and the model's .*61"):
        model.read_document("a word", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="dict does not say where"):
        model.read_document("a word", tokenizer={})


def test_what_cannot_be_gone_on_from():
    model = build("melodi")
    with pytest.raises(ValueError, match="cache is a list: give MelodiCache"):
        model.read_document([1], cache=[])
    with pytest.raises(ValueError, match="holds 1 rows and the batch has 2"):
        model.read_document(draw(2, 3), cache=model.read_document([1]))


@every_case("piece_length", [0, -1, 2.5])
def test_pieces_of_no_length(piece_length):
    with pytest.raises(ValueError, match=f"piece_length is {piece_length}: it must be a whole"):
        build("melodi").read_document([1], piece_length=piece_length)


def test_dropout_is_refused_and_the_mode_is_left():
    ids = draw(1, DOCUMENT)
    model = build("melodi", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match=r"dropout=0.0, attention_dropout=0.1: call model.eval()"):
        model.read_document(ids)
    calm = build("melodi").train()
    wanted = next_logits(model.eval(), model.read_document(ids), ids)
    assert_equal(next_logits(calm, calm.read_document(ids), ids), wanted)
    assert calm.training


@pytest.mark.parametrize("kept", [True, False])
def test_a_wrong_id_in_the_middle_loses_nothing(kept):
    model, ids, more = build("melodi"), draw(10 * WINDOW), draw(1, 5)
    wanted = next_logits(model, model.read_document(ids), more)
    wrong = ids.clone()
    wrong[7 * WINDOW + 1] = VOCABULARY
    cache = MelodiCache(model.config) if kept else None
    message = f"contain 61: .*{6 * WINDOW} tokens per row were read before, into the cache if"
    with pytest.raises(ValueError, match=message):
        model.read_document(wrong, cache=cache, piece_length=2 * WINDOW)
    if kept:
        assert cache.get_seq_length() == 6 * WINDOW
        model.read_document(ids[cache.get_seq_length() :], cache=cache)
        assert_near(next_logits(model, cache, more), wanted)


def test_errors_of_the_source_pass_unchanged():
    model, cache = build("melodi"), MelodiCache(build("melodi").config)
    broken = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    def parts():
        yield draw(5 * WINDOW)
        raise broken

    with pytest.raises(UnicodeDecodeError) as raised:
        model.read_document(parts(), cache=cache, piece_length=2 * WINDOW)
    assert raised.value is broken
    assert cache.get_seq_length() == 4 * WINDOW


# The bar


def test_a_bar_with_tokens_per_second_appears_when_it_takes_long(capsys, monkeypatch):
    model, ids = build("melodi"), draw(2, 2 * WINDOW)
    model.read_document(ids)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(reading, "PROGRESS_DELAY", 0)
    for silent in (False, None):  # here is no terminal
        model.read_document(ids, progress=silent)
        assert capsys.readouterr() == ("", "")
    model.read_document(ids)
    bar = capsys.readouterr().err
    assert "reading: 100%" in bar
    assert "32.0/32.0" in bar
    assert "token/s" in bar
    model.read_document(iter(ids[0]))
    assert "16.0token" in capsys.readouterr().err
