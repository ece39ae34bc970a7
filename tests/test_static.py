"""The static cache, and steps that are compiled once."""

import pytest
import torch
from transformers import CompileConfig, LogitsProcessor
from transformers.cache_utils import StaticCache

from .models import DOCUMENT, EACH, FEW, SYSTEMS, WINDOW, assert_equal, assert_near, build, draw

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
    if name == "memorizing_transformer_side":
        special["memory_layer"] = 0
    return build(name, num_hidden_layers=1, **special)


def compiled(backend="eager", mode=None):
    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=mode)
    config._compile_all_devices = True  # CPUs, too
    return {"cache_implementation": "static", "compile_config": config}


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "static") for name in FEW), ("melodi", "offloaded"), ("melodi", "dynamic")],
)
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
    """Return how many graphs were compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def watched():
    """Return a backend that runs graphs unchanged, the list of graphs, and a list of runs."""
    modules, runs = [], []

    def backend(module, inputs):
        modules.append(module)

        def run(*args):
            runs.append(len(modules))
            return module(*args)

        return run

    return backend, modules, runs


class Steps(LogitsProcessor):
    """Record after each step how often a graph has run."""

    def __init__(self, runs):
        self.runs, self.after = runs, []

    def __call__(self, input_ids, scores):
        self.after.append(len(self.runs))
        return scores

    def are_compiled(self):
        """Return for each step but the prompt's whether a graph ran."""
        return [after > before for before, after in zip(self.after, self.after[1:], strict=False)]


def amid_windows(mask, steps):
    """Return for each step after a prompt whether no row begins or completes a window."""
    read = [mask.sum(1) + i for i in range(steps)]
    return [all(0 < slot < WINDOW - 1 for slot in (n % WINDOW).tolist()) for n in read]


def check_compiled(model, **how):
    """Two prompts, with rows at the same offset and at different ones, use one graph."""
    for ids, mask in [(draw(3, 2), torch.ones(3, 2).long()), ragged()]:
        found = generate(model, ids, mask, **compiled(**how))
        assert_equal(found, generate(model, ids, mask))
    assert graphs() == 1


@pytest.mark.parametrize("name", EACH)
def test_a_step_is_compiled_once_and_whole(name):
    """The tokens that begin a window of any row or complete it are read eagerly."""
    model, (backend, modules, runs) = small(name), watched()
    for ids, mask in [(draw(3, 2), torch.ones(3, 2).long()), ragged((WINDOW + 3, 2, WINDOW + 3))]:
        steps = Steps(runs)
        found = generate(model, ids, mask, **compiled(backend), logits_processor=[steps])
        assert_equal(found, generate(model, ids, mask))
        assert steps.are_compiled() == amid_windows(mask, NEW - 1)
        assert 0 < sum(steps.are_compiled()) < NEW - 1
    assert graphs() == len(modules) == 1


@pytest.mark.parametrize("name", FEW)
def test_rows_that_end_cost_a_compiled_step_nothing(name):
    """No graph, no token, and no row's memory: the same steps run eagerly as if none had ended."""
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
    following = draw(len(ids), DOCUMENT)
    with torch.no_grad():
        continued = [model(following, cache=out.cache).logits for out in (found, wanted)]
    assert_near(*continued)
    assert steps.are_compiled() == amid_windows(mask, NEW - 1)
    assert graphs() == len(modules) == 1


@pytest.mark.slow
# Importing inductor defines torch's own ScriptModule classes (torch/utils/mkldnn.py), which warns.
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning:torch.jit._script"
)
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_step_of_machine_code_gives_the_same_tokens(name):
    check_compiled(build(name), backend="inductor", mode="default")


def test_a_static_cache_takes_nothing_back():
    model = build("melodi")
    cache = StaticCache(config=model.config, max_cache_len=DOCUMENT)
    with torch.no_grad():
        model(draw(1, 5), cache=cache)
    with pytest.raises(ValueError, match="does not support crop\\(\\): use the default"):
        cache.crop(-1)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    ids = draw(1, DOCUMENT)
    with torch.no_grad():
        assert_near(model(ids, cache=cache).logits, model(ids).logits)
