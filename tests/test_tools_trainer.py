"""transformers' own Trainer: rows begin again at every step, and all options work."""

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.testing import assert_close
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from melodi_hf.data.segments import Segments

from .models import DOCUMENT, EACH, VOCABULARY, build, draw
from .text import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings(  # PEFT's own call
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

ROWS, STEPS = 2, 4
SEGMENTS = {"segment_length": 8, "num_rows": ROWS, "start_id": 1, "pad_id": 0}


def documents():
    torch.manual_seed(7)
    return [{"input_ids": ids, "labels": ids} for ids in draw(ROWS * STEPS, DOCUMENT)]


def make_trainer(folder, model, *, data=None, metrics=None, collator=None, **given):
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS,
        "per_device_eval_batch_size": ROWS,
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
    return Trainer(
        model,
        TrainingArguments(**arguments),
        data_collator=collator,
        train_dataset=data or documents(),
        eval_dataset=data or documents(),
        compute_metrics=metrics,
    )


def train(folder, model, **given):
    trainer = make_trainer(folder, model, **given)
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
    return [
        rows.mean().item() + (0.0 if smoothing else auxiliary(model, batch, labels=batch))
        for rows, batch in batches
    ]


def auxiliary(model, input_ids, **given):
    """What the model is trained on besides; with smoothing the Trainer makes a loss of its own."""
    added = getattr(model.train()(input_ids, **given), "aux_loss", None)
    return 0.0 if added is None else added.item()


@pytest.mark.parametrize("name", ["melodi", "compressive_transformer"])
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


# Evaluation


class Metrics:
    """A `compute_metrics` that keeps what it was given."""

    def __call__(self, given):
        self.predictions, self.labels = given.predictions, given.label_ids
        hits = given.predictions[:, :-1].argmax(-1) == given.label_ids[:, 1:]
        return {"accuracy": hits.mean().item()}


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"vocab_size": VOCABULARY, "num_attention_heads": 2, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **changes))


def lora(model):
    how = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, **how))


def evaluated_by_hand(model, data):
    """Logits of all documents, read alone, and the mean loss of their targets."""
    model.eval()
    with torch.no_grad():
        outputs = [model(**{name: x[None] for name, x in item.items()}) for item in data]
    targets = [(item["labels"][1:] != -100).sum().item() for item in data]
    nll = sum(out.loss.item() * count for out, count in zip(outputs, targets, strict=True))
    return [out.logits[0] for out in outputs], nll / sum(targets)


MODELS = {
    "melodi": lambda **how: build("melodi", **how),
    "compressive_transformer": lambda **how: build("compressive_transformer", **how),
    "llama": llama,
    "melodi, LoRA": lambda **how: lora(build("melodi", **how)),
}


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, {}) for name in MODELS]
    + [("melodi", {"use_cache": True}), ("melodi", {"eval_accumulation_steps": 1})],
)
def test_evaluation_has_a_loss_and_metrics(tmp_path, name, how):
    model, metrics = MODELS[name](), Metrics()
    found = make_trainer(tmp_path, model, metrics=metrics, **how).evaluate()
    logits, loss = evaluated_by_hand(model, documents())
    assert found["eval_loss"] == pytest.approx(loss, abs=1e-5)
    assert_close(torch.tensor(metrics.predictions), torch.stack(logits), atol=1e-5, rtol=0)
    labels = torch.stack([document["labels"] for document in documents()])
    assert_close(torch.tensor(metrics.labels), labels)
    hits = torch.stack(logits)[:, :-1].argmax(-1) == labels[:, 1:]
    assert found["eval_accuracy"] == pytest.approx(hits.float().mean().item())


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_prediction_returns_logits_and_labels(tmp_path, make):
    model = make()
    found = make_trainer(tmp_path, model).predict(documents())
    logits, loss = evaluated_by_hand(model, documents())
    assert found.metrics["test_loss"] == pytest.approx(loss, abs=1e-5)
    assert_close(torch.tensor(found.predictions), torch.stack(logits), atol=1e-5, rtol=0)
    assert found.label_ids.shape == (ROWS * STEPS, DOCUMENT)
    unlabelled = [{"input_ids": document["input_ids"]} for document in documents()]
    found = make_trainer(tmp_path, model).predict(unlabelled)
    assert_close(torch.tensor(found.predictions), torch.stack(logits), atol=1e-5, rtol=0)
    assert found.label_ids is None


class Spoil(TrainerCallback):
    """Adds noise to the trained weights after two steps."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 2:
            for weight in model.parameters():
                weight.data += weight.requires_grad * torch.randn_like(weight)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_best_model_is_loaded_at_the_end(tmp_path, make):
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, make(), load_best_model_at_end=True, **steps)
    trainer.add_callback(Spoil)
    trainer.train()
    evaluated = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert len(evaluated) == STEPS
    assert evaluated[-1] > evaluated[0] + 1e-3
    assert trainer.state.best_metric == min(evaluated)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluated), abs=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_collator_for_language_modeling_pads_rows(tmp_path, make, side):
    """The losses are those of the documents alone, each target counted once."""
    torch.manual_seed(7)
    lengths = (DOCUMENT, 9, 12, 20, 17, 6, 23, 14)
    data = [{"input_ids": draw(length).tolist()} for length in lengths]
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    model = make()
    given = {"data": data, "collator": collator}
    trainer = make_trainer(tmp_path, model, metrics=Metrics(), **given)
    assert trainer.predict(data).predictions.shape == (len(data), DOCUMENT, VOCABULARY)
    if isinstance(model, LlamaForCausalLM) and side == "left":
        return  # it scores the first token of a row, after padding
    alone = [{"input_ids": x, "labels": x} for x in (torch.tensor(d["input_ids"]) for d in data)]
    batches = [alone[i : i + ROWS] for i in range(0, len(alone), ROWS)]
    losses = [evaluated_by_hand(model, batch)[1] for batch in batches]
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    trained = train(tmp_path, model, **given)
    added = [auxiliary(model, **collator(data[i : i + ROWS])) for i in range(0, len(data), ROWS)]
    assert_close(trained, [a + b for a, b in zip(losses, added, strict=True)], atol=1e-5, rtol=0)


def test_targets_that_are_shifted_already(tmp_path):
    """As `Segments` has them: the Trainer needs their name."""
    data = Segments([d["input_ids"][:24] for d in documents()], **SEGMENTS)
    model, given = build("melodi"), {"data": data, "label_names": ["shift_labels"]}
    items = [data[i] for i in range(len(data))]
    with torch.no_grad():
        outputs = [model(**{name: x[None] for name, x in item.items()}) for item in items]
    batches = list(zip(outputs[::2], outputs[1::2], strict=True))  # all items have 8 targets
    losses = [(first.loss + second.loss).item() / 2 for first, second in batches]
    metrics = Metrics()
    found = make_trainer(tmp_path, model, metrics=metrics, **given).evaluate()
    assert found["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert_close(torch.tensor(metrics.predictions), torch.cat([out.logits for out in outputs]))
    assert_close(torch.tensor(metrics.labels), torch.stack([x["shift_labels"] for x in items]))
    trained = train(tmp_path, model, max_steps=len(losses), **given)
    assert_close(trained, losses, atol=1e-5, rtol=0)
