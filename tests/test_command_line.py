"""The command line of training is frozen, and what cannot succeed is refused before it begins."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from record import record_run, without_local_details
from train import main, make_parser

from melodi_hf.trainer import MemoryTrainer

QUICKSTART = str(Path(__file__).parents[1] / "configuration" / "quickstart.yaml")

# A run of seconds: four steps of a tiny model on three small files.
TINY = {
    "model.hidden_size": 16,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.head_dim": 8,
    "model.intermediate_size": 32,
    "model.window_length": 8,
    "model.num_summary_tokens": 4,
    "model.num_short_memory_tokens": 4,
    "model.long_memory_layers": [1],
    "model.num_long_memory_tokens": 2,
    "model.long_memory_windows": 4,
    "data.source": "files",
    "data.segment_length": 16,
    "tokenizer.vocab_size": 300,
    "training.steps": 4,
    "training.num_rows": 2,
    "training.learning_rate": 0.002,
    "training.log_every": 1,
    "training.save_every": 2,
    "training.warmup_steps": 1,
    "evaluation.segment_windows": 2,
    "evaluation.num_rows": 2,
    "evaluation.read_tokens": 40,
    "evaluation.new_tokens": 4,
}


@pytest.fixture
def tiny(tmp_path):
    """The arguments of a tiny run, whose folder is `tmp_path / "run"`."""
    for name, length in {"train": 300, "test": 40}.items():
        words = " ".join(f"word{number % 17}" for number in range(length))
        lines = [json.dumps({"id": f"{name}{i}", "text": f"{i} {words}"}) for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files = {"data.files": tmp_path / "train.jsonl", "data.test_files": tmp_path / "test.jsonl"}
    changes = [f"--set={key}={value}" for key, value in {**TINY, **files}.items()]
    return [QUICKSTART, *changes, "--output", str(tmp_path / "run")]


def refused(arguments, capsys):
    """What is told when a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_options_are_these():
    text = make_parser().format_help()
    assert sorted(set(re.findall(r"--[a-z-]+", text))) == [
        "--help",
        "--output",
        "--resume",
        "--set",
        "--train-only",
    ]
    assert re.search(r"positional arguments:\s+recipe ", text)


def test_run_leaves_what_it_promises(tiny, tmp_path, capsys):
    main(tiny)
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())
    assert results["name"] == "quickstart"
    assert results["recipe"]["model"]["hidden_size"] == 16
    assert results["training"]["history"][-1]["step"] == 4
    assert results["training"]["history"][-1]["tokens"] == 4 * 2 * 16
    assert set(results["evaluation"]["settings"]) == {"carried", "emptied"}
    assert results["continuation"]["tokens_read"] == 40
    keys = ("commit", "versions", "hardware", "seed", "minutes", "peak_memory_gb")
    assert results.keys() >= {*keys, "tokens_per_second", "parameters", "memory_floats"}
    files = {path.name for path in run.iterdir()}
    assert files >= {"model.safetensors", "config.json", "tokenizer.json", "README.md", "loss.png"}
    assert not list(run.glob("checkpoint-*"))
    assert json.loads((run / "config.json").read_text())["use_cache"]
    assert "test perplexity" in capsys.readouterr().out

    # once finished, a run is not begun again
    assert "contains a finished run" in refused(tiny, capsys)
    main([*tiny, "--resume"])
    assert "nothing to resume" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        (None, None),
        ("google-t5/t5-base", "google-t5/t5-base"),
        ("/home/me/books/tokenizer", "tokenizer"),
        ("books/tokenizer", "tokenizer"),  # a folder that is there
    ],
)
def test_what_is_kept_tells_which_tokenizer_of_the_hub(path, kept, tmp_path, monkeypatch):
    (tmp_path / "books" / "tokenizer").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    data = {"files": [], "validation_files": [], "test_files": []}
    recipe = {"data": data, "tokenizer": {"path": path}}
    results = without_local_details({"recipe": recipe, "continuation": None})
    assert results["recipe"]["tokenizer"]["path"] == kept


def test_row_of_a_table_runs_into_a_folder_of_its_own(tiny, tmp_path, monkeypatch):
    table = tmp_path / "table.yaml"
    table.write_text(f"base: {QUICKSTART}\nrows:\n  shorter: {{training.steps: 3}}\n")
    ran = []
    monkeypatch.setattr("train.run", lambda *given: ran.append(given))
    monkeypatch.chdir(tmp_path)
    changes = [change for change in tiny[1:-2] if "training.steps" not in change]
    main([f"{table}:shorter", *changes])
    ((recipe, name, output, *_),) = ran
    assert (recipe.training.steps, name) == (3, "table_shorter")
    assert output == Path("runs/table_shorter")


def test_stopped_run_goes_on_when_asked(tiny, tmp_path, monkeypatch, capsys):
    main([*tiny[:-1], str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        patch.setattr(MemoryTrainer, "training_step", stop_at_third_step)
        with pytest.raises(KeyboardInterrupt):
            main(tiny)
    assert "add --resume" in refused(tiny, capsys)
    told = refused([*tiny, "--set=training.learning_rate=0.1", "--resume"], capsys)
    assert "was started with training.learning_rate=0.002, not 0.1" in told
    main([*tiny, "--resume"])
    whole, run = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "run")
    )
    assert run["resumed"]
    assert [e["step"] for e in run["training"]["history"]] == [1, 2, 3, 4]
    for name in ("carried", "emptied"):
        found, expected = (r["evaluation"]["settings"][name]["nll"] for r in (run, whole))
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_two_processes_equal_one(tiny, tmp_path):
    """Two rows in each of two processes are the same four rows as in one."""
    script = str(Path(QUICKSTART).parents[1] / "training" / "train.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, command in {"one": [sys.executable], "two": launch}.items():
        rows = {"one": 4, "two": 2}[name]
        given = [*tiny[:-1], str(tmp_path / name), f"--set=training.num_rows={rows}"]
        subprocess.run([*command, script, *given], check=True)
    one, two = (
        json.loads((tmp_path / name / "results.json").read_text())["training"]["history"]
        for name in ("one", "two")
    )
    assert [e["tokens"] for e in two] == [e["tokens"] for e in one]
    assert [e["loss"] for e in two] == pytest.approx([e["loss"] for e in one], abs=1e-5)


def stop_at_third_step(trainer, *args, step=MemoryTrainer.training_step):
    if trainer.state.global_step == 2:
        raise KeyboardInterrupt
    return step(trainer, *args)


def test_wrong_recipe_is_refused_before_anything_is_written(tiny, tmp_path, capsys):
    assert "did you mean 'steps'?" in refused([*tiny, "--set=training.step=1"], capsys)
    assert not (tmp_path / "run").exists()


def test_folder_that_cannot_be_written_to_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    told = refused([*tiny[:-1], str(tmp_path / "file" / "run")], capsys)
    assert "cannot be written to (Not a directory): choose another folder by --output" in told


def test_disk_that_is_full_is_refused(tiny, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    told = refused(tiny, capsys)
    assert re.search(r"run needs [\d,]+ bytes for checkpoints, but its disk has 1,000 free", told)
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_what_is_kept_tells_neither_folders_nor_documents(tiny, tmp_path):
    main(tiny)
    kept = record_run(tmp_path / "run", tmp_path / "cards")
    results, left = json.loads(kept.read_text()), (tmp_path / "run" / "results.json").read_text()
    assert str(tmp_path) in left
    assert str(tmp_path) not in kept.read_text()
    assert results["recipe"]["data"]["files"] == ["train.jsonl"]
    assert json.loads(left)["continuation"]["read"]
    assert "read" not in results["continuation"]
    assert results["evaluation"] == json.loads(left)["evaluation"]
    assert (tmp_path / "cards" / "figures" / "quickstart_by_position.svg").is_file()
