"""Documents are read whole, in a fixed order, from every source, and bad sources are refused."""

import gzip
import json
import subprocess
import sys

import pytest

from melodi_hf.data import text
from melodi_hf.data.text import Document, read_documents, standard_library_documents

RECORDS = [
    {"id": "a", "text": "the first\r\nbook\n", "split": "train"},
    {"id": "b", "text": "the second, é", "split": "test"},
    {"text": "one without an id", "split": "train"},
]
TEXTS = [record["text"] for record in RECORDS]


@pytest.fixture
def folder(tmp_path):
    lines = [json.dumps(record) for record in RECORDS]
    (tmp_path / "books.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    with gzip.open(tmp_path / "books.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    return tmp_path


# Every source


@pytest.mark.parametrize("name", ["books.jsonl", "books.jsonl.gz"])
def test_json_lines(folder, name):
    documents = list(read_documents(folder / name))
    assert documents == [Document("a", TEXTS[0]), Document("b", TEXTS[1]), Document("2", TEXTS[2])]


def test_several_files_and_globs_follow_one_another(folder):
    one = list(read_documents(folder / "books.jsonl"))
    by_list = list(read_documents([folder / "books.jsonl", str(folder / "books.jsonl.gz")]))
    assert [document.text for document in by_list] == TEXTS + TEXTS
    assert list(read_documents(str(folder / "*.jsonl*"))) == by_list
    assert by_list[:3] == one
    assert by_list[5].id == "5"  # the running number goes on, so it names one document


def test_split_selects_rows_of_files(folder):
    found = read_documents(folder / "books.jsonl", split="test")
    assert [document.id for document in found] == ["b"]


def test_limit(folder):
    assert [document.id for document in read_documents(folder / "books.jsonl", limit=2)] == [
        "a",
        "b",
    ]


def test_folder_of_plain_text_keeps_line_ends_and_order(tmp_path):
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "one.txt").write_bytes(b"deep\r\nlines\r\n")
    (tmp_path / "b.txt").write_bytes("naïve\n".encode())
    (tmp_path / "notes.md").write_text("not a text")
    assert list(read_documents(tmp_path)) == [
        Document("b.txt", "naïve\n"),
        Document("z/one.txt", "deep\r\nlines\r\n"),
    ]
    assert list(read_documents(tmp_path / "b.txt")) == [Document("b.txt", "naïve\n")]


PG19 = [
    {"short_book_title": title, "publication_date": 1850, "url": f"http://x/{title}", "text": body}
    for title, body in (("A Journey", "long ago\nand far"), ("Letters", "my dear sir"))
]
C4 = [
    {"text": "a page", "timestamp": "2019-04-25T12:57:54Z", "url": "http://x/1"},
    {"text": "another page", "timestamp": "2019-04-25T12:57:54Z", "url": "http://x/2"},
]


def write_parquet(path, records):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub's two datasets as local files, reached through the real `datasets.load_dataset`."""
    datasets = pytest.importorskip("datasets")
    write_parquet(tmp_path / "pg19.parquet", PG19)
    (tmp_path / "c4.json").write_text("\n".join(map(json.dumps, C4)))
    load, calls = datasets.load_dataset, []
    kinds = {"deepmind/pg19": ("parquet", "pg19.parquet"), "allenai/c4": ("json", "c4.json")}

    def load_local(name, config_name=None, *, split, streaming):
        calls.append((name, config_name, split, streaming))
        kind, file = kinds[name]
        files = {split: str(tmp_path / file)}
        cache = str(tmp_path / "cache")
        return load(kind, data_files=files, split=split, streaming=streaming, cache_dir=cache)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    return calls


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_dataset_with_titles(hub, streaming):
    found = list(read_documents(name="deepmind/pg19", split="test", streaming=streaming))
    assert found == [Document(row["short_book_title"], row["text"]) for row in PG19]
    assert hub == [("deepmind/pg19", None, "test", streaming)]


def test_hub_dataset_with_a_configuration(hub):
    found = list(read_documents(name="allenai/c4", config_name="en", split="train", limit=1))
    assert found == [Document("http://x/1", "a page")]
    assert hub == [("allenai/c4", "en", "train", True)]


def test_parquet_file(tmp_path):
    pytest.importorskip("datasets")
    write_parquet(tmp_path / "part.parquet", PG19)
    found = list(read_documents(tmp_path / "part.parquet"))
    assert found == [Document(row["short_book_title"], row["text"]) for row in PG19]


# The standard library


def test_standard_library_splits_are_apart_fixed_and_long():
    train, test = (list(standard_library_documents(split)) for split in ("train", "test"))
    assert train == list(standard_library_documents("train"))
    ids = [document.id for document in train + test]
    assert len(set(ids)) == len(ids)
    assert len(train) > 100
    assert 0.04 < len(test) / len(ids) < 0.16
    # Fixed by the hash of the path, whatever else is installed.
    assert {"argparse.py", "inspect.py", "typing.py"} <= {document.id for document in train}
    assert {"doctest.py", "statistics.py", "unittest/mock.py"} <= {d.id for d in test}
    assert not any(part in id.split("/") for id in ids for part in text.EXCLUDED_FOLDERS)
    assert min(len(d.text.encode()) for d in train + test) > 0.9 * text.MIN_MODULE_BYTES


def test_standard_library_needs_a_known_split():
    with pytest.raises(ValueError, match="'train' or 'test', got 'validation'"):
        standard_library_documents("validation")


def test_a_library_without_modules_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match="holds no modules"):
        standard_library_documents()


# What is refused, before anything is read


def test_one_source_is_needed(folder):
    with pytest.raises(ValueError, match="either files or name"):
        read_documents()
    with pytest.raises(ValueError, match="either files or name"):
        read_documents(folder, name="allenai/c4")


def test_missing_path_is_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file matches .*nowhere\.jsonl"):
        read_documents(tmp_path / "nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        read_documents(str(tmp_path / "*.jsonl"))
    with pytest.raises(ValueError, match=r"holds no \.txt files"):
        read_documents(tmp_path)
    with pytest.raises(ValueError, match="files is empty"):
        read_documents([])


def test_unknown_suffix_and_limit_are_refused_at_once(tmp_path, folder):
    (tmp_path / "book.pdf").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"book\.pdf has none of the suffixes .*\.jsonl"):
        read_documents(tmp_path / "book.pdf")
    with pytest.raises(ValueError, match="limit must be 1 or more"):
        read_documents(folder / "books.jsonl", limit=0)


def test_hub_dataset_needs_a_split():
    with pytest.raises(ValueError, match="allenai/c4 needs a split"):
        read_documents(name="allenai/c4")


# What is refused while reading


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "x"}\n{"text": ', r"books\.jsonl, line 2 is not JSON"),
        ('{"text": "x"}\n\n["x"]', r"books\.jsonl, line 3 holds a list"),
        ('{"id": "k", "body": "x"}', r"line 1 has no field 'text', only \['body', 'id'\]"),
        ('{"id": "k", "text": " \\n"}', r"document 'k' \(.*line 1\) is empty"),
        ('{"id": "k", "text": 3}', r"document 'k' .* must be a string, got int"),
        ("\n\n", "holds no documents"),
        ("", "holds no documents"),
    ],
)
def test_bad_json_lines_are_refused(tmp_path, content, message):
    (tmp_path / "books.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_documents(tmp_path / "books.jsonl"))


def test_other_bad_files_are_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="with the split 'dev' holds no documents"):
        list(read_documents(folder / "books.jsonl", split="dev"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "na\xefve"}')
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 1 is not JSON"):
        list(read_documents(tmp_path / "latin.jsonl"))
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        list(read_documents(tmp_path / "latin.txt"))
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"document 'empty\.txt' .* is empty"):
        list(read_documents(tmp_path / "empty.txt"))
    cut = (folder / "books.jsonl.gz").read_bytes()[:-12]
    (tmp_path / "cut.jsonl.gz").write_bytes(cut)
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz is damaged after line"):
        list(read_documents(tmp_path / "cut.jsonl.gz"))


def test_dataset_read_by_a_script_names_its_copy(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found pg19.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match="emozilla/pg19"):
        read_documents(name="deepmind/pg19", split="test")


def test_without_datasets_all_but_the_hub_works(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(list(read_documents(folder / "books.jsonl"))) == 3
    with pytest.raises(ImportError, match="pip install datasets"):
        read_documents(name="allenai/c4", split="train")


def test_importing_the_data_package_does_not_import_datasets():
    code = "import sys, melodi_hf.data.segments; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
