"""Scripts refuse wrong input before any work, in one line, and say where the work is done."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import evaluate as evaluate_script
import generate as generate_script
import learn_probe
import probe as probe_script
import pytest
import record
import train

from benchmarks import plots as peer_plots
from melodi_hf.evaluation import WORD_PERPLEXITY, command_line, plots, systems, tables

from .cases import every_case
from .test_command_line import tiny  # noqa: F401 (a fixture)

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path for folder in ("training", "benchmarks") for path in (ROOT / folder).glob("*.py")
)


@pytest.fixture
def stopped(monkeypatch, capsys):
    """A function that gives the one line in which a command ends, and its exit status."""

    def run(main, *arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        told = capsys.readouterr().err if stop.value.code == 2 else stop.value.code
        last = told.strip().splitlines()[-1]
        assert "Traceback" not in told
        return last

    return run


def test_every_file_beside_the_scripts_is_one():
    for path in SCRIPTS:
        assert 'if __name__ == "__main__":' in path.read_text(encoding="utf-8"), path


def test_one_file_sets_how_long_threads_spin():
    files = [*(ROOT / "training").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    setting = [path.name for path in files if 'setdefault("GOMP_SPINCOUNT"' in path.read_text()]
    assert setting == ["threads.py"]
    for path in files:
        lines = path.read_text().splitlines()
        if any("parts.threads" in line for line in lines):
            threads, torch = (
                [n for n, line in enumerate(lines) if re.match(pattern, line)]
                for pattern in (r"import .*parts\.threads", r"(import|from) (torch|transformers)\b")
            )
            assert not torch or threads[0] < torch[0], path


OUTPUTS = {
    "evaluate": (evaluate_script.main, ["nowhere", "--output"]),
    "probe": (probe_script.main, ["nowhere", "--output"]),
    "learn_probe": (learn_probe.main, ["--output"]),
    "systems": (systems.main, []),
    "plots": (plots.main, ["nowhere.json", "--output"]),
    "peer_plots": (peer_plots.main, ["--output"]),
}


@every_case("name", OUTPUTS)
def test_an_output_that_cannot_be_written_is_refused_first(name, tmp_path, stopped):
    (tmp_path / "file").write_text("")
    main, arguments = OUTPUTS[name]
    told = stopped(main, *arguments, tmp_path / "file" / "x.json")
    assert "cannot be written to (Not a directory)" in told
    assert str(tmp_path / "file" / "x.json") in told
    if "plots" in name:  # which write into a folder
        assert "Not a directory" in stopped(main, *arguments, tmp_path / "file")
    else:
        assert "is a folder: pass the path of a file" in stopped(main, *arguments, tmp_path)
        assert "not a regular file" in stopped(main, *arguments, os.devnull)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_checking_an_output_leaves_nothing_behind(tmp_path):
    for check in (command_line.output_file, command_line.output_folder):
        assert check(str(tmp_path / "new" / "deep" / "x.json")) == tmp_path / "new/deep/x.json"
    assert not list(tmp_path.iterdir())


@every_case(
    ("main", "arguments", "told"),
    [
        (generate_script.main, ["m", "--max-new-tokens", "0"], "1 or more"),
        (generate_script.main, ["m", "--max-new-tokens", "-1"], "1 or more"),
        (generate_script.main, ["m", "--seed", "-1"], "from 0 to 4294967295"),
        (generate_script.main, ["m", "--sample", "--temperature", "0"], "greater than 0"),
        (generate_script.main, ["m", "--sample", "--temperature", "nan"], "greater than 0"),
        (generate_script.main, ["m", "--sample", "--top-p", "1.5"], "at most 1"),
        (evaluate_script.main, ["m", "--segment-windows", "0"], "1 or more"),
        (evaluate_script.main, ["m", "--num-rows", "0"], "1 or more"),
        (evaluate_script.main, ["m", "--limit-documents", "0"], "1 or more"),
        (probe_script.main, ["m", "--examples", "0"], "1 or more"),
        (probe_script.main, ["m", "--distances", "-3"], "0 or more"),
        (probe_script.main, ["m", "--read-tokens", "0"], "1 or more"),
        (learn_probe.main, ["--steps", "0"], "1 or more"),
        (learn_probe.main, ["--learning-rate", "-1"], "greater than 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused_with_their_option(main, arguments, told, stopped):
    line = stopped(main, *arguments)
    assert line.endswith(told)
    assert f"argument {arguments[-2]}: got {arguments[-1]!r}" in line


@every_case("content", ['{"a": 1}', "[1]", "nonsense", "", b"\xe9"], ids=repr)
def test_files_that_are_no_results_are_named(content, tmp_path, stopped):
    path = tmp_path / "results.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for main, arguments in (
        (record.main, [tmp_path]),
        (plots.main, [path, "--output", tmp_path / "plots"]),
        (peer_plots.main, ["--results", path, "--output", tmp_path / "plots"]),
    ):
        told = stopped(main, *arguments)
        assert re.search(r"results\.json (has no|is not JSON|is not UTF-8)", told)
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]


def test_folders_and_files_that_are_not_there_are_told(tmp_path, stopped):
    assert "/nowhere has no results.json: pass the folder" in stopped(record.main, "/nowhere")
    assert "No such file" in stopped(tables.main, tmp_path / "none.md")
    assert "No such file" in stopped(plots.main, tmp_path / "none.json", "--output", tmp_path)


def test_packages_that_are_missing_are_told_with_their_extra(stopped, monkeypatch, tmp_path):
    monkeypatch.setattr(command_line, "find_spec", lambda name: None)
    told = stopped(train.main, ROOT / "configuration" / "quickstart.yaml")
    assert "accelerate, matplotlib not installed: run pip install -e '.[train]'" in told
    told = stopped(plots.main, "none.json", "--output", tmp_path)
    assert "matplotlib not installed" in told
    monkeypatch.delitem(sys.modules, "melodi_hf.evaluation.harness", raising=False)
    told = stopped(
        lambda: runpy.run_module("melodi_hf.evaluation.harness", run_name="__main__"), "--help"
    )
    assert told == "harness: lm_eval not installed: run pip install -e '.[harness]' in the clone"


@pytest.mark.parametrize("key", ["data.source", "tokenizer.path"])
def test_a_hub_that_cannot_be_reached_is_told_in_one_line(key, tmp_path, stopped):
    recipe, output = ROOT / "configuration" / "quickstart.yaml", tmp_path / "run"
    told = stopped(train.main, recipe, f"--set={key}=owner/name", "--output", output)
    assert "owner/name" in told
    assert "connect" in told


def test_documents_that_are_none_end_in_one_line(tmp_path, stopped):
    (tmp_path / "empty.jsonl").write_text("")
    recipe, file = ROOT / "configuration" / "quickstart.yaml", tmp_path / "empty.jsonl"
    changes = [f"data.files={file}", f"data.test_files={file}", "data.source=files"]
    given = [f"--set={change}" for change in changes]
    told = stopped(train.main, recipe, *given, "--output", tmp_path / "run")
    assert f"train.py: {file} has no documents" in told


@pytest.mark.parametrize("value", ["0", "0,1,2,3,4,5,6,7", "GPU-1"])
def test_gpus_that_are_asked_for_and_not_there_are_refused(value, tiny, stopped, monkeypatch):  # noqa: F811
    monkeypatch.setattr(command_line.torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    told = stopped(train.main, *tiny)
    assert f"GPU {value} is requested" in told
    assert "to use the CPU, unset the variable" in told
    for nothing in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        assert command_line.choose_device().type == "cpu"


@every_case("path", sorted((ROOT / "configuration/accelerate").glob("gpu_*.yaml")))
def test_files_for_gpus_name_them(path):
    """accelerate puts these numbers into CUDA_VISIBLE_DEVICES, by which a run is refused."""
    numbers = re.search(r"^gpu_ids: '?([\d,]+)", path.read_text(), re.MULTILINE)
    assert numbers


def test_training_only_stops_before_the_evaluation(tiny, tmp_path, capsys):  # noqa: F811
    train.main([*tiny, "--train-only"])
    run, told = tmp_path / "run", capsys.readouterr()
    assert re.search(r"^device: cpu \(.*, \d+ threads\), float32$", told.err, re.MULTILINE)
    assert "--resume evaluates it" in told.out
    assert (run / "model.safetensors").is_file()
    assert not (run / "results.json").exists()
    train.main([*tiny, "--resume"])
    results = json.loads((run / "results.json").read_text())
    assert results["training"]["updates"] == 4
    assert results["continuation"]["tokens_read"] == 40
    assert "as expected" not in capsys.readouterr().out  # the recipe was changed
    assert not list(run.glob("checkpoint-*"))


def test_a_run_shorter_than_the_recipe_logs_is_trained(tiny, tmp_path):  # noqa: F811
    changes = [each for each in tiny if "log_every" not in each and "training.steps" not in each]
    train.main([*changes, "--set=training.steps=2"])
    history = json.loads((tmp_path / "run" / "results.json").read_text())["training"]["history"]
    assert [entry["step"] for entry in history] == [2]


def test_the_metric_is_found_from_anywhere():
    """tests/test_word_perplexity.py loads that folder, outside of the clone."""
    folder = Path(WORD_PERPLEXITY)
    assert folder.is_absolute()
    assert folder == ROOT / "melodi_hf" / "evaluation" / "word_perplexity"
    assert (folder / "word_perplexity.py").is_file()


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "melodi_hf" / "py.typed").is_file()


@pytest.mark.network
def test_the_wheel_says_what_the_package_is(tmp_path):
    clone = tmp_path / "clone"
    for name in ("melodi_hf", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        clone.mkdir(exist_ok=True)
        copy(ROOT / name, clone / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*command, str(clone)], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("melodi_hf-*.whl"))) as wheel:
        names = wheel.namelist()
        metadata = next(name for name in names if name.endswith("METADATA"))
        told = wheel.read(metadata).decode().splitlines()
    assert {"melodi_hf/py.typed", "melodi_hf/evaluation/systems.json"} <= set(names)
    assert "melodi_hf/evaluation/word_perplexity/word_perplexity.py" in names
    assert "License-Expression: Apache-2.0" in told
    assert "Author: The melodi_hf maintainers" in told
    assert any(line.startswith("Project-URL: ") for line in told)
    assert sum(line.startswith("Classifier: ") for line in told) > 4
    assert not any(line.startswith("Classifier: License") for line in told)


@pytest.mark.slow
def test_the_benchmark_of_openmp_measures_every_case(tmp_path):
    output = tmp_path / "openmp.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "openmp.py"), "--tiny", "--steps", "1"]
    subprocess.run([*script, "--rounds", "1", "--output", str(output)], check=True)
    rows = json.loads(output.read_text())["rows"]
    cases = [(row["threads"], row["GOMP_SPINCOUNT"]) for row in rows]
    spins = ("0", "100", "1000", "10000", "not set")
    assert cases == [*((2, each) for each in spins), (1, "not set")]
    assert all(row["alone, tokens/s"] > 0 < row["beside a busy process"] for row in rows)
