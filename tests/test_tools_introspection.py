"""What transformers finds out about a model by looking at its attributes and signature."""

import re
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from .models import DOCUMENT, VOCABULARY, WINDOW, assert_near, build, draw

TESTS = Path(__file__).parent
ARGUMENTS = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 2,
    "max_steps": 1,
    "learning_rate": 0.0,  # so that the model stays as it is
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "report_to": "none",
    "dataloader_pin_memory": False,
}


def make_trainer(folder, model, rows, **given):
    data = [{"input_ids": ids, "labels": ids} for ids in rows]
    arguments = TrainingArguments(output_dir=str(folder), **ARGUMENTS | given)
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data)


@pytest.mark.parametrize("name", ["melodi", "transformer_xl"])
def test_micro_batches_are_divided_by_the_targets_of_all(tmp_path, name):
    """`loss_type` and the `**kwargs` of forward: targets are counted, and the count is passed."""
    rows = [draw(WINDOW), draw(3 * WINDOW)]
    trainer = make_trainer(tmp_path, build(name), rows, gradient_accumulation_steps=2)
    trainer.train()
    (loss,) = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    sums = [build(name)(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows]
    assert loss == pytest.approx(sum(sums).item() / (4 * WINDOW - 2), abs=1e-5)


def test_tokens_of_the_main_input_are_counted(tmp_path):
    trainer = make_trainer(
        tmp_path, build("melodi"), [draw(DOCUMENT)], include_num_input_tokens_seen="all"
    )
    trainer.train()
    assert trainer.state.num_input_tokens_seen == DOCUMENT
    assert trainer.state.total_flos > 0


def test_predictions_are_logits_alone(tmp_path):
    """`keys_to_ignore_at_inference`: neither caches nor memories are collected."""
    model, rows = build("melodi"), draw(2, DOCUMENT)
    trainer = make_trainer(tmp_path, model, rows, label_names=["labels"])
    predicted = trainer.predict(trainer.eval_dataset).predictions
    assert predicted.shape == (2, DOCUMENT, VOCABULARY)
    with torch.no_grad():
        assert_near(torch.from_numpy(predicted), model(rows).logits)


def test_generation_makes_logits_of_the_last_column_alone():
    """`logits_to_keep` in the signature of forward."""
    model, ids = build("melodi"), draw(2, DOCUMENT)
    columns = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: columns.append(inputs[0].shape[1]))
    model.generate(ids, max_new_tokens=4, do_sample=False)
    assert columns == [1] * 4


def test_both_ends_stay_tied_when_the_vocabulary_grows():
    """`_tied_weights_keys`, `get_output_embeddings` and `set_output_embeddings`."""
    model = build("melodi")
    model.resize_token_embeddings(VOCABULARY + 7)
    assert model(draw(1, 5)).logits.shape[-1] == model.config.vocab_size == VOCABULARY + 7
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_tests_that_the_table_names_exist():
    text = (TESTS.parent / "CONTRIBUTING.md").read_text()
    table = text.partition("## What other libraries read from a model\n")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        tests = row.rsplit("|", 2)[1]
        files = [TESTS / name for name in re.findall(r"test_\w+\.py", tests)]
        sources = "".join(file.read_text() for file in files)
        assert files, row
        for name in re.findall(r"(?<![\w/])test_\w+(?!\w|\.py)", tests):
            assert f"def {name}(" in sources, name
