"""Tokenizers give the ids they should, keep their text, and survive being saved."""

import io
import warnings

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from melodi_hf.data import tokens
from melodi_hf.data.report import Report
from melodi_hf.data.text import Document, standard_library_documents
from melodi_hf.data.tokens import (
    convert_sentencepiece,
    encode_documents,
    load_tokenizer,
    train_tokenizer,
)

from .cases import every_case

with warnings.catch_warnings():
    # Its compiled types carry no module name, which newer Pythons warn about; not ours to mend.
    warnings.simplefilter("ignore", DeprecationWarning)
    sentencepiece = pytest.importorskip("sentencepiece")

PROSE = """The miller's daughter walked to the river. "Is it far?" she asked; it was not far at all.

He said:  two blanks -- and a dash---then...   nothing. In 1851 the château stood empty, naïve
visitors notwithstanding; café, cœur, Übermut.\tA tab.

CHAPTER XII.


The weather, whether we would or not, turned: rain, rain, and rain again until the reeds bowed.
"""

STRINGS = [
    "",
    " ",
    "a",
    "  two blanks  between   and at the end  ",
    "\n\n\na line\n\nand another\n",
    "line\r\n\r\nline\r\n",
    "\ttab\t\ttab",
    "café naïve œuvre Übermut",
    "cafe\u0301 combined",
    "unknown: <>#@\\^ αβγ \U0001f600 日本",
    "unknown within w\u03b1\u03b2rd",
    "\ufb01ne ½ \uff21 ™ \u3000 wide",
    "\u2581 the mark itself \u2581\u2581",
    "\u200b\ufeffinvisible",
    "aaaa aaaaaaa aaa",
    "-----------",
    ". . . . . ....... ,,,,",
    "</s> <pad> <unk> <s>",
]


def corpus():
    return [PROSE] * 8 + [document.text for document in library(3)]


def library(count):
    documents = standard_library_documents("train")
    return [Document(d.id, d.text[:20_000]) for d, _ in zip(documents, range(count), strict=False)]


def train_sentencepiece(path, **options):
    """Train as the models of PG-19 were, save for `options`."""
    options = {
        "vocab_size": 400,
        "model_type": "bpe",
        "bos_id": -1,
        "eos_id": -1,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "nmt_nfkc",
        "minloglevel": 2,
        **options,
    }
    lines = [line for text in corpus() for line in text.splitlines() if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **options
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece") / "small.model")


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(library(3), vocab_size=400, progress=False)


def encode(tokenizer, texts):
    return list(tokens.batch_encoder(tokenizer)(texts))


def pieces_of_corpus(seed, count):
    """Cut texts at random, so that they begin and end anywhere."""
    random = np.random.default_rng(seed)
    text = "\r\n".join(corpus())
    starts = random.integers(0, len(text) - 400, count)
    return [text[start : start + int(random.integers(1, 400))] for start in starts]


# From SentencePiece


@every_case(
    "options",
    [
        {},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"normalization_rule_name": "nfkc"},
        {"normalization_rule_name": "identity"},
        {"split_by_whitespace": False, "vocab_size": 500},
        {"bos_id": 1, "eos_id": 2, "pad_id": 3},
    ],
    ids=str,
)
def test_ids_equal_those_of_sentencepiece(tmp_path, options):
    path = train_sentencepiece(tmp_path / "small.model", **options)
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = STRINGS + pieces_of_corpus(seed=0, count=200)
    converted = encode(convert_sentencepiece(path), texts)
    for text, ids in zip(texts, converted, strict=True):
        assert ids == original.encode(text), repr(text)


def test_other_merges_would_be_noticed(model_file, monkeypatch):
    original = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    texts = pieces_of_corpus(seed=1, count=20)
    expected = original.encode(texts)
    assert encode(convert_sentencepiece(model_file), texts) == expected
    right = tokens.all_merges
    monkeypatch.setattr(tokens, "all_merges", lambda pieces: right(pieces)[::-1])
    assert encode(convert_sentencepiece(model_file), texts) != expected


def test_special_tokens_follow_the_vocabulary(model_file):
    tokenizer = convert_sentencepiece(model_file)
    assert (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 400, 401)
    assert len(tokenizer) == 402
    assert tokenizer.decode(tokenizer.encode("the  river.")) == "the  river."


def test_special_tokens_of_the_model_are_kept(tmp_path):
    options = {"bos_id": 1, "eos_id": 2, "pad_id": 3}
    tokenizer = convert_sentencepiece(train_sentencepiece(tmp_path / "own.model", **options))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (2, 3, 400)


@every_case(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "not of the type BPE"),
        ({"byte_fallback": True, "vocab_size": 600}, "has byte fallback"),
        ({"user_defined_symbols": ["<sep>"]}, "has user-defined symbols"),
        ({"treat_whitespace_as_suffix": True}, "has spaces after words"),
    ],
)
def test_models_that_cannot_be_converted_are_refused(tmp_path, options, message):
    path = train_sentencepiece(tmp_path / "other.model", **options)
    with pytest.raises(ValueError, match=message):
        convert_sentencepiece(path)


def test_damaged_models_are_refused(tmp_path, model_file):
    whole = model_file.read_bytes()
    contents = {"cut": whole[: len(whole) // 2], "text": b"not a model", "zero": b"\0" * 9}
    for name, content in contents.items():
        path = tmp_path / f"{name}.model"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=name):
            convert_sentencepiece(path)


# Trained


def test_trained_tokenizer_gives_every_text_back(trained):
    texts = [text for text in STRINGS if text] + pieces_of_corpus(seed=2, count=50)
    for text, ids in zip(texts, encode(trained, texts), strict=True):
        assert trained.decode(ids) == text
    assert (trained.bos_token_id, trained.eos_token_id, trained.pad_token_id) == (0, 0, 1)
    assert (trained.convert_ids_to_tokens(0), trained.convert_ids_to_tokens(1)) == ("</s>", "<pad>")
    assert len(trained) == 400


def test_training_is_deterministic(trained):
    again = train_tokenizer(library(3), vocab_size=400, progress=False)
    assert again.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()
    other = train_tokenizer(library(2), vocab_size=400, progress=False)
    assert other.backend_tokenizer.to_str() != trained.backend_tokenizer.to_str()


def test_training_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match=r"at least 258 .* got 257"):
        train_tokenizer(library(1), vocab_size=257)
    with pytest.raises(ValueError, match="no documents"):
        train_tokenizer([], vocab_size=300)


# Loaded


@pytest.mark.parametrize("kind", ["trained", "converted"])
def test_saved_tokenizer_is_found_by_the_auto_class(kind, trained, model_file, tmp_path):
    tokenizer = trained if kind == "trained" else convert_sentencepiece(model_file)
    tokenizer.save_pretrained(tmp_path)
    texts = STRINGS + pieces_of_corpus(seed=3, count=20)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert encode(loaded, texts) == encode(tokenizer, texts)
        assert loaded.special_tokens_map == tokenizer.special_tokens_map
        assert len(loaded) == len(tokenizer)
        ids = loaded.encode("The river")
        assert loaded.decode(ids) == "The river"


def test_loading_refuses_raw_sentencepiece(model_file):
    for path in (model_file, model_file.parent):
        with pytest.raises(ValueError, match="call convert_sentencepiece"):
            load_tokenizer(path)


@pytest.mark.parametrize("role", ["eos", "pad"])
def test_loading_refuses_a_missing_special_token(role, trained, tmp_path):
    broken = tokens.PreTrainedTokenizerFast(
        tokenizer_object=trained.backend_tokenizer,
        **{f"{other}_token": "</s>" for other in ("eos", "pad") if other != role},
    )
    broken.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"has no {role} token.*add_special_tokens"):
        load_tokenizer(tmp_path)


# Encoded


def test_documents_are_encoded_whole_and_counted(trained, monkeypatch):
    documents = [Document("a", "café </s> river\n"), *library(3), Document("z", "the end")]
    encoded = encode_documents(iter(documents), trained, progress=False)
    for document, found in zip(documents, encoded, strict=True):
        assert found.id == document.id
        assert found.ids.dtype == np.int32
        assert trained.decode(found.ids) == document.text
        assert found.num_words == len(document.text.split())
        assert found.num_bytes == len(document.text.encode())
    assert 0 not in encoded[0].ids  # "</s>" in a text does not end it
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 10)
    for one, other in zip(encode_documents(documents, trained), encoded, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)


def test_encoding_is_free_of_truncation_and_leaves_the_tokenizer_as_it_was(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    (found,) = encode_documents([Document("a", PROSE)], tokenizer, progress=False)
    assert tokenizer.decode(found.ids) == PROSE
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 4
    assert tokenizer.backend_tokenizer.encode_special_tokens is False


def test_encoding_is_silent(trained, tmp_path, capfd, caplog):
    trained.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, model_max_length=16)
    encode_documents(library(1), tokenizer)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_tokenizer_written_in_python_encodes_too():
    from transformers import ByT5Tokenizer

    text = "café </s>"
    (found,) = encode_documents([Document("a", text)], ByT5Tokenizer(), progress=False)
    assert found.ids.tolist() == [byte + 3 for byte in text.encode()]


def test_documents_without_ids_are_left_out_and_told(tmp_path, trained):
    path = train_sentencepiece(tmp_path / "strict.model", remove_extra_whitespaces=True)
    tokenizer = convert_sentencepiece(path)
    blank, full = Document("blank", " \u200b\n "), Document("full", "a river")
    told = r"1 left out: 1 without tokens \(document 'blank'\)"
    with pytest.warns(UserWarning, match=told):
        found = encode_documents([blank, full], tokenizer)
    assert [document.id for document in found] == ["full"]
    report = Report()
    assert len(encode_documents([blank, full], tokenizer, report=report)) == 1  # and no warning
    assert report.counts == {"without tokens": 1}
    with pytest.raises(ValueError, match=rf"no documents to encode \({told}\)"):
        encode_documents([blank], tokenizer)
    with pytest.raises(ValueError, match="no documents to encode; pass"):
        encode_documents([], trained)


def test_texts_and_rows_are_documents_too(trained):
    texts = ["a river", "the sea"]
    expected = encode_documents([Document(str(i), text) for i, text in enumerate(texts)], trained)
    rows = datasets.Dataset.from_dict({"url": ["0", "1"], "text": texts})
    renamed = rows.rename_column("text", "body")
    for given, options in (
        (texts, {}),
        (iter(texts), {}),
        ([{"text": text} for text in texts], {}),
        (rows, {}),
        (rows.to_iterable_dataset(), {}),
        (renamed, {"text_field": "body"}),
    ):
        found = encode_documents(given, trained, progress=False, **options)
        assert [each.id for each in found] == ["0", "1"]
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one.ids, other.ids)
    with pytest.raises(ValueError, match=r"no documents to encode .*2 without the field 'text'"):
        encode_documents(renamed, trained)
    own = train_tokenizer(texts, 300, progress=False).backend_tokenizer.to_str()
    assert own == train_tokenizer(rows, 300, progress=False).backend_tokenizer.to_str()


@every_case(
    ("given", "message"),
    [
        ("a river", "documents is of type str: pass an iterable of texts"),
        (b"a river", "documents is of type bytes: pass an iterable"),
        (7, "documents is of type int: pass an iterable"),
        (None, "documents is of type NoneType: pass an iterable"),
        (datasets.DatasetDict({}), "documents is of type DatasetDict: pass an iterable"),
        ([7], "document 0 is of type int: pass an iterable"),
        (["a", ("id", "text")], "document 1 is of type tuple: pass an iterable"),
        (["\ud800"], r"1 left out: 1 not UTF-8 \(document 0\)"),
        ([Document("a", "a\udcff")], r"1 left out: 1 not UTF-8 \(document 'a'\)"),
        ([Document("a", None)], r"1 with a text that is no string \(document 'a'\)"),
        ([{"text": b"bytes"}], r"1 with a text that is no string \(document 0\)"),
        ([""], r"1 empty \(document 0\)"),
    ],
    ids=str,
)
def test_what_is_no_document_is_a_value_error(trained, given, message):
    with pytest.raises(ValueError, match=message):
        encode_documents(given, trained, progress=False)
    with pytest.raises(ValueError, match=message):
        train_tokenizer(given, 300, progress=False)


def test_halves_of_characters_are_left_out_and_told(trained):
    with pytest.warns(UserWarning, match=r"1 left out: 1 not UTF-8 \(document 1\)"):
        (found,) = encode_documents(["a river", "\ud800"], trained, progress=False)
    assert trained.decode(found.ids) == "a river"


def test_only_the_beginning_of_a_large_corpus_trains_a_tokenizer(trained, monkeypatch):
    documents = library(4)
    monkeypatch.setattr(tokens, "TRAINING_CHARACTERS", sum(len(d.text) for d in documents[:3]))
    read = iter(documents)
    again = train_tokenizer(read, vocab_size=400, progress=False)
    assert again.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()
    assert list(read) == documents[3:]
