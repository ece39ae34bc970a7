"""The head, as others see it: hidden states times its weights times `config.logit_scale`.

Code that makes logits or a loss of these parts gets what the model does.
"""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoConfig, AutoModelForCausalLM

import melodi_hf

from .cases import every_case
from .models import (
    DOCUMENT,
    FEW,
    VOCABULARY,
    assert_differ,
    assert_equal,
    assert_near,
    build,
    build_config,
    draw,
)
from .parity_report import golden_files

SCALE = 32**-0.5  # of models of 32 channels


def remove_scale(folder, **entry):
    """Make of a saved model one that was saved before its configuration had a `logit_scale`."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("logit_scale") == SCALE
    path.write_text(json.dumps(config | entry))


@pytest.mark.parametrize("entry", [{}, {"logit_scale": None}], ids=["absent", "null"])
def test_checkpoints_without_a_scale_have_the_same_logits(tmp_path, entry):
    model, ids = build("melodi"), draw(2, DOCUMENT)
    model.save_pretrained(tmp_path)
    remove_scale(tmp_path, **entry)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.logit_scale == SCALE
    with torch.no_grad():
        assert_equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["logit_scale"] == SCALE


def test_models_of_the_released_code_have_its_scale():
    for path in golden_files():
        config = melodi_hf.from_meliad(path).config
        assert config.logit_scale == config.hidden_size**-0.5


@pytest.mark.parametrize("name", FEW)
def test_another_scale_scales_the_logits(tmp_path, name):
    ids = draw(2, DOCUMENT)
    usual, model = build(name), build(name, logit_scale=0.5)
    with torch.no_grad():
        logits = usual(ids).logits * (0.5 / SCALE)
        assert_near(model(ids).logits, logits)
    wanted = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    for skip_logits in (False, True):
        assert_near(model(ids, labels=ids, skip_logits=skip_logits).loss, wanted)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).logit_scale == 0.5


@every_case("scale", [0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ValueError, match=r"logit_scale is .*: it must be greater than 0"):
        build_config("melodi", logit_scale=scale)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("padded", [False, True])
def test_logits_are_made_of_the_hidden_states(name, padded):
    """Those that `base_model` returns, in training with dropout too."""
    model, ids = build(name, dropout=0.3, attention_dropout=0.3).train(), draw(2, DOCUMENT)
    mask = torch.ones_like(ids)
    mask[0, : 5 * padded] = mask[1, DOCUMENT - 3 * padded :] = 0
    given = {"attention_mask": mask, "use_cache": False}
    torch.manual_seed(3)
    wanted = model(ids, labels=ids, **given)
    torch.manual_seed(3)
    hidden = model.base_model(ids, **given).last_hidden_state
    logits = hidden @ model.get_output_embeddings().weight.T * model.config.logit_scale
    assert_near(logits[mask == 1], wanted.logits[mask == 1])
    assert (hidden == 0).float().mean() > 0.2
    assert_differ(logits, model.eval()(ids, **given).logits)


def test_the_head_can_be_replaced():
    model, ids = build("melodi"), draw(2, DOCUMENT)
    new = nn.Linear(32, VOCABULARY + 3)
    model.set_output_embeddings(new)
    assert model.get_output_embeddings() is new
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        assert_near(model(ids).logits, new(hidden * SCALE))


def replace_forward(head):
    forward = head.forward
    head.forward = lambda x: forward(x) * 2


def watch(kind):
    return lambda head: getattr(head, kind)(lambda *_: None)


CHANGED = {
    "forward replaced": replace_forward,
    "forward hook": watch("register_forward_hook"),
    "forward pre-hook": watch("register_forward_pre_hook"),
    "backward hook": watch("register_full_backward_hook"),
    "backward pre-hook": watch("register_full_backward_pre_hook"),
    "parametrisation": lambda head: nn.utils.parametrizations.weight_norm(head),
    "int8": lambda head: quantize_(head, Int8WeightOnlyConfig(version=2)),
}


@every_case("change", CHANGED.values(), ids=CHANGED)
def test_a_head_that_is_more_than_its_matrix_is_called(change):
    model, ids = build("melodi", tie_word_embeddings=False), draw(1, DOCUMENT)
    assert model(ids, labels=ids, skip_logits=True).logits is None
    change(model.lm_head)
    output = model(ids, labels=ids, skip_logits=True)
    with torch.no_grad():
        wanted = model.lm_head(model.model(ids).last_hidden_state * SCALE)
    assert_near(output.logits, wanted)
    assert_near(output.loss, model(ids, labels=ids).loss)
