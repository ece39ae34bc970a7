"""A run that is killed goes on from its last whole checkpoint as if it had never been stopped."""

import copy
import json
import signal
from pathlib import Path

import pytest
import torch
import train
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from record import lock_output
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten

from benchmarks import kill_and_resume
from benchmarks.kill_and_resume import (
    SCENARIOS,
    TrainingProcess,
    make_command,
    without_times,
    write_texts,
)
from melodi_hf import trainer as trainer_module
from melodi_hf.checkpoints import (
    MANIFEST,
    incomplete_reason,
    last_complete_checkpoint,
    mark_complete,
    remove_old_checkpoints,
)
from melodi_hf.trainer import PAPER_ADAFACTOR, load_memory, paper_schedule, save_memory

from .test_trainer import ROWS, SEGMENT, labelled, losses, make_trainer, melodi, segments

SHORT = {
    "training.steps": 12,
    "training.gradient_accumulation_steps": 2,
    "training.log_every": 3,
    "training.save_every": 4,
    "training.evaluate_every": 5,
    "evaluation.max_documents": 1,
}


pytestmark = pytest.mark.xdist_group("resume")  # the run that never stops runs once


@pytest.fixture
def three(tmp_path):
    """The folder of a run with three whole checkpoints."""
    for step in (5, 10, 15):
        checkpoint = tmp_path / f"checkpoint-{step}"
        (checkpoint / "part").mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(bytes(100))
        (checkpoint / "part" / "optimizer.pt").write_bytes(bytes(200))
        mark_complete(checkpoint, num_processes=2)
    return tmp_path


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The command of a run of seconds, whose folder is to be added."""
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    scenario = SCENARIOS["AdamW, cosine, two micro-batches"]._replace(recipe=SHORT)

    def command(run, resume=False):
        return [str(x) for x in make_command(scenario, folder, run, resume)]

    return command


@pytest.fixture(scope="module")
def whole(short, tmp_path_factory):
    """What that run leaves if it is never stopped."""
    run = tmp_path_factory.mktemp("whole")
    in_this_process(short(run))
    return left_by(run)


def in_this_process(command):
    train.main(command[2:])


def refused(command, capsys):
    with pytest.raises(SystemExit):
        in_this_process(command)
    return " ".join(capsys.readouterr().err.split())


def left_by(run):
    """What must be equal bit by bit."""
    results = without_times(json.loads((run / "results.json").read_text()))
    return results, (run / "model.safetensors").read_bytes()


def figures(trainer):
    return without_times(trainer.state.log_history)


def weights(trainer):
    return {name: weight.tolist() for name, weight in trainer.model.state_dict().items()}


# Which checkpoint is gone on from


def cut(path):
    path.write_bytes(path.read_bytes()[:50])


def change_a_byte(path):
    path.write_bytes(bytes(99) + b"1")


@pytest.mark.parametrize(
    ("damage", "name", "flaw"),
    [
        (Path.unlink, MANIFEST, "it is incomplete"),
        (Path.unlink, "part/optimizer.pt", "part/optimizer.pt is missing"),
        (cut, "model.safetensors", "model.safetensors has 50 bytes instead of 100"),
        (change_a_byte, "model.safetensors", "model.safetensors has changed since it was written"),
        (cut, MANIFEST, "its whole.json cannot be read"),
    ],
)
def test_checkpoint_that_is_not_whole_is_passed_over(three, damage, name, flaw):
    assert last_complete_checkpoint(three) == (three / "checkpoint-15", {})
    damage(three / "checkpoint-15" / name)
    found, flaws = last_complete_checkpoint(three)
    assert found == three / "checkpoint-10"
    assert list(flaws) == [three / "checkpoint-15"]
    assert flaws[three / "checkpoint-15"].startswith(flaw)


def test_there_may_be_no_whole_checkpoint(three):
    for checkpoint in three.iterdir():
        (checkpoint / MANIFEST).rename(checkpoint / f"{MANIFEST}.unfinished")
    found, flaws = last_complete_checkpoint(three)
    assert found is None
    assert len(flaws) == 3


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [(None, None, {5, 10, 15}), (2, None, {10, 15}), (1, None, {15}), (1, "checkpoint-5", {5, 15})],
)
def test_earlier_checkpoints_are_removed(three, limit, best, kept):
    remove_old_checkpoints(three / "checkpoint-15", limit, best)
    assert {path.name for path in three.iterdir()} == {f"checkpoint-{step}" for step in kept}


def test_damaged_checkpoint_does_not_outlive_the_next_ones(three):
    """Gone on from step 10, a run writes 12 first: what is left at 15 must not displace it."""
    cut(three / "checkpoint-15" / "model.safetensors")
    (three / "checkpoint-10").rename(three / "checkpoint-12")
    remove_old_checkpoints(three / "checkpoint-12", limit=1)
    assert last_complete_checkpoint(three)[0] == three / "checkpoint-12"


def test_last_whole_checkpoint_stays_until_the_next_is_whole(tmp_path, monkeypatch):
    def power_cut(checkpoint, num_processes):
        if checkpoint.name == "checkpoint-4":
            raise KeyboardInterrupt
        mark_complete(checkpoint, num_processes)

    given = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "mark_complete", power_cut)
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path, **given).train()
    assert last_complete_checkpoint(tmp_path)[0] == tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-4" / "of another life").write_text("")
    trainer = make_trainer(tmp_path, **given)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.args.save_total_limit == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


def test_files_of_another_life_are_removed(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "memory_1.safetensors").write_text("")
    make_trainer(tmp_path, save_strategy="steps", save_steps=3, max_steps=3).train()
    assert incomplete_reason(tmp_path / "checkpoint-3") is None
    assert not (tmp_path / "checkpoint-3" / "memory_1.safetensors").exists()


def test_what_cannot_be_gone_on_from_is_refused(tmp_path, three):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"written by 2 process.* torchrun --nproc-per-node=2"):
        trainer.train(resume_from_checkpoint=True)
    (three / "checkpoint-15" / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"cannot resume from .*checkpoint-15: it is incompl"):
        trainer.train(resume_from_checkpoint=str(three / "checkpoint-15"))
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        make_trainer(tmp_path / "empty").train(resume_from_checkpoint=True)


# Going on is exact


@pytest.mark.parametrize(("optimizer", "checkpoint"), [("adamw", 2), ("adafactor", 4)])
def test_figures_and_weights_are_those_of_a_run_that_never_stopped(tmp_path, optimizer, checkpoint):
    """Checkpoints fall between two logs, whose mean spans them; dropout draws random numbers."""
    given = {
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 3,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "evaluated": segments(seed=1),
        "data": segments(rows=2 * ROWS),  # of two micro-batches
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    if optimizer == "adafactor":
        kind, options = PAPER_ADAFACTOR
        given["optimizer_cls_and_kwargs"] = (kind, {**options, "lr": 1e-2})
        given["schedule"] = lambda step, total: paper_schedule(step, total, warmup=2)
    whole = make_trainer(tmp_path / "whole", melodi(dropout=0.1), **given)
    whole.train()
    torch.manual_seed(5)
    resumed = make_trainer(tmp_path / "resumed", melodi(dropout=0.1), **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{checkpoint}"))
    assert len(losses(whole)) == 2
    assert figures(resumed) == figures(whole)
    assert weights(resumed) == weights(whole)
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen


ADAPTERS = {
    "LoRA": LoraConfig(target_modules="all-linear", lora_dropout=0.1),
    "LoRA, whole norms and tokens": LoraConfig(
        target_modules=["q_proj"], modules_to_save=["norm"], trainable_token_indices=[3, 5]
    ),
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=3, task_type=TaskType.CAUSAL_LM),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LoRA", "whole windows"),
        ("LoRA, whole norms and tokens", "padded"),
        ("prompt tuning", "whole windows"),
        ("none", "open windows"),
    ],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_and_open_windows_go_on_exactly(tmp_path, name, kind):
    items = labelled(length=SEGMENT if kind == "whole windows" else SEGMENT + 3)
    if kind == "padded":  # each row stands at another slot of its window
        for i, item in enumerate(items):
            item["attention_mask"] = (torch.arange(SEGMENT + 3) >= i % 5).long()

    def make(folder):
        model = melodi(dropout=0.1)
        if name in ADAPTERS:
            model = get_peft_model(model, copy.deepcopy(ADAPTERS[name]))
        given = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps"}
        data = {"data": items, "evaluated": items[: 2 * ROWS]}
        return make_trainer(tmp_path / folder, model, eval_steps=3, **given, **data)

    whole, resumed = make("whole"), make("resumed")
    before = weights(whole)
    whole.train()
    torch.manual_seed(5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert len(losses(whole)) == 6
    assert figures(resumed) == figures(whole)
    assert weights(resumed) == weights(whole) != before
    assert "queue_fill/1" in figures(whole)[0]


def test_evaluation_in_between_draws_no_random_numbers(tmp_path):
    alone = make_trainer(tmp_path, melodi(dropout=0.1))
    alone.train()
    observed = make_trainer(
        tmp_path, melodi(dropout=0.1), evaluated=segments(1), eval_strategy="steps", eval_steps=2
    )
    observed.train()
    assert losses(observed) == losses(alone)


def test_memory_goes_to_devices_that_have_an_index(tmp_path):
    """As those of several processes do."""
    memory = melodi().base_model.empty_memory(2)
    save_memory(memory, tmp_path / "memory.safetensors")
    loaded = load_memory(memory, tmp_path / "memory.safetensors", torch.device("cpu", 0))
    assert_close(tree_flatten(loaded)[0], tree_flatten(memory)[0])


# The command


def test_killed_process_goes_on_exactly(short, whole, tmp_path, capsys):
    run = tmp_path / "run"
    life = TrainingProcess(short(run), run, tmp_path / "log")
    # Beside the weights are others' files, still to be written.
    assert life.wait(lambda: (run / "checkpoint-8" / "model.safetensors").exists()), life.log
    life.kill()
    assert life.process.returncode == -signal.SIGKILL
    found, _ = last_complete_checkpoint(run)
    assert found == run / "checkpoint-4", "the second was half written"
    capsys.readouterr()
    in_this_process(short(run, resume=True))
    told = capsys.readouterr().out
    assert "checkpoint-8: it is incomplete" in told
    assert f"resuming from {run / 'checkpoint-4'}" in told
    assert left_by(run) == whole


def test_run_stopped_after_its_last_step_has_the_same_results(short, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_perplexity", interrupt)
        with pytest.raises(KeyboardInterrupt):
            in_this_process(short(run))
    in_this_process(short(run, resume=True))
    assert left_by(run) == whole
    assert whole[0]["continuation"]["written"]


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_nothing_to_go_on_from_is_told(short, whole, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "checkpoint-4").mkdir(parents=True)
    in_this_process(short(run, resume=True))
    told = capsys.readouterr().out
    assert "resuming from the beginning: " in told
    assert not list(run.glob("checkpoint-*"))
    assert left_by(run) == whole
    # Stopped once more, while its checkpoints were removed.
    (run / "checkpoint-12").mkdir()
    in_this_process(short(run, resume=True))
    assert not list(run.glob("checkpoint-*"))


def test_other_processes_and_a_folder_in_use_are_refused(short, three, capsys):
    told = refused(short(three, resume=True), capsys)
    assert "was written by 2 process(es)" in told
    assert "torchrun --nproc-per-node=2" in told
    with lock_output(three):
        told = refused(short(three / ".." / three.name / "."), capsys)
    assert "contains an interrupted run: add --resume" in told
    for checkpoint in three.glob("checkpoint-*"):
        mark_complete(checkpoint, num_processes=1)
    with lock_output(three):
        assert "is in use by another process" in refused(short(three, True), capsys)


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tmp_path):
    rows = kill_and_resume.main(["--seed", "1", "--output", str(tmp_path / "kills.json")])
    assert len(rows) == 20
    assert [row for row in rows if row["bit-equal"] != "yes"] == []
    assert sum(row["half written"] is not None for row in rows) >= 3
