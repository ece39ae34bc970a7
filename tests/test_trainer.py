"""Memories are carried from step to step, by row, through everything that the Trainer does."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten
from transformers import TrainingArguments

from melodi_hf import (
    MelodiConfig,
    MelodiForCausalLM,
    TransformerXLConfig,
    TransformerXLForCausalLM,
)
from melodi_hf.data.segments import Segments
from melodi_hf.trainer import (
    PAPER_ADAFACTOR,
    MemoryTrainer,
    load_memory,
    paper_schedule,
    save_memory,
)

WINDOW, SEGMENT, ROWS, VOCABULARY = 8, 16, 2, 32
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "window_length": WINDOW,
}


def melodi(dropout=0.0):
    torch.manual_seed(1)
    config = MelodiConfig(
        **SIZES,
        num_summary_tokens=4,
        num_short_memory_tokens=4,
        long_memory_layers=[1],
        num_long_memory_tokens=2,
        long_memory_windows=8,
        dropout=dropout,
        attention_dropout=dropout,
    )
    return MelodiForCausalLM(config)


def transformer_xl():
    torch.manual_seed(1)
    return TransformerXLForCausalLM(
        TransformerXLConfig(**SIZES, dropout=0.0, attention_dropout=0.0)
    )


def segments(seed=0, rows=ROWS, lengths=(80, 37, 64, 50, 71, 90)):
    generator = np.random.default_rng(seed)
    documents = [generator.integers(2, VOCABULARY, length) for length in lengths]
    return Segments(documents, segment_length=SEGMENT, num_rows=rows, start_id=0, pad_id=1)


def make_trainer(
    folder, model=None, *, rows=ROWS, data=None, evaluated=None, schedule=None, **given
):
    optimizer, callbacks = (given.pop(x, None) for x in ("optimizer_cls_and_kwargs", "callbacks"))
    arguments = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": ROWS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "dataloader_drop_last": True,
        "dataloader_pin_memory": False,
        "include_num_input_tokens_seen": "all",
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
        **given,
    }
    return MemoryTrainer(
        model or melodi(),
        TrainingArguments(**arguments),
        train_dataset=data or segments(rows=rows),
        eval_dataset=evaluated,
        schedule=schedule,
        optimizer_cls_and_kwargs=optimizer,
        callbacks=callbacks,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def batches(data, count):
    for step in range(count):
        items = [data[step * ROWS + row] for row in range(ROWS)]
        yield {name: torch.stack([item[name] for item in items]) for name in items[0]}


def losses_by_hand(model, data, count, *, carry=True, reset=True):
    """What a loop gives that an undergraduate would write."""
    memory, found = None, []
    for batch in batches(data, count):
        if not reset:
            batch["reset_memory"] = torch.zeros(ROWS, dtype=torch.bool)
        with torch.no_grad():
            output = model(**batch, memory=memory, return_memory=True)
        memory = output.memory if carry else None
        found.append(output.loss.item())
    return found


@pytest.mark.parametrize("make_model", [melodi, transformer_xl])
def test_memory_is_carried_and_reset_as_by_hand(tmp_path, make_model):
    # A learning rate of 0 keeps the model as it is, so that steps can be compared one by one.
    trainer = make_trainer(tmp_path, make_model(), learning_rate=0.0)
    trainer.train()
    model, data = make_model().train(), segments()
    expected = losses_by_hand(model, data, 6)
    assert_close(losses(trainer), expected, atol=1e-6, rtol=0)
    assert max(abs(np.subtract(expected, losses_by_hand(model, data, 6, carry=False)))) > 1e-3
    assert max(abs(np.subtract(expected, losses_by_hand(model, data, 6, reset=False)))) > 1e-3


def test_evaluation_in_between_leaves_training_as_it_was(tmp_path):
    alone = make_trainer(tmp_path)
    alone.train()
    observed = make_trainer(
        tmp_path, evaluated=segments(seed=1), eval_strategy="steps", eval_steps=2
    )
    observed.train()
    assert losses(observed) == losses(alone)
    evaluated = [e["eval_loss"] for e in observed.state.log_history if "eval_loss" in e]
    assert len(evaluated) == 3
    assert observed.evaluate()["eval_loss"] == evaluated[-1], "each begins with an empty memory"


def test_evaluation_counts_every_target_once(tmp_path):
    # Segments hold from 1 to 16 targets: a mean over batches would differ.
    evaluated = segments(seed=1, lengths=(17, 33, 60, 19))
    trainer = make_trainer(tmp_path, evaluated=evaluated)
    model, memory, nll, targets, by_batch = melodi().eval(), None, 0.0, 0, []
    for batch in batches(evaluated, evaluated.num_steps):
        with torch.no_grad():
            output = model(**batch, memory=memory, return_memory=True)
        count = (batch["shift_labels"] != -100).sum().item()
        memory, nll, targets = output.memory, nll + output.loss.item() * count, targets + count
        by_batch.append(output.loss.item())
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(nll / targets, abs=1e-6)
    assert abs(nll / targets - np.mean(by_batch)) > 1e-4
    (logged,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged["eval_perplexity"] == pytest.approx(math.exp(nll / targets))


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_resumed_run_equals_one_that_never_stopped(tmp_path, optimizer):
    given = {"save_strategy": "steps", "save_steps": 3}
    if optimizer == "adafactor":
        kind, options = PAPER_ADAFACTOR
        given["optimizer_cls_and_kwargs"] = (kind, {**options, "lr": 1e-2})
        given["schedule"] = paper_schedule
    whole = make_trainer(tmp_path / "whole", melodi(dropout=0.1), **given)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = make_trainer(tmp_path / "resumed", melodi(dropout=0.1), **given)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_close(losses(resumed)[3:], losses(whole)[3:], atol=1e-6, rtol=0)
    assert (resumed.state.num_input_tokens_seen, resumed.state.global_step) == (
        whole.state.num_input_tokens_seen,
        whole.state.global_step,
    )
    # The opposite: without the memory the run would have gone on otherwise.
    empty = resumed.model.base_model.empty_memory(ROWS)
    save_memory(empty, checkpoint / "memory_0.safetensors")
    forgetful = make_trainer(tmp_path / "forgetful", melodi(dropout=0.1), **given)
    forgetful.train(resume_from_checkpoint=str(checkpoint))
    assert abs(losses(forgetful)[3] - losses(whole)[3]) > 1e-4


def test_checkpoint_without_its_memory_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=3, max_steps=3)
    trainer.train()
    (tmp_path / "checkpoint-3" / "memory_0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"memory_0.safetensors is missing"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_memory_of_another_model_is_refused(tmp_path):
    model = melodi()
    memory = model(torch.zeros(ROWS, SEGMENT, dtype=torch.long), return_memory=True).memory
    path = tmp_path / "memory.safetensors"
    save_memory(memory, path)
    loaded = load_memory(model.base_model.empty_memory(ROWS), path, "cpu")
    assert_close(tree_flatten(loaded)[0], tree_flatten(memory)[0])
    for other in (transformer_xl().base_model.empty_memory(ROWS), model.model.empty_memory(3)):
        with pytest.raises(ValueError, match="another model or number of rows"):
            load_memory(other, path, "cpu")


def test_each_micro_batch_has_a_memory_of_its_own(tmp_path):
    """Four rows in one batch equal two and two, saved in the middle and gone on with."""
    data, half = segments(rows=4), {"rows": 2, "gradient_accumulation_steps": 2}
    large = make_trainer(tmp_path, rows=4, data=data)
    large.train()
    small = make_trainer(tmp_path, data=data, **half, save_strategy="steps", save_steps=3)
    small.train()
    assert_close(losses(small), losses(large), atol=1e-5, rtol=0)
    resumed = make_trainer(tmp_path, data=data, **half)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_close(losses(resumed), losses(large), atol=1e-5, rtol=0)
    # The opposite: rows that take over each other's memories.
    saved = tmp_path / "checkpoint-3" / "memory_0.safetensors"
    empty = [resumed.model.base_model.empty_memory(ROWS)] * 2
    first, second = load_memory(empty, saved, "cpu")
    save_memory([second, first], saved)
    torn = make_trainer(tmp_path, data=data, **half)
    torn.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert abs(losses(torn)[3] - losses(large)[3]) > 1e-4


def test_epoch_that_ends_within_a_step(tmp_path):
    """Of three micro-batches two make a step, and the last one a step of its own."""
    data = segments(rows=1)
    items = [data[i] for i in range(3)]
    micro = make_trainer(
        tmp_path, rows=1, data=items, gradient_accumulation_steps=2, max_steps=4, learning_rate=0.0
    )
    micro.train()
    model, memories, wanted = melodi().train(), [None, None], []
    for step in range(4):
        batch = items[:2] if step % 2 == 0 else items[2:]
        nll, count = 0.0, 0
        for place, item in enumerate(batch):
            given = {name: x[None] for name, x in item.items()}
            with torch.no_grad():
                output = model(**given, memory=memories[place], return_memory=True)
            memories[place] = output.memory
            targets = (given["shift_labels"] != -100).sum().item()
            nll, count = nll + output.loss.item() * targets, count + targets
        wanted.append(nll / count)
    assert_close(losses(micro), wanted, atol=1e-5, rtol=0)


def test_figures_are_logged(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    tokens = [entry["num_input_tokens_seen"] for entry in entries]
    assert tokens == [ROWS * SEGMENT * step for step in range(1, 7)]
    for entry in entries:
        assert entry["perplexity"] == pytest.approx(math.exp(entry["loss"]))
        assert entry["tokens_per_second"] > 0


def test_bar_shows_loss_and_speed(tmp_path, capsys):
    trainer = make_trainer(tmp_path, disable_tqdm=False, max_steps=2)
    trainer.train()
    shown = capsys.readouterr().err
    assert f"loss={losses(trainer)[-1]:.3f}" in shown
    assert "tokens/s=" in shown


def test_loss_that_is_no_number_stops_the_run(tmp_path):
    model = melodi()
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    trainer = make_trainer(tmp_path, model, logging_nan_inf_filter=False)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        trainer.train()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_sampling_strategy": "random"}, "give train_sampling_strategy='sequential'"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy is 'group_by_l"),
        ({"dataloader_drop_last": False}, "give dataloader_drop_last=True"),
        ({"label_smoothing_factor": 0.1}, "give label_smoothing_factor=0.0"),
        ({"data": segments(rows=3)}, r"num_rows=3, but a step has 2 \(2 in each of 1 micro"),
        ({"evaluated": segments(rows=4)}, r"num_rows=4, but a step has 2 \(2 in each"),
    ],
)
def test_what_would_tear_rows_from_memories_is_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **given)


def test_data_parallel_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="torchrun --nproc-per-node=2"):
        make_trainer(tmp_path)


def test_weight_decay_spares_what_is_not_a_matrix(tmp_path):
    trainer = make_trainer(tmp_path, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    decays = {id(w): g["weight_decay"] for g in optimizer.param_groups for w in g["params"]}
    for name, weight in trainer.model.named_parameters():
        assert decays[id(weight)] == (0.1 if weight.ndim > 1 else 0.0), name


def test_schedule_of_the_paper():
    total = 500_000
    cosine = lambda part: 0.001 + 0.009 * (1 + math.cos(math.pi * part)) / 2  # noqa: E731
    expected = {
        0: 0.0,
        1: cosine(1000 / total) / 1000,  # the cosine began with the warm-up and waits for its end
        500: cosine(1000 / total) / 2,
        999: cosine(1000 / total) * 0.999,
        1000: cosine(1000 / total),
        2000: cosine(2000 / total),
        125_000: cosine(0.25),
        250_000: 0.0055,
        375_000: cosine(0.75),
        499_999: cosine(1 - 1 / total),
        500_000: 0.001,
        750_000: 0.002 * 0.5**1.5,
        1_000_000: 0.0005,
    }
    for step, rate in expected.items():
        assert paper_schedule(step, total) == pytest.approx(rate, rel=1e-12), step
    assert paper_schedule(499_999, total) == pytest.approx(paper_schedule(500_000, total), abs=1e-9)
    assert paper_schedule(0, 10, peak=1.0, floor=0.1, warmup=0) == pytest.approx(1.0)


def test_optimizer_and_schedule_of_the_paper_are_those_that_run(tmp_path):
    kind, options = PAPER_ADAFACTOR
    trainer = make_trainer(
        tmp_path,
        optimizer_cls_and_kwargs=(kind, {**options, "lr": 0.01}),
        schedule=lambda step, total: paper_schedule(step, total, 0.01, 0.001, 4),
        learning_rate=0.01,
        max_grad_norm=0.0,
    )
    trainer.train()
    (group, *_) = trainer.optimizer.param_groups
    assert group["beta1"] == 0.9
    assert not group["relative_step"]
    assert group["scale_parameter"]
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert_close(rates, [paper_schedule(step, 6, 0.01, 0.001, 4) for step in range(6)])


def test_adafactor_follows_its_rule():
    """One parameter, by hand: root mean squares of gradient, update and weight; then momentum."""
    kind, options = PAPER_ADAFACTOR
    weight = torch.nn.Parameter(torch.randn(5))
    optimizer = kind([weight], **{**options, "lr": 0.01})
    value, second, momentum = weight.detach().clone(), torch.zeros(5), torch.zeros(5)
    for step in range(1, 5):
        gradient = torch.randn(5)
        weight.grad = gradient.clone()
        optimizer.step()
        decay = 1 - step**-0.8
        second = decay * second + (1 - decay) * (gradient**2 + 1e-30)
        update = gradient / second.sqrt()
        update = update / max(1.0, update.square().mean().sqrt().item())
        update = update * 0.01 * max(1e-3, value.square().mean().sqrt().item())
        momentum = 0.9 * momentum + 0.1 * update
        value = value - momentum
        assert_close(weight.detach(), value)
