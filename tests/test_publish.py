"""What is published is what was trained, or nothing is: against a small Hub on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import load_back
import publish
import pytest
from safetensors.torch import load_file

from melodi_hf import MelodiForCausalLM
from melodi_hf.data.text import Document
from melodi_hf.data.tokens import train_tokenizer

from .hub import Hub
from .hub_user import PUBLISHED, PUSHED, UNWRITTEN
from .models import assert_near, build

ROOT = Path(__file__).parents[1]
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom."


def run_user(role, *arguments, **where):
    program = str(ROOT / "tests" / "hub_user.py")
    command = [sys.executable, program, role, *arguments]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True, timeout=300, **where)


pytestmark = pytest.mark.xdist_group("publish")  # the session is played once


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder as training leaves it: a model, and much that is no one's business."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    tokenizer = train_tokenizer([Document("a", TEXT)], 300, progress=False)
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
    build("melodi", vocab_size=len(tokenizer), **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    results = json.loads((ROOT / "model_cards/results/quickstart.json").read_text())
    results["recipe"]["data"]["files"] = [str(folder / "diary.txt")]
    results["continuation"]["read"] = "what the diary says"
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "perplexity_by_position.png").write_bytes(b"a plot")
    (folder / "training_args.bin").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def original(run):
    return load_back.read(MelodiForCausalLM.from_pretrained(run).eval())


@pytest.fixture(scope="module")
def session(run, tmp_path_factory):
    """A Hub that was used, what its user was told, and where its reader has everything."""
    home = tmp_path_factory.mktemp("home")
    with Hub() as hub:
        ours = {"PYTHONPATH": os.pathsep.join((str(ROOT / "training"), str(ROOT)))}
        environment = hub.environment(home) | ours
        run_user("author", str(run), str(home / "outcome.json"), env=environment)
        environment = hub.environment(home / "reader") | ours
        run_user("reader", PUBLISHED, PUSHED, env=environment, cwd=home)
    return hub, json.loads((home / "outcome.json").read_text()), home


@pytest.fixture
def at_hand(monkeypatch, original):
    """Everything in this process, and no upload."""
    monkeypatch.setattr(publish, "read_without_package", lambda folder: original)
    monkeypatch.setattr(publish, "upload", lambda *given: pytest.fail("something was uploaded"))


def test_only_what_is_right_reaches_the_hub(session):
    hub, outcome, _ = session
    assert hub.repositories.keys() == {PUBLISHED, PUSHED}
    unwritten = UNWRITTEN.partition("/")[2]
    assert not [path for path, body in hub.requests if unwritten in path + str(body)]
    assert outcome["right"] is outcome["once more"] is None
    assert "run `hf auth login`" in outcome["no token"]
    assert "run `hf auth login`" in outcome["wrong token"]
    assert "don't have the rights" in outcome["not mine"]
    assert "differ from the original's by up to 1.0" in outcome["wrong logits"]
    assert "differ from the original's by up to nan" in outcome["no numbers"]


def test_nothing_that_should_be_private_is_public(session):
    hub, outcome, _ = session
    assert hub.repositories[PUBLISHED].private
    assert not hub.repositories[PUSHED].private
    assert "exists and is public" in outcome["private"]
    assert "perplexity_by_position.png" not in hub.files(PUSHED)


def test_all_that_a_reader_needs_is_uploaded_and_nothing_else(session, run):
    files = session[0].files(PUBLISHED)
    code = {path.name for path in run.glob("*.py")}
    needed = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    needed |= {"tokenizer.json", "tokenizer_config.json", "perplexity_by_position.png"}
    assert files.keys() == needed | code | {".gitattributes"}
    assert files["model.safetensors"].is_large
    assert not files["config.json"].is_large
    for file in files.values():
        assert str(run.parent).encode() not in file.content
    card = files["README.md"].content.decode()
    assert f'name = "{PUBLISHED}"' in card
    assert "diary.txt" in card
    assert "what the diary says" not in card


def test_reader_without_the_package_gets_the_same_logits(session, original):
    hub, _, home = session
    for name in (PUBLISHED, PUSHED):
        logits = load_file(home / f"{name.replace('/', '_')}.safetensors")["logits"]
        assert_near(logits, original, atol=1e-6)
        for path, file in hub.files(name).items():
            assert (home / name / path).read_bytes() == file.content


def test_what_an_earlier_upload_left_is_removed(session):
    *_, (_, before), (_, after) = session[0].repositories[PUBLISHED].commits
    assert before.keys() - after.keys() == {"old.py"}


def test_dry_run_uploads_nothing(run, at_hand, capsys):
    publish.main([str(run), "reader/quickstart", "--dry-run"])
    shown = capsys.readouterr().out
    assert "2 x 28 x 288 logits compared, the largest difference is 0.00e+00" in shown
    assert "modeling_melodi.py" in shown
    assert shown.endswith("nothing was uploaded, as asked by --dry-run\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "quickstart"], "write USER/quickstart"),
        (["RUN", "reader/quick start"], "Repo id must"),
        (["RUN", "a/b/c"], "Repo id must"),
        (
            ["RUN/none", "reader/quickstart"],
            "has no config.json: pass an output folder of training/train.py",
        ),
        (["RUN", "reader/quickstart", "--tokenizer", "no_folder"], "there is no folder no_folder"),
    ],
)
def test_what_cannot_be_published_is_refused(run, at_hand, arguments, message):
    arguments = [word.replace("RUN", str(run)) for word in arguments]
    with pytest.raises(SystemExit, match=message):
        publish.main([*arguments, "--dry-run"])


def test_what_does_not_load_without_the_package_is_refused(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text("import nothing_of_this_name")
    monkeypatch.setattr(load_back, "__file__", str(tmp_path / "program.py"))
    with pytest.raises(ValueError, match=r"does not load without .* No module named"):
        publish.read_without_package(tmp_path)


def test_card_of_the_folder_is_kept_where_there_are_no_results(run, tmp_path, at_hand, monkeypatch):
    cards = []

    def gather(folder, *given, gather=publish.gather):
        gather(folder, *given)
        cards.append((folder / "README.md").read_text())

    monkeypatch.setattr(publish, "gather", gather)
    for path in run.glob("*"):
        if path.name != "results.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    publish.main([str(tmp_path), "reader/quickstart", "--dry-run", "--license", "mit"])
    (tmp_path / "README.md").write_text("my own card")
    publish.main([str(tmp_path), "reader/quickstart", "--dry-run"])
    assert cards[0].startswith("---\n")
    assert "license: mit" in cards[0]
    assert "# MELODI\n" in cards[0]
    assert "None" not in cards[0]
    assert "## Evaluation" not in cards[0]
    assert cards[1] == "my own card"
