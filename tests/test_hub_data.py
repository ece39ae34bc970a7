"""A dataset of the Hub is streamed once, goes on where it was stopped, and is found again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .hub_data import NUM_FILES


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("hub")
    program = [sys.executable, "-m", "tests.hub_data", str(folder)]
    subprocess.run(program, check=True, timeout=240, cwd=Path(__file__).parents[1])
    return json.loads((folder / "seen.json").read_text())


IDS = [f"http://x/{number}/{row}" for number in range(NUM_FILES) for row in range(3)]


def test_all_documents_are_there_after_a_stop(seen):
    found = seen["gone on"]
    assert found["ids"] == IDS
    assert found["lengths"] == [9 * len("file 0 document 0 ")] * len(IDS)
    assert found["report"] == {
        "with a text that is no string": {"count": 1, "first": ["reader/books, file 0, row 2"]}
    }


def test_what_was_read_is_not_asked_for_again(seen):
    def downloads(asked):
        return {path.rsplit("/", 1)[1] for path in asked if path.endswith(".jsonl.gz")}

    # The first file too, but for its columns.
    assert {"train-1.jsonl.gz", "train-2.jsonl.gz"} <= downloads(seen["asked by then"])
    assert seen["again"] == seen["gone on"]
    assert not downloads(seen["asked again"])


def test_a_new_revision_is_prepared_anew_and_both_are_known(seen):
    old, new = seen["gone on"], seen["new revision"]
    assert new["ids"] == IDS
    assert new["fingerprint"] != old["fingerprint"]
    assert len({old["revision"], new["revision"], None}) == 3


def test_without_the_hub_the_newest_is_found(seen):
    assert seen["hub is gone"] == seen["new revision"]


def test_downloaded_before_it_is_read(seen):
    assert seen["not streamed, two"]["ids"] == IDS[:2]
