"""Other features of generate(): outputs, attention maps, streaming, stopping criteria."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from melodi_hf import MelodiCache

from .models import EACH, WINDOW, assert_equal, assert_near, build, draw

NEW = WINDOW + 2  # tokens


def generate(model, ids, **how):
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW} | how
    return model.generate(ids, **how)


@pytest.mark.parametrize(
    ("name", "cache"),
    [("melodi", kind) for kind in ("melodi", "static", "none")] + [(n, "default") for n in EACH],
)
def test_everything_that_can_be_returned(name, cache):
    """Scores, logits, hidden states and attentions equal those of one call with all tokens."""
    model, ids = build(name, attn_implementation="eager"), draw(2, WINDOW + 3)
    how = {
        "default": {},
        "melodi": {"cache": MelodiCache(model.config)},
        "static": {"cache_implementation": "static"},
        "none": {"use_cache": False},
    }[cache]
    asked = ["scores", "logits", "hidden_states", "attentions"]
    asked = {f"output_{what}": True for what in asked} | {"return_dict_in_generate": True}
    out = generate(model, ids, **asked, **how)
    with torch.no_grad():
        whole = model(out.sequences, output_hidden_states=True, output_attentions=True)
    prompt, layers = ids.shape[1], model.config.num_hidden_layers
    for i in range(NEW):
        at, columns = prompt + i - 1, prompt + i
        assert_near(out.logits[i], whole.logits[:, at])
        assert_near(out.scores[i], whole.logits[:, at])
        assert len(out.hidden_states[i]) == layers + 1
        assert len(out.attentions[i]) == layers
        for found, wanted in zip(out.hidden_states[i], whole.hidden_states, strict=True):
            assert_near(found[:, -1], wanted[:, at])
        for found, wanted in zip(out.attentions[i], whole.attentions, strict=True):
            assert found.shape[-1] == columns
            assert_near(found[:, :, -1], wanted[:, :, at, :columns])


@pytest.mark.parametrize("name", EACH)
def test_attentions_are_laid_out_over_columns(name):
    """Padded rows, read in pieces, have the attentions of each row alone."""
    model, ids = build(name), draw(3, 2 * WINDOW + 5)
    mask = torch.rand(ids.shape) < 0.7
    cache, maps = MelodiCache(model.config), []
    with torch.no_grad():
        for piece, part in zip(ids.split(7, dim=1), mask.split(7, dim=1), strict=True):
            how = {"attention_mask": part.long(), "output_attentions": True}
            maps.append(model(piece, cache=cache, **how).attentions)
    width = ids.shape[1]
    for layer, found in enumerate(zip(*maps, strict=True)):
        pad = torch.nn.functional.pad
        found = torch.cat([pad(part, (0, width - part.shape[-1])) for part in found], dim=2)
        assert found.shape == (3, model.config.num_attention_heads, width, width)
        assert found.triu().abs().max() == 0  # only earlier tokens are attended to
        for row, real in enumerate(mask):
            with torch.no_grad():
                alone = model(ids[row, real][None], output_attentions=True).attentions[layer][0]
            assert_near(found[row][:, real][:, :, real], alone)
            assert found[row][:, ~real].abs().max() == found[row][:, :, ~real].abs().max() == 0


class Fused(TorchDispatchMode):
    """Counts calls of torch's fused attention."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += "scaled_dot_product" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", EACH)
def test_the_implementation_of_attention_can_be_changed(name):
    model, ids, calls, logits = build(name), draw(2, WINDOW + 3), [], []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad(), Fused() as fused:
            logits.append(model(ids).logits)
        calls.append(fused.calls)
    assert_near(*logits)
    assert calls[0] > calls[1] == 0


class Collector:
    """A tokenizer of one letter per token that records the text."""

    def decode(self, ids, **how):
        return "".join(f"{int(i)} " for i in ids)


def test_tokens_are_streamed_as_they_come(capsys):
    model, ids = build("melodi"), draw(1, 5)
    out = generate(model, ids, streamer=TextStreamer(Collector()))
    assert capsys.readouterr().out.split() == [str(i) for i in out[0].tolist()]


class StopAfter(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **how):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_stopping_criteria_stop():
    model, ids = build("melodi"), draw(2, 5)
    stop = StoppingCriteriaList([StopAfter(5 + WINDOW)])
    wanted = generate(model, ids)
    assert_equal(generate(model, ids, stopping_criteria=stop), wanted[:, : 5 + WINDOW])
    # generation can continue
    cache = MelodiCache(model.config)
    begun = generate(model, ids, stopping_criteria=stop, cache=cache)
    assert_equal(generate(model, begun, cache=cache, max_new_tokens=NEW - WINDOW), wanted)
