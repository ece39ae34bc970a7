"""The static cache, and graphs that are compiled once."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from transformers import CompileConfig, LogitsProcessor
from transformers.cache_utils import DynamicCache, StaticCache

from melodi_hf.models.cache import within_windows
from melodi_hf.models.generation import CompiledSteps
from melodi_hf.models.versions import CACHE_NAME
from melodi_hf.models.windows import Progress

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
    how = {"do_sample": False, "max_new_tokens": NEW} | how
    return model.generate(ids, attention_mask=mask, **how)


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


def watched():
    """A backend that runs a graph as it is, what it is given, and a mark for each run."""
    modules, runs = [], []

    def backend(module, inputs):
        modules.append(module)

        def run(*args):
            runs.append(len(modules))
            return module(*args)

        return run

    return backend, modules, runs


def branches(modules):
    """How many are left to be decided when the graphs run."""
    nodes = [node for module in modules for node in module.graph.nodes]
    return sum(node.target is torch.ops.higher_order.cond for node in nodes)


class Steps(LogitsProcessor):
    """Notes after each step how often a graph has run."""

    def __init__(self, runs):
        self.runs, self.after = runs, []

    def __call__(self, input_ids, scores):
        self.after.append(len(self.runs))
        return scores

    def are_compiled(self):
        """For each step but that of the prompt."""
        return [after > before for before, after in zip(self.after, self.after[1:], strict=False)]


def amid_windows(mask, steps):
    """Whether each step after a prompt reads tokens that begin and close no window."""
    read = [mask.sum(1) + i for i in range(steps)]
    return [all(0 < slot < WINDOW - 1 for slot in (n % WINDOW).tolist()) for n in read]


def check_compiled(model, **how):
    """Two prompts, rows at the same place and at different ones: one graph."""
    for ids, mask in [(draw(3, 2), torch.ones(3, 2).long()), ragged()]:
        found = generate(model, ids, mask, **compiled(**how))
        assert_equal(found, generate(model, ids, mask))
    assert graphs() == 1


@pytest.mark.parametrize("name", EACH)
def test_a_step_is_compiled_once_and_whole(name):
    """Without a branch: the tokens that begin a window of any row or close it are read eagerly."""
    model, (backend, modules, runs) = small(name), watched()
    for ids, mask in [(draw(3, 2), torch.ones(3, 2).long()), ragged((WINDOW + 3, 2, WINDOW + 3))]:
        steps = Steps(runs)
        found = generate(model, ids, mask, **compiled(backend), logits_processor=[steps])
        assert_equal(found, generate(model, ids, mask))
        assert steps.are_compiled() == amid_windows(mask, NEW - 1)
        assert 0 < sum(steps.are_compiled()) < NEW - 1
    assert graphs() == len(modules) == 1
    assert branches(modules) == 0


@pytest.mark.parametrize("name", EACH)
def test_rows_that_end_cost_a_compiled_step_nothing(name):
    """Not a branch, not a graph, not a token, and no row's memory. The host does not look which
    they are: what runs eagerly is what would if none had ended."""
    model, (ids, mask), (backend, modules, runs) = small(name), ragged(), watched()
    steps = Steps(runs)
    end = generate(model, ids, mask)[0, ids.shape[1] + 4].item()
    how = {"eos_token_id": end, "pad_token_id": 0, "return_dict_in_generate": True}
    wanted = generate(model, ids, mask, cache_implementation="static", **how)
    found = generate(model, ids, mask, logits_processor=[steps], **compiled(backend), **how)
    assert_equal(found.sequences, wanted.sequences)
    has_ended = (found.sequences[:, -2] == 0).tolist()
    assert has_ended[0]
    assert not all(has_ended)
    ours, theirs = found.cache.layers[0], wanted.cache.layers[0]
    assert_equal(ours.progress.tokens_read, theirs.progress.tokens_read)
    for held, other in zip(ours.memory, theirs.memory, strict=True):
        assert_near(held, other)
    assert steps.are_compiled() == amid_windows(mask, NEW - 1)
    assert graphs() == len(modules) == 1
    assert branches(modules) == 0


def test_where_rows_stand_is_looked_at_once():
    """What lies on the meta device cannot be."""
    layer = SimpleNamespace(memory=(), progress=Progress(torch.tensor([WINDOW + 2, 3]), None))
    model = Mock(config=SimpleNamespace(window_length=WINDOW), return_value="eager")
    step = CompiledSteps(model, Mock(return_value="compiled"))
    one, cache = torch.ones(2, 1, device="meta"), SimpleNamespace(layers=[layer])
    how = {"input_ids": one, "attention_mask": one, CACHE_NAME: cache}
    assert step(**how) == "compiled"
    layer.progress = Progress(torch.zeros(2, dtype=torch.long, device="meta"), None)
    wanted = [all(0 < n % WINDOW < WINDOW - 1 for n in (i + 2, i + 3)) for i in range(1, NEW)]
    assert [step(**how) == "compiled" for _ in wanted] == wanted
    with pytest.raises(RuntimeError, match="meta"):
        layer.progress.tokens_read.tolist()


def test_a_cache_takes_nobodys_word_for_longer_than_it_is_given():
    cache = StaticCache(config=build("melodi").config, max_cache_len=DOCUMENT)
    with torch.no_grad():
        build("melodi")(draw(1, 5), cache=cache)
    with within_windows(cache):
        assert cache.layers[0].progress.within
    with pytest.raises(KeyError), within_windows(cache):
        raise KeyError
    assert not cache.layers[0].progress.within


@pytest.mark.slow
# Importing inductor defines torch's own ScriptModule classes (torch/utils/mkldnn.py), which warns.
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning:torch.jit._script"
)
@pytest.mark.parametrize("name", VARIED)
def test_a_step_of_machine_code_gives_the_same_tokens(name):
    check_compiled(build(name), backend="inductor", mode="default")


@pytest.mark.parametrize("name", EACH)
def test_a_loop_of_ones_own(name):
    """As transformers documents it: the step compiled by hand, the cache given by the user."""
    model, ids, (backend, modules, _) = small(name), draw(2, DOCUMENT), watched()
    step = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    cache = StaticCache(config=model.config, max_cache_len=DOCUMENT)
    with torch.no_grad():
        found = [model(ids[:, :3], cache=cache).logits]
        found += [step(ids[:, i : i + 1], cache=cache).logits for i in range(3, DOCUMENT)]
        assert_near(torch.cat(found, dim=1), model(ids).logits)
    assert graphs() == 1
    assert branches(modules) > 0  # nobody told it where the rows stand
    assert int(cache.get_seq_length()) == DOCUMENT


@pytest.mark.parametrize("name", ["melodi_masked", "transformer_xl_masked"])
@pytest.mark.parametrize(
    ("pieces", "share"),
    # The first makes the buffers. A share of 1: the second ends with a window, whose memory the
    # third sees, or is one token longer.
    [([3, WINDOW + 6], 0.7), ([WINDOW - 1, WINDOW + 1, 2], 1), ([WINDOW - 1, WINDOW + 2, 2], 1)],
)
def test_pieces_of_any_length_can_be_compiled(name, pieces, share):
    """Also with padding: nothing depends on what a tensor holds."""
    model, ids = small(name), draw(3, sum(pieces))
    mask = (torch.rand(ids.shape) < share).long()
    step = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    static = StaticCache(config=model.config, max_cache_len=DOCUMENT)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        readers = [model] + [step] * (len(pieces) - 1)
        both = zip(readers, ids.split(pieces, 1), mask.split(pieces, 1), strict=True)
        for read, piece, part in both:
            wanted = model(piece, attention_mask=part, cache=cache).logits
            found = read(piece, attention_mask=part, cache=static).logits
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
        model(draw(1, 5), cache=cache)
    with pytest.raises(ValueError, match="static cache takes nothing back: use the default"):
        cache.crop(-1)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    ids = draw(1, DOCUMENT)
    with torch.no_grad():
        assert_near(model(ids, cache=cache).logits, model(ids).logits)
