"""A run tells which documents it reads and what was left out, and goes on with no others."""

import json
from pathlib import Path

import pytest
from parts.documents import check_documents, prepare, train_own_tokenizer
from parts.recipe import check_files, load_recipe

from melodi_hf.data.text import Document, standard_library_documents
from melodi_hf.data.tokens import train_tokenizer

QUICKSTART = Path(__file__).parents[1] / "configuration" / "quickstart.yaml"
BAD = ['{"text": ""}', "not JSON", '{"id": "train0", "text": "another"}']


def write(path, name, bad=()):
    lines = [json.dumps({"id": f"{name}{i}", "text": f"{i} words of it"}) for i in range(3)]
    path.write_text("\n".join([*lines, *bad]))


@pytest.fixture
def recipe(tmp_path):
    """Reads three documents of each split, and three lines that are not quite documents."""
    changes = ["data.source=files", "tokenizer.vocab_size=300", "training.evaluate_every=2"]
    for name, key in (("train", "files"), ("val", "validation_files"), ("test", "test_files")):
        path = tmp_path / f"{name}.jsonl"
        write(path, name, BAD if name == "train" else ())
        changes.append(f"data.{key}={path}")
    return lambda *more: load_recipe(QUICKSTART, [*changes, *more])


def test_what_was_left_out_is_told_once(recipe, capsys):
    tokenizer = train_own_tokenizer(recipe())
    assert capsys.readouterr().out.strip() == ""
    train, validation, test = prepare(recipe(), tokenizer)
    assert [len(documents) for documents in (train, validation, test)] == [4, 3, 3]
    told = capsys.readouterr().out.splitlines()
    assert told[0] == (
        f"4 documents ({train.num_tokens:,} tokens) to train on; 2 left out: 1 empty (train.jsonl, "
        "line 4), 1 not JSON (train.jsonl, line 5); 1 renamed (train.jsonl, line 6)"
    )
    assert told[1:] == [
        f"3 documents ({validation.num_tokens:,} tokens) to validate on",
        f"3 documents ({test.num_tokens:,} tokens) to test on",
    ]
    assert json.loads(json.dumps(train.as_dict()))["report"] == {
        "empty": {"count": 1, "first": ["train.jsonl, line 4"]},
        "not JSON": {"count": 1, "first": ["train.jsonl, line 5"]},
        "renamed": {"count": 1, "first": ["train.jsonl, line 6"]},
    }
    assert prepare(recipe("training.evaluate_every=0"), tokenizer)[1] is None


def test_shortest_length_and_number_of_documents_are_kept(recipe, tmp_path):
    tokenizer = train_own_tokenizer(recipe())
    train, validation, test = prepare(recipe("data.max_documents=2"), tokenizer)
    assert [document.id for document in train] == ["train0", "train1"]
    assert (len(validation), len(test)) == (3, 3)
    shortest = min(len(document.ids) for document in test)
    write(tmp_path / "train.jsonl", "train", ['{"id": "short", "text": "x"}'])
    train, _, _ = prepare(recipe(f"data.min_tokens={shortest}"), tokenizer)
    assert [document.id for document in train] == ["train0", "train1", "train2"]
    assert train.report.counts == {f"shorter than {shortest} tokens": 1}


def test_own_tokenizer_is_that_of_the_documents(recipe):
    texts = [Document("", f"{i} words of it") for i in range(3)] + [Document("", "another")]
    expected = train_tokenizer(texts, 300, progress=False)
    assert (
        train_own_tokenizer(recipe()).backend_tokenizer.to_str()
        == expected.backend_tokenizer.to_str()
    )


def test_a_run_goes_on_with_the_same_documents_only(recipe, tmp_path):
    tokenizer = train_tokenizer(standard_library_documents(limit=1), 300, progress=False)
    output = tmp_path / "run"
    output.mkdir()
    before, _, _ = prepare(recipe(), tokenizer)
    check_documents(output, before, is_resumed=False)
    check_documents(output, before, is_resumed=True)
    write(tmp_path / "train.jsonl", "train")
    now, _, _ = prepare(recipe(), tokenizer)
    with pytest.raises(
        ValueError, match=r"started with 4 documents .* differ from the current ones \(3, "
    ):
        check_documents(output, now, is_resumed=True)
    check_documents(output, now, is_resumed=False)  # a run that begins again
    check_documents(output, now, is_resumed=True)


def test_files_that_are_not_there_are_refused_before_any_work(recipe, tmp_path):
    check_files(recipe())
    (tmp_path / "val.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file matches .*val\.jsonl"):
        check_files(recipe())
    check_files(recipe("training.evaluate_every=0"))  # no one reads it
