"""transformers' own Trainer: rows begin anew at every step, and every option means what it says."""

import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from .models import DOCUMENT, EACH, build, draw

ROWS, STEPS = 2, 4


def documents():
    torch.manual_seed(7)
    return [{"input_ids": ids, "labels": ids} for ids in draw(ROWS * STEPS, DOCUMENT)]


def train(folder, model, **given):
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS,
        "train_sampling_strategy": "sequential",
        "learning_rate": 0.0,  # so that the model stays as it is
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
        **given,
    }
    trainer = Trainer(model, TrainingArguments(**arguments), train_dataset=documents())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def losses_by_hand(model, smoothing=0.0):
    """Cross-entropy of each token but the first, with part of the target spread over all tokens."""
    ids = torch.stack([document["input_ids"] for document in documents()])
    with torch.no_grad():
        logits = model.eval()(ids).logits[:, :-1]
    log_probabilities, targets = logits.log_softmax(-1), ids[:, 1:]
    chosen = -log_probabilities.gather(-1, targets[..., None])[..., 0]
    loss = (1 - smoothing) * chosen - smoothing * log_probabilities.mean(-1)
    batches = zip(loss.split(ROWS), ids.split(ROWS), strict=True)
    return [rows.mean().item() + auxiliary(model, batch, smoothing) for rows, batch in batches]


def auxiliary(model, ids, smoothing):
    """What the model is trained on besides; with smoothing the Trainer makes a loss of its own."""
    added = model.train()(ids, labels=ids).aux_loss
    return 0.0 if added is None or smoothing else added.item()


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_are_those_computed_by_hand(tmp_path, name, smoothing):
    model = build(name)
    found = train(tmp_path, model, label_smoothing_factor=smoothing)
    assert_close(found, losses_by_hand(model, smoothing), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", EACH)
def test_training_lowers_the_loss(tmp_path, name):
    losses = train(tmp_path, build(name), learning_rate=1e-2, num_train_epochs=5, max_steps=-1)
    assert len(losses) == 5 * STEPS
    assert sum(losses[-STEPS:]) < 0.9 * sum(losses[:STEPS])
