"""PEFT: adapters are trained, saved, loaded and merged; prompts are tuned; prefixes are refused."""

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)

from melodi_hf import MelodiCache
from melodi_hf.data.tokens import EncodedDocument
from melodi_hf.evaluation.perplexity import evaluate_perplexity
from melodi_hf.models import memory_file
from melodi_hf.models.memory_file import unwrap_decoder

from .models import (
    DOCUMENT,
    FEW,
    assert_differ,
    assert_equal,
    assert_near,
    build,
    draw,
    tokens_read,
)
from .test_trainer import make_trainer

pytestmark = pytest.mark.filterwarnings(  # PEFT's own call
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

STEPS = 8
LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": TaskType.CAUSAL_LM}
PROMPT = {"num_virtual_tokens": 5, "task_type": TaskType.CAUSAL_LM}


def save(name, folder):
    model = build(name)
    model.save_pretrained(folder)
    return model


def train(model, ids):
    """The losses of a few steps on one batch."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, losses = torch.optim.AdamW(weights, lr=2e-2), []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("name", FEW)
def test_lora_is_trained_saved_loaded_and_merged(tmp_path, name):
    base, ids = save(name, tmp_path / "base"), draw(2, DOCUMENT)
    before = logits(base, ids)
    base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(**LORA))
    adapted = {key.split(".lora_")[0] for key in dict(model.named_parameters()) if "lora_" in key}
    linear = [m for m in build(name).modules() if isinstance(m, torch.nn.Linear)]
    assert len(adapted) == len(linear) - 1, "every matrix but the head"
    losses = train(model, ids)
    assert losses[-1] < 0.9 * losses[0]
    trained = logits(model, ids)
    assert_differ(trained, before, by=0.1)

    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_near(logits(loaded, ids), trained)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(build(name))
    assert_near(logits(merged, ids), trained)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = type(merged).from_pretrained(tmp_path / "merged")
    assert_near(logits(reloaded, ids), trained)


def test_an_adapter_of_the_head_is_merged_if_it_is_not_tied():
    lora = LoraConfig(**LORA | {"target_modules": ["lm_head"]})
    model = get_peft_model(build("melodi", tie_word_embeddings=False), lora)
    ids = draw(2, DOCUMENT)
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    trained = logits(model, ids)
    assert_near(logits(model.merge_and_unload(), ids), trained)
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        get_peft_model(build("melodi"), lora)


@pytest.mark.parametrize("name", FEW)
def test_prompt_tuning_is_a_text_before_the_text(tmp_path, name):
    base, ids = save(name, tmp_path / "base"), draw(2, DOCUMENT)
    base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, PromptTuningConfig(**PROMPT))
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    tuned = logits(model, ids)
    prompt = model.get_prompt(batch_size=2)
    embedded = torch.cat((prompt, base.get_input_embeddings()(ids)), dim=1)
    with torch.no_grad():
        assert_near(tuned, base(inputs_embeds=embedded).logits, atol=1e-6)
    mask = torch.ones_like(ids)
    new = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
    again = [logits(model, new[:, : DOCUMENT + i])[:, -1].argmax(-1) for i in range(9)]
    assert_equal(new[:, DOCUMENT:], torch.stack(again, dim=1))

    model.save_pretrained(tmp_path / "prompt")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "prompt")
    assert_equal(logits(loaded, ids), tuned)


TUNED = {
    "prompt tuning": lambda: PromptTuningConfig(**PROMPT),
    "p-tuning": lambda: PromptEncoderConfig(**PROMPT, encoder_hidden_size=16),
}


@pytest.mark.parametrize(
    ("name", "how"),
    [("melodi", "prompt tuning"), ("melodi", "p-tuning"), ("transformer_xl", "prompt tuning")],
)
def test_rows_after_a_tuned_prompt_end_one_by_one(name, how):
    """What stands behind the end of a row is not read, whether rows are padded or not."""
    model = get_peft_model(build(name), TUNED[how]()).eval()
    ids, steps = draw(3, DOCUMENT), 12
    mask = torch.ones_like(ids)
    mask[1, :4], ids[1, :4] = 0, 0
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": steps, "do_sample": False}
    free = model.generate(**given)[:, DOCUMENT:]
    end = int(free[0, 2])
    model.base_model.generation_config.eos_token_id = end  # as a model's own is saved
    found = model.generate(**given, eos_token_id=end, return_dict_in_generate=True)
    written = [[*row.tolist(), end].index(end) + 1 for row in free]
    assert min(written) < max(written)
    for row, (wanted, count) in enumerate(zip(free, written, strict=True)):
        kept = min(count, found.sequences.shape[1] - DOCUMENT)
        assert_equal(found.sequences[row, DOCUMENT:][:kept], wanted[:kept])
        assert (found.sequences[row, DOCUMENT + count :] == 0).all(), "padding"
    total = found.sequences.shape[1] - DOCUMENT  # of which the last one is not read
    read = torch.tensor([min(count, total - 1) for count in written])
    assert_equal(tokens_read(found.cache), read + mask.sum(1) + PROMPT["num_virtual_tokens"])


# Memories


TARGETS = {
    "LoRA": {"target_modules": "all-linear"},
    "DoRA": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "tokens": {"target_modules": ["o_proj"], "trainable_token_indices": [3, 5]},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "whole layers": {"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]},
}
ADAPTERS = {name: lambda how=how: LoraConfig(r=2, **how) for name, how in TARGETS.items()} | {
    "IA3": lambda: IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
}


def adapted(how, name="melodi"):
    """A model whose adapters change what it writes into its memory; its head is no embedding."""
    base = build(name, tie_word_embeddings=False)
    model = get_peft_model(base, ADAPTERS[how]()).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * weight.requires_grad * torch.randn_like(weight)
    return model


def continued(memory, model, ids):
    with torch.no_grad():
        return model(input_ids=ids, cache=memory.clone()).logits


@pytest.mark.parametrize("how", ADAPTERS)
def test_merged_model_goes_on_from_the_memory_of_its_adapter(tmp_path, how):
    model, ids, file = adapted(how), draw(2, DOCUMENT), tmp_path / "memory"
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    memory = MelodiCache(model.config)
    with torch.no_grad():
        model(input_ids=ids, cache=memory)
    memory.save(file, model=model)
    new = draw(2, 5)
    wanted = continued(memory, model, new)
    assert_equal(continued(MelodiCache.load(file, model=model), model, new), wanted)
    inner = model.get_base_model()
    assert_equal(continued(MelodiCache.load(file, model=inner), model, new), wanted)
    for weight, (name, now) in zip(before.values(), model.state_dict().items(), strict=True):
        assert torch.equal(weight, now), name
    with pytest.raises(ValueError, match="by other weights than this model's"):
        MelodiCache.load(file, model=build("melodi"))
    with model.disable_adapter(), pytest.raises(ValueError, match="by other weights"):
        MelodiCache.load(file, model=model)

    merged = model.merge_and_unload()
    assert_near(continued(MelodiCache.load(file, model=merged), merged, new), wanted)
    memory.save(file, model=merged)
    MelodiCache.load(file, model=adapted(how))  # and the other way round
    with pytest.raises(ValueError, match="by other weights than this model's"):
        MelodiCache.load(file, model=build("melodi"))


def test_memory_of_a_model_without_its_head_has_the_same_weights(tmp_path):
    model, file = build("melodi", tie_word_embeddings=False), tmp_path / "memory"
    memory = MelodiCache(model.config)
    with torch.no_grad():
        model(draw(2, DOCUMENT), cache=memory)
    memory.save(file, model=model)
    MelodiCache.load(file, model=model.model)
    memory.save(file, model=model.model)
    MelodiCache.load(file, model=model)


def test_files_written_before_adapters_were_merged_still_load(tmp_path, monkeypatch):
    """Their names are those of the wrapped model."""

    def as_before(model):
        return {
            name: weight.flatten()[weight.numel() // 2].item()
            for name, weight in model.named_parameters()
            if weight.dim() > 1
        }

    model, file = adapted("LoRA"), tmp_path / "memory"
    memory = MelodiCache(model.config)
    with torch.no_grad():
        model(input_ids=draw(2, DOCUMENT), cache=memory)
    with monkeypatch.context() as patch:
        patch.setattr(memory_file, "weights_sample", as_before)
        memory.save(file, model=model)
    MelodiCache.load(file, model=model)
    torch.manual_seed(9)
    other = get_peft_model(build("melodi"), ADAPTERS["LoRA"]())
    with pytest.raises(ValueError, match="by other weights than this model's"):
        MelodiCache.load(file, model=other)


@pytest.mark.parametrize("name", FEW)
def test_adapters_are_trained_with_a_memory(tmp_path, name):
    """The figures are logged, the memory is carried, and evaluation says what training says."""
    model = get_peft_model(build(name), LoraConfig(**LORA))
    start = model.get_base_model().state_dict()
    start = {key: weight.clone() for key, weight in start.items() if "lora_" not in key}
    torch.manual_seed(4)
    ids = draw(2, 4 * DOCUMENT)
    pieces = [{"input_ids": x, "labels": x} for piece in ids.split(DOCUMENT, 1) for x in piece]
    steps = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4}
    trainer = make_trainer(tmp_path, model, data=pieces, evaluated=pieces, **steps)
    trainer.train()
    now = model.get_base_model().state_dict()
    assert all(torch.equal(now[key], weight) for key, weight in start.items())
    decoder = unwrap_decoder(model)
    assert decoder is model.get_base_model().base_model
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert decoder.metrics(decoder.empty_memory(2)).keys() <= entries[0].keys()
    wanted, memory = 0.0, None
    with torch.no_grad():
        for piece in ids.split(DOCUMENT, 1):
            given = {"memory": memory, "return_memory": True}
            out = model.eval()(input_ids=piece, labels=piece, **given)
            wanted, memory = wanted + out.loss.item() / 4, out.memory
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, abs=1e-5)
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").is_file()


def test_perplexity_of_an_adapted_model_is_that_of_the_merged_one():
    model = adapted("LoRA")
    documents = [EncodedDocument(str(i), draw(50).numpy(), 9, 200) for i in range(2)]
    how = {"start_id": 1, "settings": ("carried", "emptied", "short_off"), "progress": False}
    found = evaluate_perplexity(model, documents, **how)["settings"]
    wanted = evaluate_perplexity(model.merge_and_unload(), documents, **how)["settings"]
    for name, scores in wanted.items():
        assert found[name]["nll"] == pytest.approx(scores["nll"], abs=1e-4), name


# The message is that of the cache, which PEFT hands to the model.
def test_prefix_tuning_is_refused():
    model = get_peft_model(build("melodi"), PrefixTuningConfig(**PROMPT))
    with pytest.raises(ValueError, match="MelodiCache"):
        model(input_ids=draw(2, DOCUMENT))
