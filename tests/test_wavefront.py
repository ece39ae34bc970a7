"""Read diagonal by diagonal, a text leaves the same logits, memory, loss and gradients as layer by
layer, in fewer steps; and what wants one call per layer gets it."""

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks import wavefront as benchmark
from melodi_hf import MelodiCache, from_meliad
from melodi_hf.models import attention, decoder, wavefront
from melodi_hf.models.sliding_window import SlidingWindowLayer

from .models import (
    DOCUMENT,
    EACH,
    SYSTEMS,
    WINDOW,
    assert_differ,
    assert_equal,
    assert_near,
    build,
    draw,
)
from .parity_report import golden_files, measure

STACKED = [name for name in SYSTEMS if name.startswith(("melodi", "transformer_xl", "plain"))]
OTHERS = [name for name in EACH if name not in STACKED]
LAYERS, WINDOWS = 3, 5
BENCHMARKS = Path(benchmark.__file__).parent


@pytest.fixture
def float64(monkeypatch):
    """What is computed in float32 for accuracy, too; in blocks smaller than the windows."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 3)


@pytest.fixture
def cells(monkeypatch):
    """Counts the calls of cells."""
    called = []
    read = decoder.DecoderLayer.read_chunks

    def count(layer, plan, *given):
        called.extend(plan.chunks)
        return read(layer, plan, *given)

    monkeypatch.setattr(decoder.DecoderLayer, "read_chunks", count)
    return called


@pytest.fixture
def eager(monkeypatch):
    """ "auto" reads by diagonals wherever it can."""
    monkeypatch.setattr(wavefront, "LEAST_CELLS_PER_STEP", 0)
    for layer in (SlidingWindowLayer, *SlidingWindowLayer.__subclasses__()):
        monkeypatch.setattr(layer, "is_sequential", True)


def by_both(model, run):
    """What `run()` returns layer by layer, and diagonal by diagonal."""
    found = []
    for schedule in ("layers", "wavefront"):
        model.config.schedule = schedule
        found.append(run())
    return found


def train(model, pieces, resets=()):
    """Logits, losses, the last memory and the gradients of segments that follow one another."""
    memory, found = None, []
    model.zero_grad()
    for i, ids in enumerate(pieces):
        reset = torch.arange(len(ids)) == 0 if i in resets else None
        output = model(ids, memory=memory, reset_memory=reset, labels=ids, return_memory=True)
        (output.loss * 100).backward()
        memory = output.memory
        found += [output.logits.detach(), output.loss.detach()]
    return found, memory, gradients(model)


def gradients(model):
    """A weight that nothing depends on may have zeros or nothing."""
    weights = dict(model.named_parameters()).items()
    return {n: torch.zeros_like(w) if w.grad is None else w.grad.clone() for n, w in weights}


def cut(rows, *lengths):
    return draw(rows, sum(lengths)).split(lengths, dim=1)


@pytest.mark.parametrize("name", STACKED)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.usefixtures("float64")
def test_diagonals_give_what_layers_give(name, rows, cells):
    """Segments of more windows than layers and of fewer, with carried memory, new documents, and
    calls that begin and end amid a window."""
    model = build(name).double()
    whole = cut(rows, WINDOWS * WINDOW, 2 * WINDOW)
    torn = cut(rows, 3, 3 * WINDOW + 2, WINDOW + 1, 2 * WINDOW + 2)
    for pieces, resets, width in ((whole, (1,), LAYERS), (torn, (), 2)):
        cells.clear()
        layers, diagonals = by_both(model, lambda p=pieces, r=resets: train(model, p, r))
        torch.testing.assert_close(diagonals, layers, rtol=0, atol=1e-10)
        assert max(abs(gradient).max() for gradient in layers[2].values()) > 0.1
        assert max(len(chunk.tokens_read) for chunk in cells) == width * rows


@pytest.mark.parametrize("name", ["melodi", "melodi_two_long", "transformer_xl_bias"])
def test_diagonals_are_near_in_float32(name):
    model = build(name)
    layers, diagonals = by_both(model, lambda: train(model, cut_like(2)))
    torch.testing.assert_close(diagonals, layers, rtol=1e-5, atol=1e-5)


def cut_like(rows):
    """The same pieces each time."""
    torch.manual_seed(1)
    return cut(rows, WINDOWS * WINDOW, 3 * WINDOW + 1)


@pytest.mark.parametrize("windows", [2, LAYERS, WINDOWS])
@pytest.mark.parametrize("trains", [True, False])
def test_steps_are_layers_and_windows_less_one(windows, trains, cells):
    model, ids = build("melodi"), draw(2, windows * WINDOW + 1)
    model.config.schedule = "layers"
    with torch.set_grad_enabled(trains):
        model(ids)
        assert len(cells) == LAYERS * (windows + 1)
        cells.clear()
        model.config.schedule = "wavefront"
        model(ids)
    assert len(cells) == LAYERS + windows - 1 + LAYERS


@pytest.mark.parametrize("name", STACKED)
def test_prefill_and_generation(name):
    model, ids = build(name), draw(2, DOCUMENT)

    def read():
        cache = MelodiCache(model.config)
        with torch.no_grad():
            model(ids[:, :3], cache=cache)
            logits = model(ids[:, 3:], cache=cache).logits
        return logits, [tuple(layer.memory) for layer in cache.layers]

    layers, diagonals = by_both(model, read)
    torch.testing.assert_close(diagonals, layers, rtol=0, atol=1e-5)
    how = {"max_new_tokens": WINDOW + 2, "do_sample": False}
    assert_equal(*by_both(model, lambda: model.generate(ids, **how)))


def test_static_cache():
    model, ids = build("melodi"), draw(2, DOCUMENT)
    how = {"max_new_tokens": 4, "do_sample": False, "disable_compile": True}
    assert_equal(*by_both(model, lambda: model.generate(ids, cache_implementation="static", **how)))


@pytest.mark.parametrize("trains", [True, False])
def test_nothing_is_left_in_circles(trains):
    model = build("melodi_two_long", schedule="wavefront")  # the last layer's is a long one
    ids = draw(1, WINDOWS * WINDOW)

    def run():
        with torch.set_grad_enabled(trains):
            loss = model(ids, labels=ids).loss
        if trains:
            loss.backward()

    run()
    gc.collect()
    gc.disable()
    try:
        run()
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_reading_a_document(cells):
    model, document = build("melodi_two_long"), draw(1, 10 * WINDOW + 3)[0]

    def read():
        cells.clear()
        memory = model.read_document(document, piece_length=4 * WINDOW, progress=False)
        return model.continue_from(memory, document[None, :5], max_new_tokens=9), len(cells)

    (layers, many), (diagonals, few) = by_both(model, read)
    assert_equal(diagonals, layers)
    assert many - few == 2 * (LAYERS * 4 - (LAYERS + 3)) + (LAYERS * 2 - (LAYERS + 1))


@pytest.mark.parametrize("name", ["melodi_masked", "melodi_no_short", "transformer_xl_masked"])
def test_what_was_forgotten_stays_so(name):
    model, (before, after) = build(name), cut(2, 3 * WINDOW, 3 * WINDOW)
    memory = model(before, return_memory=True).memory
    kinds = dict.fromkeys(model.model.windows_kept(), 0)
    less = model.model.forget(memory, **kinds)
    layers, diagonals = by_both(model, lambda: model(after, memory=less).logits)
    assert_near(diagonals, layers)
    assert_differ(diagonals, model(after, memory=memory).logits)


@pytest.mark.parametrize("path", golden_files(), ids=lambda path: path.stem)
def test_diagonals_equal_the_released_code(path, cells):
    if not path.stem.startswith(("melodi", "transformer_xl")):
        pytest.skip("read layer by layer")
    model = from_meliad(path)
    model.config.schedule = "wavefront"
    differences = measure(path, model, watched=False)
    kinds = {name.partition("/")[0].partition("_")[0] for name in differences}
    assert kinds >= {"outputs", "loss"}
    assert {name: d for name, d in differences.items() if not d <= 1e-5} == {}
    rows = {len(chunk.tokens_read) for chunk in cells}
    assert len(rows) > 1 or path.stem == "melodi_single_window"


def test_autocast():
    """As near to float32 as layer by layer, and in its formats."""
    model, ids = build("melodi"), draw(2, WINDOWS * WINDOW)

    def run():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(ids, labels=ids, return_memory=True)
        output.loss.backward()
        found = [output.logits, *(t for held in output.memory.layers for t in held)]
        return found, torch.cat([g.flatten() for g in gradients(model).values()])

    (layers, wanted), (diagonals, found) = by_both(model, run)
    for ours, theirs in zip(diagonals, layers, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.999


def test_weights_in_bfloat16():
    model, ids = build("melodi").bfloat16(), draw(2, WINDOWS * WINDOW)
    layers, diagonals = by_both(model, lambda: model(ids).logits)
    assert diagonals.dtype == torch.bfloat16
    torch.testing.assert_close(diagonals, layers, rtol=0.05, atol=0.1)


def test_every_layer_drops_for_itself():
    """Half of everything, no rows of two layers alike: but for the draw, the mean is the same."""
    model, ids = build("melodi", dropout=0.5, attention_dropout=0.5).train(), draw(1, 4 * WINDOW)
    with torch.no_grad():
        layers, diagonals = by_both(
            model, lambda: torch.stack([model(ids).logits for _ in range(60)])
        )
    deviation = layers.std(0)
    assert_differ(diagonals[0], diagonals[1])
    apart = (layers.mean(0) - diagonals.mean(0)) / (deviation * (2 / 60) ** 0.5)
    assert apart.square().mean() < 1.3  # 1 if only the draw differs
    assert 0.9 < (diagonals.std(0) / deviation).mean() < 1.1


# What wants one call per layer


def left_padded(model):
    mask = torch.ones(2, DOCUMENT).long()
    mask[1, :3] = 0
    return {"attention_mask": mask}


def recorded(model):
    cache = MelodiCache(model.config)
    cache.activate_past_recording()
    return {"cache": cache}


CALLS = {
    "ragged rows": left_padded,
    "attentions": lambda model: {"output_attentions": True},
    "hidden states": lambda model: {"output_hidden_states": True},
    "a cache that takes back": recorded,
}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("schedule", ["auto", "wavefront"])
def test_calls_that_want_layers_have_them(case, schedule, cells):
    model, ids = build("melodi", attn_implementation="eager"), draw(2, DOCUMENT)
    model.config.schedule = "layers"
    wanted = model(ids, **CALLS[case](model)).logits
    asked = len(cells)
    model.config.schedule = schedule
    assert_equal(model(ids, **CALLS[case](model)).logits, wanted)
    assert len(cells) == 2 * asked
    model(ids)  # and only they
    assert len(cells) == 2 * asked + LAYERS + 2 + LAYERS


def test_a_whole_graph_is_one_of_layers(monkeypatch, cells):
    model, ids = build("melodi", schedule="wavefront"), draw(2, 2 * WINDOW)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    model(ids)
    assert len(cells) == 2 * LAYERS


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output)
    return model


def adapted(model):
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    return get_peft_model(model, lora).base_model.model


def quantised(model):
    quantize_(model.model.layers, Int8WeightOnlyConfig())
    return model


def compiled_by_layer(model):
    model.model.layers[0].compile(backend="eager")
    return model


def offloaded(model, folder):
    model.save_pretrained(folder)
    half = {"cpu": int(0.7 * sum(weight.nbytes for weight in model.parameters()))}
    how = {"device_map": "auto", "max_memory": half, "offload_folder": str(folder / "offload")}
    return AutoModelForCausalLM.from_pretrained(folder, **how)


def checkpointed(model):
    enable = "activation_checkpointing_enable"  # gradient_..., before transformers 5.20
    enable = enable if hasattr(model, enable) else "gradient_checkpointing_enable"
    getattr(model, enable)()
    return model.train()


MODELS = {
    "hooks": hooked,
    "adapters": adapted,
    "quantised": quantised,
    "compiled by layer": compiled_by_layer,
    "gradient checkpointing": checkpointed,
}


@torch.no_grad()
def assert_layers_or_refused(model, cells):
    ids = draw(2, 2 * WINDOW)
    model.config.schedule = "layers"
    wanted = model(ids).logits
    model.config.schedule = "auto"
    assert_equal(model(ids).logits, wanted)
    assert {len(chunk.tokens_read) for chunk in cells} == {2}
    model.config.schedule = "wavefront"
    with pytest.raises(ValueError, match=r"schedule is 'wavefront', but .* to 'auto'"):
        model(ids)
    model(ids[:, : WINDOW + 3])  # no two whole windows


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("case", MODELS)
def test_models_that_want_layers_have_them(case, cells):
    with torch.compiler.set_stance("force_eager"):
        assert_layers_or_refused(MODELS[case](build("melodi")), cells)


@pytest.mark.usefixtures("eager")
# accelerate places a parameter that a model owns itself, and does not know it again
@pytest.mark.filterwarnings("ignore:The following device_map keys do not match:UserWarning")
def test_offloaded_weights(cells, tmp_path):
    assert_layers_or_refused(offloaded(build("melodi"), tmp_path), cells)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", OTHERS)
def test_systems_that_are_read_by_layers(name, cells):
    assert_layers_or_refused(build(name), cells)


def test_offloaded_cache(cells):
    model, ids = build("melodi", schedule="wavefront"), draw(2, DOCUMENT)
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    with torch.no_grad():
        model.model(ids, cache=cache)
    assert {len(chunk.tokens_read) for chunk in cells} == {2}


# The choice


def test_auto_takes_diagonals_where_they_pay(monkeypatch, cells):
    """In a system whose layers are sequential, of long calls, and of small cells."""

    def diagonals(name, windows):
        model, ids = build(name), draw(2, windows * WINDOW)
        cells.clear()
        with torch.no_grad():
            model(ids)
        assert len(cells) in (LAYERS * windows, LAYERS + windows - 1)
        return len(cells) < LAYERS * windows

    enough = 10  # windows, 30 cells in 12 steps
    assert diagonals("melodi", enough)
    assert not diagonals("melodi", enough - 1)
    assert not diagonals("transformer_xl", enough)
    monkeypatch.setattr(wavefront, "MOST_WORK", 2 * WINDOW * 32**2 - 1)
    assert not diagonals("melodi", enough)


def test_auto_is_what_was_measured_to_be_faster():
    rows = json.loads((BENCHMARKS / "results" / "wavefront.json").read_text())["rows"]
    known = [row for row in rows if row["model"] == "MELODI"]
    for kind, trains in (("prefill", False), ("training", True)):
        with torch.set_grad_enabled(trains):
            chosen = [
                row[f"{kind}: layers / wavefront"]
                for row in known
                if wavefront.pays(row["layers"], row["windows"], row["work of a cell"])
            ]
        assert len(known) > len(chosen) > 5
        assert min(chosen) > 1


def test_the_benchmark_runs(tmp_path, monkeypatch):
    output = tmp_path / "wavefront.json"
    argv = ["wavefront.py", "--tiny", "--rounds", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", argv)
    benchmark.main()
    rows = json.loads(output.read_text())["rows"]
    assert [row["model"] for row in rows] == ["MELODI", "Transformer-XL"]
    assert all(row["prefill: layers / wavefront"] > 0 for row in rows)


def test_schedule_is_saved_and_can_be_changed(tmp_path):
    build("melodi", schedule="wavefront").save_pretrained(tmp_path)
    load = AutoModelForCausalLM.from_pretrained
    assert load(tmp_path).config.schedule == "wavefront"
    assert load(tmp_path, schedule="layers").config.schedule == "layers"


def test_schedule_of_another_name_is_refused():
    with pytest.raises(ValueError, match="schedule is 'diagonal': it is one of auto, layers"):
        build("melodi", schedule="diagonal")
    model = build("melodi")
    model.config.schedule = "diagonal"
    with pytest.raises(ValueError, match="schedule is 'diagonal': it is one of auto, layers"):
        model(draw(1, 2 * WINDOW))


def test_memory_of_one_schedule_is_read_by_the_other():
    model, ids = build("melodi", schedule="wavefront"), draw(1, 3 * WINDOW)
    cache = model.read_document(ids, progress=False)
    model.config.schedule = "layers"
    again = build("melodi", schedule="layers")
    assert_near(again(ids, cache=cache.clone()).logits, model(ids, cache=cache).logits)
