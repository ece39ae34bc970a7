"""The static cache, and graphs that are compiled once."""

import pytest
import torch
from transformers import CompileConfig
from transformers.cache_utils import DynamicCache, StaticCache

from .models import DOCUMENT, EACH, VARIED, WINDOW, assert_equal, assert_near, build, draw

NEW = 2 * WINDOW + 3  # tokens: two windows are closed on the way


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def ragged(lengths=(WINDOW + 3, 2, WINDOW)):
    """Rows of different lengths, padded on the left, and their mask."""
    width = max(lengths)
    rows = [torch.nn.functional.pad(draw(1, n), (width - n, 0)) for n in lengths]
    ids = torch.cat(rows)
    return ids, (ids > 0).long()


def generate(model, ids, mask, **how):
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, **how)


def small(name):
    """Compiling takes time, layer by layer."""
    sizes = {
        "melodi": "long_memory_layers",
        "block_recurrent": "recurrent_layers",
        "elastic_memory": "memory_layers",
    }
    special = {field: (0,) for system, field in sizes.items() if name.startswith(system)}
    return build(name, num_hidden_layers=1, **special)


def compiled(backend="eager", mode=None):
    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=mode)
    config._compile_all_devices = True  # CPUs, too
    return {"cache_implementation": "static", "compile_config": config}


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("kind", ["static", "offloaded", "dynamic"])
def test_every_kind_of_cache_gives_the_same_tokens(name, kind):
    if kind == "offloaded" and torch.version.cuda and not torch.cuda.is_available():
        pytest.skip("a torch for GPUs makes no stream without one")
    model = build(name)
    for ids, mask in ((draw(2, WINDOW + 3), None), ragged()):
        mask = torch.ones_like(ids) if mask is None else mask
        wanted = generate(model, ids, mask)
        assert_equal(generate(model, ids, mask, cache_implementation=kind), wanted)
        beams = {"num_beams": 3, "prefill_chunk_size": 5}
        assert_equal(
            generate(model, ids, mask, cache_implementation=kind, **beams),
            generate(model, ids, mask, **beams),
        )


def graphs():
    """How many were compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def check_compiled(model, **how):
    """Two prompts, rows at the same place and at different ones: one graph."""
    for ids, mask in [(draw(3, 2), torch.ones(3, 2).long()), ragged()]:
        found = generate(model, ids, mask, **compiled(**how))
        assert_equal(found, generate(model, ids, mask))
    assert graphs() == 1


@pytest.mark.parametrize("name", EACH)
def test_a_step_is_compiled_once_and_whole(name):
    check_compiled(small(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIED)
def test_a_step_of_machine_code_gives_the_same_tokens(name):
    check_compiled(build(name), backend="inductor", mode="default")


@pytest.mark.parametrize("name", EACH)
def test_a_loop_of_ones_own(name):
    """As transformers documents it: the step compiled by hand, the cache given by the user."""
    model, ids = small(name), draw(2, DOCUMENT)
    step = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    cache = StaticCache(config=model.config, max_cache_len=DOCUMENT)
    with torch.no_grad():
        found = [model(ids[:, :3], past_key_values=cache).logits]
        found += [step(ids[:, i : i + 1], past_key_values=cache).logits for i in range(3, DOCUMENT)]
        assert_near(torch.cat(found, dim=1), model(ids).logits)
    assert graphs() == 1
    assert int(cache.get_seq_length()) == DOCUMENT


@pytest.mark.parametrize("name", ["melodi_masked", "transformer_xl_masked"])
def test_pieces_of_any_length_can_be_compiled(name):
    """Also with padding: nothing depends on what a tensor holds."""
    pieces = [3, WINDOW + 6]  # the first makes the buffers
    model, ids = small(name), draw(3, sum(pieces))
    mask = (torch.rand(ids.shape) < 0.7).long()
    step = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    static = StaticCache(config=model.config, max_cache_len=DOCUMENT)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        both = zip((model, step), ids.split(pieces, 1), mask.split(pieces, 1), strict=True)
        for read, piece, part in both:
            wanted = model(piece, attention_mask=part, past_key_values=cache).logits
            found = read(piece, attention_mask=part, past_key_values=static).logits
            assert_near(found[part > 0], wanted[part > 0])


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("padded", [False, True])
def test_training_can_be_compiled(name, padded):
    """Segment after segment: the second call, with a memory, is the last one to be compiled."""
    model, twin = small(name), small(name)
    step = torch.compile(model, fullgraph=True, backend="eager")
    memory, wanted = None, None
    for _ in range(3):
        ids = draw(2, 2 * WINDOW)
        how = {"labels": ids, "return_memory": True}
        if padded:
            how["attention_mask"] = torch.ones_like(ids).index_fill(1, torch.tensor([0, 1]), 0)
        found = step(ids, memory=memory, **how)
        plain = twin(ids, memory=wanted, **how)
        assert_near(found.loss, plain.loss)
        found.loss.backward()
        plain.loss.backward()
        memory, wanted = found.memory, plain.memory
    assert graphs() == 2
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert_near(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", EACH)
def test_a_static_cache_takes_nothing_back(name):
    model = build(name)
    cache = StaticCache(config=model.config, max_cache_len=DOCUMENT)
    with torch.no_grad():
        model(draw(1, 5), past_key_values=cache)
    with pytest.raises(ValueError, match="static cache takes nothing back: use the default"):
        cache.crop(-1)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    ids = draw(1, DOCUMENT)
    with torch.no_grad():
        assert_near(model(ids, past_key_values=cache).logits, model(ids).logits)
