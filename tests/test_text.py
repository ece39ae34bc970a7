"""Documents are read whole, in a fixed order, from every source; what is none is told."""

import gzip
import json
import subprocess
import sys

import pytest

from melodi_hf.data import rows, text
from melodi_hf.data.report import Report
from melodi_hf.data.text import Document, read_documents, standard_library_documents

from .cases import every_case

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
    by_list, report = read(read_documents([folder / "books.jsonl", str(folder / "books.jsonl.gz")]))
    # What has a name is known by it; the running number goes on, so it names one document.
    assert by_list == [*one, Document("5", TEXTS[2])]
    assert report.places == {"repeated": ["books.jsonl.gz, line 1", "books.jsonl.gz, line 2"]}
    assert read(read_documents(str(folder / "*.jsonl*")))[0] == by_list


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
    with pytest.raises(ValueError, match="has no modules"):
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
    with pytest.raises(ValueError, match=r"has no \.txt files"):
        read_documents(tmp_path)
    with pytest.raises(ValueError, match="files is empty"):
        read_documents([])


def test_unknown_suffix_and_limit_are_refused_at_once(tmp_path, folder):
    (tmp_path / "book.pdf").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"book\.pdf has an unknown suffix.*\.jsonl"):
        read_documents(tmp_path / "book.pdf")
    with pytest.raises(ValueError, match="limit must be 1 or more"):
        read_documents(folder / "books.jsonl", limit=0)


def test_hub_dataset_needs_a_split():
    with pytest.raises(ValueError, match="allenai/c4 needs a split"):
        read_documents(name="allenai/c4")


# What is left out, and told


def read(source):
    """The documents of a source and what is told of the others."""
    report = Report()
    return list(source.documents(report)), report


@every_case(
    ("content", "kind", "place"),
    [
        (b'{"text": ', "not JSON", "line 2"),
        (b"[" * 100_000, "not JSON", "line 2"),
        (b'\n["x"]', "not a JSON object", "line 3"),
        (b'{"id": "k", "body": "x"}', "without the field 'text'", "line 2"),
        (b'{"id": "k", "text": " \\n"}', "empty", "line 2"),
        (b'{"id": "k", "text": 3}', "with a text that is no string", "line 2"),
        (b'{"id": "k", "text": null}', "with a text that is no string", "line 2"),
        (b'{"text": "na\xefve"}', "not UTF-8", "line 2"),
        (b'{"text": "half \\ud83d"}', "not UTF-8", "line 2"),
        (b'{"id": "a", "text": "first"}', "repeated", "line 2"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_lines_are_left_out_and_told(tmp_path, content, kind, place):
    path = tmp_path / "books.jsonl"
    path.write_bytes(b'{"id": "a", "text": "first"}\n' + content + b'\n{"id": "z", "text": "last"}')
    found, report = read(read_documents(path))
    assert found == [Document("a", "first"), Document("z", "last")]
    assert list(report.counts) == [kind]
    assert report.places[kind][0] == f"books.jsonl, {place}"
    with pytest.warns(UserWarning, match=f"left out: .*{kind} .*{place}"):
        assert list(read_documents(path)) == found


def test_report_counts_all_and_names_the_first(tmp_path):
    (tmp_path / "books.jsonl").write_text('{"text": ""}\n' * 5 + "{\n" + '{"text": "x"}\n')
    _, report = read(read_documents(tmp_path / "books.jsonl"))
    assert str(report) == (
        "6 left out: 5 empty (books.jsonl, line 1; books.jsonl, line 2; books.jsonl, line 3; ...), "
        "1 not JSON (books.jsonl, line 6)"
    )
    assert str(Report(json.loads(json.dumps(report.as_dict())))) == str(report)
    assert not Report()
    assert str(Report()) == "nothing left out"


def test_an_id_names_one_text(tmp_path):
    pairs = [("a", "x"), ("a", "y"), ("a", "x"), ("a", "z"), ("a", "y"), ("a (2)", "w")]
    lines = [json.dumps({"id": name, "text": body}) for name, body in pairs]
    (tmp_path / "books.jsonl").write_text("\n".join(lines))
    found, report = read(read_documents(tmp_path / "books.jsonl"))
    assert found == [("a", "x"), ("a (2)", "y"), ("a (3)", "z"), ("a (2) (2)", "w")]
    assert report.counts == {"renamed": 3, "repeated": 2}
    assert str(report).startswith(
        "2 left out: 2 repeated (books.jsonl, line 3; books.jsonl, line 5)"
    )
    assert "; 3 renamed (books.jsonl, line 2;" in str(report)


def test_other_encodings_are_left_out(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\n# na\xefve")
    (tmp_path / "unknown.py").write_bytes(b"# coding: klingon\n")
    found, report = read(read_documents([tmp_path, *sorted(tmp_path.glob("*.py"))]))
    assert found == [("good.txt", "good"), ("latin.py", "# coding: latin-1\n# na\xefve")]
    assert report.places == {"empty": ["empty.txt"], "not UTF-8": ["latin.txt", "unknown.py"]}


@pytest.mark.parametrize("damage", ["cut", "checksum", "no gzip", "no parquet"])
def test_damaged_file_is_read_up_to_there_and_the_next_is_read(tmp_path, damage):
    lines = [json.dumps({"id": str(n), "text": f"{n} " * 40_000}) for n in range(9)]
    whole = gzip.compress("\n".join(lines).encode())
    contents = {
        "cut": whole[:-200],
        "checksum": whole[:-8] + bytes(8),
        "no gzip": b"not compressed",
        "no parquet": b"PAR1 not a table",
    }
    name = "1.parquet" if damage == "no parquet" else "1.jsonl.gz"
    (tmp_path / name).write_bytes(contents[damage])
    (tmp_path / "2.jsonl").write_text('{"id": "z", "text": "last"}')
    found, report = read(read_documents([tmp_path / name, tmp_path / "2.jsonl"]))
    ids = [document.id for document in found]
    assert len(ids) > {"cut": 6, "checksum": 8}.get(damage, 0)
    assert ids == [*map(str, range(len(ids) - 1)), "z"]
    assert list(report.counts) == ["damaged there or before"]
    (place,) = report.places["damaged there or before"]
    assert place.split()[-1] == str(len(ids))  # the line behind the last that could be read


def test_bad_rows_and_files_of_a_dataset(tmp_path, caplog):
    """Through `datasets`: a text that is not UTF-8, a damaged file, and a good one behind it."""
    pytest.importorskip("datasets")
    import pyarrow

    text = pyarrow.array(["aa", "bb", "cc"]).buffers()[1]
    bad = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, text, pyarrow.py_buffer(b"aa\xffbcc")]
    )
    table = pyarrow.table({"id": ["x", "y", "z"], "text": bad})
    pyarrow.parquet.write_table(table, tmp_path / "train-0.parquet")
    (tmp_path / "train-1.parquet").write_bytes(b"PAR1 not a table")
    write_parquet(tmp_path / "train-2.parquet", [{"id": "last", "text": "x"}])
    found, report = read(read_documents(name=str(tmp_path), split="train"))
    assert found == [("x", "aa"), ("z", "cc"), ("last", "x")]
    assert report.places == {
        "not UTF-8": [f"{tmp_path}, file 0, row 2"],
        "damaged there or before": [f"{tmp_path}, file 1, row 1"],
    }


def test_a_broken_connection_is_no_damage(monkeypatch):
    """What the network does not bring today is not left out of the corpus."""

    class Broken:
        num_shards = 1

        def __getattr__(self, name):
            return lambda *args, **kwargs: self

        def __iter__(self):
            raise ConnectionError("reset by peer")

    monkeypatch.setattr(rows, "load_dataset", lambda *args, **kwargs: Broken())
    with pytest.raises(ConnectionError, match="reset by peer"):
        list(read_documents(name="allenai/c4", split="train"))


def test_no_document_left_is_refused(tmp_path, folder):
    path = tmp_path / "empty.jsonl"
    for content in ("", "\n\n"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"empty\.jsonl has no documents; pass a source"):
            list(read_documents(path))
    path.write_text('{"text": ""}\n{"body": "x"}')
    with pytest.raises(ValueError, match=r"2 left out: 1 empty .* the text field as text_field"):
        list(read_documents(path))
    with pytest.raises(ValueError, match="with the split 'dev' has no documents"):
        list(read_documents(folder / "books.jsonl", split="dev"))


def test_documents_of_fewer_bytes_than_tokens_are_left_out(tmp_path):
    (tmp_path / "books.jsonl").write_text(
        '{"text": "1234567"}\n{"text": "\u00e9\u00e9\u00e9\u00e9"}'
    )
    found, report = read(read_documents(tmp_path / "books.jsonl", min_tokens=8))
    assert found == [("1", "éééé")]
    assert report.places == {"shorter than 8 tokens": ["books.jsonl, line 1"]}
    with pytest.raises(ValueError, match="min_tokens must be 0 or more, got -1"):
        read_documents(tmp_path / "books.jsonl", min_tokens=-1)


# Reading on


def test_reading_goes_on_from_any_place(folder, tmp_path):
    pytest.importorskip("datasets")
    (folder / "c.txt").write_text("plain")
    write_parquet(folder / "d.parquet", PG19)
    with (folder / "books.jsonl").open("a") as file:
        file.write('{"text": ""}\n{"text": "behind an empty one"}\n\n')
    files = [folder / name for name in ("books.jsonl", "c.txt", "books.jsonl.gz", "d.parquet")]
    (tmp_path / "hub").mkdir()
    for number in range(3):
        write_parquet(tmp_path / "hub" / f"train-{number}.parquet", [{"text": "x"}] * 3)
    for source in (
        read_documents(files),
        read_documents(name=str(tmp_path / "hub"), split="train"),
    ):
        whole = list(source.read(Report()))
        assert len(whole) in (10, 9)
        for number, found in enumerate(whole, start=1):
            assert list(source.read(Report(), found.position)) == whole[number:]


# Datasets that are not there


def test_dataset_read_by_a_script_names_its_copy(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found pg19.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match="emozilla/pg19"):
        list(read_documents(name="deepmind/pg19", split="test"))


def test_without_datasets_all_but_the_hub_works(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(list(read_documents(folder / "books.jsonl"))) == 3
    with pytest.raises(ImportError, match="pip install datasets"):
        list(read_documents(name="allenai/c4", split="train"))


def test_importing_the_data_package_does_not_import_datasets():
    code = "import sys, melodi_hf.data.segments; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
