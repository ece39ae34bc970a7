"""PEFT: adapters are trained, saved, loaded and merged; prompts are tuned; prefixes are refused."""

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)

from .models import DOCUMENT, EACH, assert_differ, assert_equal, assert_near, build, draw

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


@pytest.mark.parametrize("name", EACH)
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


@pytest.mark.parametrize("name", EACH)
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


# The message is that of the cache, which PEFT hands to the model.
@pytest.mark.parametrize("name", EACH)
def test_prefix_tuning_is_refused(name):
    model = get_peft_model(build(name), PrefixTuningConfig(**PROMPT))
    with pytest.raises(ValueError, match="MelodiCache"):
        model(input_ids=draw(2, DOCUMENT))
