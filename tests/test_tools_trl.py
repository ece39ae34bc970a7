"""TRL's trainers, which make logits of hidden states and head, train on those of the model."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from torch.nn import functional
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from .cases import every_case
from .models import assert_differ, assert_equal, assert_near, build
from .text import tiny_tokenizer

pytestmark = [  # a default and a call of TRL's
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TEXTS = ["The first document is short.", "The second is a little longer, by a few letters."] * 2
PROMPTS = ["Which is it", "And the other, which we have not seen so far"] * 2
CHOSEN = [" The first of both.", " The second."] * 2
REJECTED = [" No", " None of the two that we have seen, it seems to me."] * 2
PREFERENCES = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}
UNPAIRED = {
    "prompt": PROMPTS,
    "completion": [*CHOSEN[:2], *REJECTED[:2]],
    "label": [True, True, False, False],
}
# What trainers are given beside their configurations.
OF_TRAINERS = {"ref_model", "teacher_model", "reward_funcs", "peft_config"}


PLAIN = {"bf16": False, "gradient_checkpointing": False}  # the defaults are True


def make(trainer_class, config_class, folder, model, data, plain=True, **given):
    """A trainer whose batches are all of the data, in float32 if `plain`."""
    others = {key: given.pop(key) for key in OF_TRAINERS & given.keys()}
    arguments = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
        "use_cpu": True,
        **(PLAIN if plain else {}),
        **given,
    }
    return trainer_class(
        model,
        args=config_class(**arguments),
        train_dataset=Dataset.from_dict(data),
        processing_class=tiny_tokenizer(),
        **others,
    )


def make_sft(folder, model, **given):
    return make(SFTTrainer, SFTConfig, folder, model, {"text": TEXTS}, **given)


def only_batch(trainer):
    (batch,) = trainer.get_train_dataloader()
    return batch


def logged(trainer, name):
    """The values of one figure, step by step."""
    trainer.train()
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def log_probs(model, input_ids, attention_mask, labels):
    """Of the labels, from the logits of the model: B T-1, zero where the label is -100."""
    logits = model(input_ids, attention_mask=attention_mask).logits[:, :-1].float()
    labels = labels[:, 1:]
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return chosen.masked_fill(labels == -100, 0)


@pytest.mark.parametrize("name", ["melodi", "compressive_transformer"])
def test_sft_runs_with_its_defaults(tmp_path, name):
    trainer = make_sft(tmp_path, build(name), max_steps=2, plain=False)
    assert trainer.args.bf16
    assert trainer.args.gradient_checkpointing
    losses = logged(trainer, "loss")
    assert len(losses) == 2
    own = build(name)(**only_batch(trainer)).loss.item()
    assert abs(losses[0] - own) < 0.02 * own
    assert losses[1] < losses[0]
    before = dict(build(name).named_parameters())
    assert all(weight.dtype == torch.float32 for weight in before.values())
    same = {k for k, new in trainer.model.named_parameters() if torch.equal(new, before[k])}
    nobody_follows_it = {key for key in same if key.startswith("model.layers.2.summary_mixer")}
    # TRL makes a loss of its own from the hidden states, and leaves out what is trained besides.
    left_out = {key for key in before if ".compression." in key}
    assert same == nobody_follows_it | left_out


@pytest.mark.parametrize(
    ("name", "loss_type"), [("melodi", "nll"), ("melodi", "dft"), ("transformer_xl", "nll")]
)
def test_the_loss_of_sft_is_that_of_the_models_logits(tmp_path, name, loss_type):
    model = build(name)
    trainer = make_sft(tmp_path, model, loss_type=loss_type)
    batch = only_batch(trainer)
    assert (batch["attention_mask"] == 0).any()
    of_targets = log_probs(build(name), **batch)
    weight = of_targets.exp().detach() if loss_type == "dft" else 1
    wanted = -(of_targets * weight).sum() / (of_targets != 0).sum()
    if loss_type == "nll":
        assert_near(wanted, build(name)(**batch).loss, atol=1e-6)
    assert_near(trainer.compute_loss(model, dict(batch)), wanted)
    evaluated = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert evaluated == pytest.approx(wanted.item(), abs=1e-5)
    assert logged(trainer, "loss") == pytest.approx([wanted.item()], abs=1e-5)


@pytest.mark.parametrize("name", ["melodi"])
def test_the_gradients_of_sft_are_the_models_own(tmp_path, name):
    model, own = build(name), build(name)
    trainer = make_sft(tmp_path, model)
    batch = only_batch(trainer)
    own(**batch).loss.backward()
    trainer.compute_loss(model, dict(batch)).backward()
    wanted = dict(own.named_parameters())
    for key, weight in model.named_parameters():
        assert (weight.grad is None) == (wanted[key].grad is None)
        if weight.grad is not None:
            assert_near(weight.grad, wanted[key].grad)


@pytest.mark.parametrize("name", ["melodi"])
def test_sft_drops_out_what_the_model_drops_out(tmp_path, name):
    model = build(name, dropout=0.3, attention_dropout=0.3)
    trainer = make_sft(tmp_path, model)
    batch = only_batch(trainer)
    losses = []
    for training in (True, True, False):
        model.train(training)
        torch.manual_seed(5)
        of_targets = log_probs(model, **batch)
        wanted = -of_targets.sum() / (of_targets != 0).sum()
        torch.manual_seed(5)
        losses.append(trainer.compute_loss(model, dict(batch)))
        assert_near(losses[-1], wanted)
    assert_equal(losses[0], losses[1])
    assert_differ(losses[0], losses[2])


def test_sft_trains_adapters_on_the_models_logits(tmp_path):
    adapters = LoraConfig(r=4, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    trainer = make_sft(tmp_path, build("melodi"), peft_config=adapters, max_steps=3)
    own = build("melodi")(**only_batch(trainer)).loss.item()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(own, abs=1e-5), "adapters are zero at first"
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize(
    ("name", "trainer_class"),
    [("melodi", DPOTrainer), ("melodi", KTOTrainer), ("transformer_xl", DPOTrainer)],
)
def test_log_probabilities_of_preferences(tmp_path, name, trainer_class):
    rates = {"dropout": 0.3, "attention_dropout": 0.3}  # which both turn off
    model, reference = build(name, **rates).train(), build(name, seed=1, **rates).train()
    is_paired = trainer_class is DPOTrainer
    trainer = make(
        trainer_class,
        DPOConfig if is_paired else KTOConfig,
        tmp_path,
        model,
        PREFERENCES if is_paired else UNPAIRED,
        ref_model=reference,
    )
    batch = only_batch(trainer)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    count = (labels != -100).sum(-1)
    wanted, expected = (
        log_probs(build(name, seed=seed), batch["input_ids"], batch["attention_mask"], labels)
        for seed in (0, 1)
    )
    for each, by_hand in (model, wanted), (reference, expected):
        found = trainer.compute_ref_log_probs(each, batch)  # of the completions, row by row
        found = torch.cat(found) if is_paired else found[0]
        assert_near(found / count, by_hand.sum(-1) / count)
    is_chosen = torch.tensor([True] * 4 + [False] * 4) if is_paired else batch["label"].bool()
    chosen, rejected = (wanted.sum(-1)[rows].mean() for rows in (is_chosen, ~is_chosen))
    margin = (wanted - expected).sum(-1)
    margin = (margin[is_chosen].mean() - margin[~is_chosen].mean()) * trainer.args.beta
    trainer.train()
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["logps/chosen"] == pytest.approx(chosen.item(), rel=1e-6)
    assert log["logps/rejected"] == pytest.approx(rejected.item(), rel=1e-6)
    assert log["rewards/margins"] == pytest.approx(margin.item(), rel=1e-4)


def reward(completions, **_):
    return [float(len(set(text))) for text in completions]


@pytest.mark.parametrize(
    ("trainer_class", "name"),
    [(GRPOTrainer, "melodi"), (GRPOTrainer, "transformer_xl"), (RLOOTrainer, "melodi")],
)
def test_log_probabilities_of_sampled_completions(tmp_path, monkeypatch, trainer_class, name):
    """Prompts are padded on the left, and what was sampled on the right."""
    config_class = GRPOConfig if trainer_class is GRPOTrainer else RLOOConfig
    given = {"num_generations": 2, "max_completion_length": 20, "beta": 0.0, "reward_funcs": reward}
    data = {"prompt": PROMPTS}
    trainer = make(trainer_class, config_class, tmp_path, build(name), data, **given)
    measure, seen = trainer._get_per_token_logps_and_entropies, []

    def measured(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        given = input_ids, attention_mask, logits_to_keep
        found = measure(model, *given, *args, **kwargs)
        seen.append((given, found[0]))
        return found

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", measured)
    trainer.train()
    ((input_ids, attention_mask, length), found), *_ = seen
    assert (attention_mask[:, 0] == 0).any()
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    wanted = log_probs(build(name), input_ids, attention_mask, labels)[:, -length:]
    is_sampled = attention_mask[:, -length:] == 1
    assert is_sampled.sum() > 2 * length
    assert_near(found[is_sampled], wanted[is_sampled])


def test_students_are_compared_with_their_teacher_by_logits(tmp_path, monkeypatch):
    student, teacher = build("melodi"), build("melodi", seed=1)
    given = {"max_completion_length": 8, "beta": 0.0, "temperature": 1.0, "teacher_model": teacher}
    data = {"prompt": PROMPTS, "completion": CHOSEN}
    trainer = make(DistillationTrainer, DistillationConfig, tmp_path, student, data, **given)
    compute_loss, seen = trainer.compute_loss, []

    def computed(model, inputs, *args, **kwargs):
        seen.append(inputs)
        return compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", computed)
    losses = logged(trainer, "loss")
    (batch,) = seen
    ids, mask = (
        torch.cat([batch[f"prompt_{part}"], batch[f"completion_{part}"]], dim=1)
        for part in ("ids", "mask")
    )
    of_student, of_teacher = (
        model(ids, attention_mask=mask).logits[:, -9:-1].log_softmax(-1)
        for model in (build("melodi"), teacher)
    )
    divergence = functional.kl_div(of_student, of_teacher, reduction="none", log_target=True)
    wanted = divergence.sum(-1)[batch["completion_mask"] == 1].mean()
    assert losses == pytest.approx([wanted.item()], abs=1e-5)


REFUSED = {
    "packing": {"packing": True},
    "packing, split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 64},
    "padding-free": {"padding_free": True, "max_length": None},
}


@every_case("how", REFUSED.values(), ids=REFUSED)
def test_documents_in_one_row_are_refused(tmp_path, how):
    with pytest.raises(ValueError, match="packing=False"):
        make_sft(tmp_path, build("melodi"), **how).train()
