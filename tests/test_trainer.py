"""Memories are carried from step to step, by row, through everything that the Trainer does."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten
from transformers import TrainerCallback, TrainingArguments

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

from .cases import every_case

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


OF_TRAINER = (
    "optimizer_cls_and_kwargs",
    "callbacks",
    "compute_metrics",
    "compute_loss_func",
    "preprocess_logits_for_metrics",
)


def make_trainer(
    folder, model=None, *, rows=ROWS, data=None, evaluated=None, schedule=None, **given
):
    others = {name: given.pop(name) for name in OF_TRAINER if name in given}
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
        **others,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def labelled(steps=6, rows=ROWS, length=SEGMENT):
    """Data as other language models take it: each row goes on reading one document."""
    generator = torch.Generator().manual_seed(3)
    items = []
    for i in range(steps * rows):
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: 3 + i % 5] = -100  # so that a mean over batches is another one
        items.append({"input_ids": ids, "labels": labels})
    return items


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
        with pytest.raises(ValueError, match="another model or batch size"):
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


@every_case(
    ("given", "message"),
    [
        ({"train_sampling_strategy": "random"}, "pass train_sampling_strategy='sequential'"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_l"),
        ({"dataloader_drop_last": False}, "pass dataloader_drop_last=True"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.0"),
        ({"data": segments(rows=3)}, r"num_rows=3, but a step has 2 rows \(2 x 1 micro"),
        ({"evaluated": segments(rows=4)}, r"num_rows=4, but a step has 2 rows \(2 x"),
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


# Data with `labels`


@pytest.mark.parametrize("kind", ["list", "datasets.Dataset"])
def test_labels_are_shifted_by_the_model(tmp_path, kind):
    data = labelled()
    if kind == "datasets.Dataset":
        columns = {name: [item[name].tolist() for item in data] for name in data[0]}
        given = Dataset.from_dict(columns | {"text": ["not for the model"] * len(data)})
    else:
        given = data
    trainer = make_trainer(tmp_path, data=given, evaluated=given, learning_rate=0.0)
    trainer.train()
    model, memory, expected, counts = melodi().train(), None, [], []
    for batch in batches(data, 6):
        with torch.no_grad():
            output = model(**batch, memory=memory, return_memory=True)
            logits = output.logits[:, :-1].flatten(0, 1)
        memory, targets = output.memory, batch["labels"][:, 1:].flatten()
        expected.append(cross_entropy(logits, targets).item())
        counts.append((targets != -100).sum().item())
    assert_close(losses(trainer), expected, atol=1e-6, rtol=0)
    mean = np.average(expected, weights=counts)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mean, abs=1e-6)
    assert abs(mean - np.mean(expected)) > 1e-4


@pytest.mark.parametrize("names", [("labels",), ("shift_labels",), ("labels", "shift_labels")])
def test_targets_of_a_step_count_once_whatever_they_are_called(tmp_path, names):
    """Four rows in one batch equal two and two, each padded to one length on the left."""
    data = []
    for i, item in enumerate(labelled(rows=4)):
        padding = (5 * i) % 7
        ids = torch.cat((torch.zeros(padding, dtype=torch.long), item["input_ids"]))[:SEGMENT]
        mask = (torch.arange(SEGMENT) >= padding).long()
        labels = ids.masked_fill(mask == 0, -100)
        shifted = torch.cat((labels[1:], torch.tensor([-100])))
        both = {"labels": labels, "shift_labels": shifted}
        data.append({"input_ids": ids, "attention_mask": mask, **{n: both[n] for n in names}})
    large = make_trainer(tmp_path, rows=4, data=data)
    large.train()
    small = make_trainer(tmp_path, data=data, gradient_accumulation_steps=2)
    small.train()
    assert_close(losses(small), losses(large), atol=1e-5, rtol=0)
    alone, count = 0.0, 0
    for item in data[:4]:  # without the padding: the mean of the first step
        real = item["attention_mask"].bool()
        ids = item["input_ids"][real][None]
        with torch.no_grad():
            alone += melodi()(ids, labels=ids).loss.item() * (ids.numel() - 1)
        count += ids.numel() - 1
    assert losses(large)[0] == pytest.approx(alone / count, abs=1e-5)


def test_loss_of_ones_own_is_given_the_labels(tmp_path):
    def doubled(outputs, labels, num_items_in_batch):
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return 2 * cross_entropy(logits, targets, reduction="sum") / num_items_in_batch

    how = {"data": labelled(), "evaluated": labelled(), "learning_rate": 0.0}
    plain, own = (
        make_trainer(tmp_path, **how),
        make_trainer(tmp_path, **how, compute_loss_func=doubled),
    )
    plain.train()
    own.train()
    assert_close(losses(own), [2 * loss for loss in losses(plain)], atol=1e-5, rtol=0)
    wanted = 2 * plain.evaluate()["eval_loss"]
    assert own.evaluate()["eval_loss"] == pytest.approx(wanted, abs=1e-5)


def test_evaluation_without_targets_is_refused(tmp_path):
    data = [item | {"labels": torch.full_like(item["labels"], -100)} for item in labelled()]
    with pytest.raises(ValueError, match="all labels are -100"):
        make_trainer(tmp_path, evaluated=data).evaluate()
    some = labelled(steps=2) + data[: 2 * ROWS]  # the last batches have no target
    wanted = make_trainer(tmp_path, evaluated=labelled(steps=2)).evaluate()["eval_loss"]
    assert make_trainer(tmp_path, evaluated=some).evaluate()["eval_loss"] == wanted


def test_evaluation_that_would_read_nothing_is_refused(tmp_path):
    data = labelled(steps=2)
    unlabelled = [{"input_ids": item["input_ids"]} for item in data]
    for too_little in (unlabelled, data[: ROWS - 1]):
        with pytest.raises(ValueError, match=r"no loss: add labels .* at least 2 items"):
            make_trainer(tmp_path, evaluated=too_little).evaluate()


def test_rows_of_data_that_is_given_later_are_checked(tmp_path):
    trainer = make_trainer(tmp_path)
    for evaluate in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match=r"num_rows=4, but a step has 2 rows \(2 x"):
            evaluate(segments(rows=4))


# Metrics


def logits_by_hand(data, count):
    model, memory, found = melodi().eval(), None, []
    for batch in batches(data, count):
        with torch.no_grad():
            output = model(**batch, memory=memory, return_memory=True)
        memory = output.memory
        found.append(output.logits)
    return torch.cat(found)


@pytest.fixture(params=["labels", "shift_labels"])
def named(request):
    """Data of four steps, and what its targets are called."""
    data = labelled(steps=4) if request.param == "labels" else segments(seed=1, lengths=(64, 64))
    return [data[i] for i in range(4 * ROWS)], request.param


def keep(found):
    def compute_metrics(given, compute_result=True):
        found.append(given)
        return {"score": len(found)}

    return compute_metrics


def test_metrics_are_given_logits_and_labels(tmp_path, named):
    data, name = named
    found = []
    how = {"compute_metrics": keep(found), "include_for_metrics": ["inputs", "loss"]}
    trainer = make_trainer(tmp_path, evaluated=data, **how)
    metrics = trainer.evaluate()
    (given,) = found
    assert metrics["eval_score"] == 1
    assert_close(torch.tensor(given.predictions), logits_by_hand(data, 4), atol=1e-6, rtol=0)
    assert_close(torch.tensor(given.label_ids), torch.stack([item[name] for item in data]))
    assert_close(torch.tensor(given.inputs), torch.stack([item["input_ids"] for item in data]))
    assert len(given.losses) == len(data)
    without = make_trainer(tmp_path, evaluated=data).evaluate()
    assert metrics["eval_loss"] == pytest.approx(without["eval_loss"], abs=1e-6)


def test_metrics_may_be_computed_batch_by_batch(tmp_path, named):
    data, _ = named
    found = []
    how = {"compute_metrics": keep(found), "batch_eval_metrics": True}
    metrics = make_trainer(tmp_path, evaluated=data, **how).evaluate()
    assert metrics["eval_score"] == 4
    logits = torch.cat([given.predictions for given in found])
    assert_close(logits, logits_by_hand(data, 4), atol=1e-6, rtol=0)


def test_logits_may_be_made_smaller_before_they_are_kept(tmp_path, named):
    data, _ = named
    found = []
    make_trainer(
        tmp_path,
        evaluated=data,
        compute_metrics=keep(found),
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        eval_do_concat_batches=False,
    ).evaluate()
    assert_close(
        torch.cat([torch.tensor(x) for x in found[0].predictions]),
        logits_by_hand(data, 4).argmax(-1),
    )


def test_logits_are_made_if_asked_for_only(tmp_path, named):
    data, _ = named
    trainer = make_trainer(tmp_path, evaluated=data)
    made = []
    trainer.model.register_forward_hook(lambda *given: made.append(given[-1].logits is not None))
    trainer.evaluate()
    assert made == [False] * 4
    with pytest.raises(ValueError, match="but prediction_loss_only is True"):
        make_trainer(tmp_path, compute_metrics=keep([]), prediction_loss_only=True)


def test_prediction_carries_the_memory(tmp_path, named):
    data, name = named
    wanted = logits_by_hand(data, 4)
    found = make_trainer(tmp_path).predict(data)
    assert_close(torch.tensor(found.predictions), wanted, atol=1e-6, rtol=0)
    assert_close(torch.tensor(found.label_ids), torch.stack([item[name] for item in data]))
    assert "test_loss" in found.metrics
    found = make_trainer(tmp_path).predict(data, ignore_keys=["attentions"])
    assert_close(torch.tensor(found.predictions), wanted, atol=1e-6, rtol=0)
    unlabelled = [{k: x for k, x in item.items() if k != name} for item in data]
    found = make_trainer(tmp_path).predict(unlabelled)
    assert_close(torch.tensor(found.predictions), wanted, atol=1e-6, rtol=0)
    assert found.label_ids is None
    assert "test_loss" not in found.metrics


def test_interrupted_evaluation_leaves_nothing_behind(tmp_path):
    class Interrupt(TrainerCallback):
        def on_prediction_step(self, *args, **kwargs):
            raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, evaluated=labelled(steps=4))
    wanted = trainer.evaluate()["eval_loss"]
    assert trainer._memory["evaluation"] == [None], "it is held no longer than it is needed"
    trainer.add_callback(Interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    trainer.remove_callback(Interrupt)
    assert trainer.evaluate()["eval_loss"] == wanted


# As a newcomer starts


def test_arguments_of_the_readme(tmp_path):
    """A tokenizer without padding; no word of counting tokens; a model to be generated with."""
    generator = np.random.default_rng(0)
    documents = [generator.integers(2, VOCABULARY, length) for length in (80, 37, 64)]
    data = Segments(documents, segment_length=SEGMENT, num_rows=ROWS, start_id=0, pad_id=None)
    padded = Segments(documents, segment_length=SEGMENT, num_rows=ROWS, start_id=0, pad_id=1)
    model = melodi()
    trainer = make_trainer(
        tmp_path, model, data=data, include_num_input_tokens_seen=False, save_strategy="epoch"
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["tokens_per_second"] > 0 for entry in entries)
    other = make_trainer(tmp_path, data=padded)
    other.train()
    assert losses(other) == losses(trainer), "padding is never scored, and read last"
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, *tmp_path.glob("checkpoint-*")):
        assert MelodiConfig.from_pretrained(folder).use_cache


@pytest.mark.parametrize("use_cache", [False, True])
def test_use_cache_stays_as_it_was(tmp_path, use_cache):
    model = melodi()
    model.config.use_cache = use_cache
    trainer = make_trainer(tmp_path, model, max_steps=1)
    trainer.train()
    assert trainer.whole_model().config.use_cache is use_cache
