"""The rest of what generate() offers, as with any other model."""

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from melodi_hf import MelodiCache

from .models import EACH, WINDOW, assert_equal, assert_near, build, draw

NEW = WINDOW + 2  # tokens


def generate(model, ids, **how):
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW} | how
    return model.generate(ids, **how)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("cache", ["default", "melodi", "static", "none"])
def test_everything_that_can_be_returned(name, cache):
    """Scores, logits, hidden states and attentions of each token, as from reading all at once."""
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
    """Of rows with padding anywhere, read in pieces, as of each row alone."""
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
        assert found.triu().abs().max() == 0  # what is not strictly before is not seen
        for row, real in enumerate(mask):
            with torch.no_grad():
                alone = model(ids[row, real][None], output_attentions=True).attentions[layer][0]
            assert_near(found[row][:, real][:, :, real], alone)
            assert found[row][:, ~real].abs().max() == found[row][:, :, ~real].abs().max() == 0


@pytest.mark.parametrize("name", EACH)
def test_the_implementation_of_attention_can_be_changed(name, monkeypatch):
    model, ids = build(name), draw(2, WINDOW + 3)
    wanted, calls = model(ids).logits, []
    model.set_attn_implementation("eager")
    plainly = "melodi_hf.models.attention._attend_plainly"
    from melodi_hf.models.attention import _attend_plainly

    monkeypatch.setattr(plainly, lambda *args: calls.append(1) or _attend_plainly(*args))
    assert_near(model(ids).logits, wanted)
    assert calls


class Collector:
    """A tokenizer of one letter per token, and what was written."""

    def decode(self, ids, **how):
        return "".join(f"{int(i)} " for i in ids)


@pytest.mark.parametrize("name", EACH)
def test_tokens_are_streamed_as_they_come(name, capsys):
    model, ids = build(name), draw(1, 5)
    out = generate(model, ids, streamer=TextStreamer(Collector()))
    assert capsys.readouterr().out.split() == [str(i) for i in out[0].tolist()]


class StopAfter(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **how):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("name", EACH)
def test_stopping_criteria_stop(name):
    model, ids = build(name), draw(2, 5)
    stop = StoppingCriteriaList([StopAfter(5 + WINDOW)])
    wanted = generate(model, ids)
    assert_equal(generate(model, ids, stopping_criteria=stop), wanted[:, : 5 + WINDOW])
    # and it can go on from there
    cache = MelodiCache(model.config)
    begun = generate(model, ids, stopping_criteria=stop, cache=cache)
    assert_equal(generate(model, begun, cache=cache, max_new_tokens=NEW - WINDOW), wanted)
