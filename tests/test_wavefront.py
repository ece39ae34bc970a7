"""The wavefront gives the logits, memory, loss and gradients of the schedule "layers" in fewer
steps, or refuses a model whose layers differ in more than their weights."""

import copy
import gc
import json
import sys
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize, prune
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.activations import ACT2FN

from benchmarks import wavefront as benchmark
from melodi_hf import MelodiCache, from_meliad
from melodi_hf.models import attention, decoder
from melodi_hf.models.modeling_melodi import LongTermMelodiLayer, MelodiLayer
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


@pytest.mark.parametrize("case", CALLS)
def test_calls_that_want_layers_have_them(case, cells):
    model, ids = build("melodi", attn_implementation="eager"), draw(2, DOCUMENT)
    wanted = model(ids, **CALLS[case](model)).logits
    asked = len(cells)
    model.config.schedule = "wavefront"
    assert_equal(model(ids, **CALLS[case](model)).logits, wanted)
    assert len(cells) == 2 * asked
    model(ids)  # and only they
    assert len(cells) == 2 * asked + LAYERS + 2 + LAYERS


def test_a_whole_graph_is_one_of_layers(monkeypatch, cells):
    model, ids = build("melodi", schedule="wavefront"), draw(2, 2 * WINDOW)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    model(ids)
    assert len(cells) == 2 * LAYERS


def test_offloaded_cache(cells):
    model, ids = build("melodi", schedule="wavefront"), draw(2, DOCUMENT)
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    with torch.no_grad():
        model.model(ids, cache=cache)
    assert {len(chunk.tokens_read) for chunk in cells} == {2}


# Models whose layers are the same but for their weights, whatever was done to these


def freeze_a_layer(model, layers):
    layers[1].requires_grad_(False)


def freeze_some_weights(model, layers):
    layers[0].mlp.up_proj.weight.requires_grad_(False)
    layers[2].input_layernorm.weight.requires_grad_(False)
    layers[2].self_attn.temperature.weight.requires_grad_(False)


def tie_a_weight(model, layers):
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight


def share_a_module(model, layers):
    layers[2].mlp = layers[0].mlp


def share_a_module_in_one_layer(model, layers):
    layers[0].self_attn.k_proj = layers[0].self_attn.q_proj


def repeat_a_layer(model, layers):
    layers[2] = layers[0]


def prune_for_good(model, layers):
    prune.l1_unstructured(layers[1].mlp.up_proj, "weight", 0.5)
    prune.remove(layers[1].mlp.up_proj, "weight")


def merge_an_adapter(model, layers):
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, lora).merge_and_unload()
    model.requires_grad_(True)


def adapt_the_queue(model, layers):
    """What belongs to the long-term layer alone is called there."""
    targets = r".*long_mixer\.mix"
    get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))
    model.requires_grad_(True)


def add_a_hook_to_the_queue(model, layers):
    for layer in layers:
        if isinstance(layer, LongTermMelodiLayer):
            layer.long_mixer.register_forward_hook(lambda module, args, output: 2 * output)


def scale_gradients(model, layers):
    layers[1].mlp.up_proj.weight.register_hook(lambda grad: 3 * grad)


def vary_activation_classes(model, layers):
    layers[1].mlp.activation = ACT2FN["gelu"]


def cut_weights(model, layers):
    with torch.no_grad():
        layers[1].mlp.down_proj.weight.zero_()


def ask_for_attentions_once(model, layers):
    """transformers leaves its hooks in place."""
    model.set_attn_implementation("eager")
    model(draw(1, 3), output_attentions=True)
    model.set_attn_implementation("sdpa")


def disable_checkpointing(model, layers):
    checkpoint_activations(model, layers)
    disable = "activation_checkpointing_disable"  # gradient_..., before transformers 5.20
    getattr(model, disable if hasattr(model, disable) else "gradient_checkpointing_disable")()


EQUAL = {
    change.__name__: change
    for change in (
        freeze_a_layer,
        freeze_some_weights,
        tie_a_weight,
        share_a_module,
        share_a_module_in_one_layer,
        repeat_a_layer,
        prune_for_good,
        merge_an_adapter,
        scale_gradients,
        vary_activation_classes,
        cut_weights,
        ask_for_attentions_once,
        disable_checkpointing,
    )
}
MELODI_ALONE = {change.__name__: change for change in (adapt_the_queue, add_a_hook_to_the_queue)}


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in ("melodi", "transformer_xl") for case in EQUAL]
    + [(name, case) for name in ("melodi", "melodi_two_long") for case in MELODI_ALONE],
)
def test_layers_with_weights_of_any_kind_are_read_exactly(case, name, cells):
    model = build(name).double()
    (EQUAL | MELODI_ALONE)[case](model, model.model.layers)
    ids = draw(2, WINDOWS * WINDOW)
    cells.clear()
    layers, diagonals = by_both(model, lambda: train(model, [ids]))
    torch.testing.assert_close(diagonals, layers, rtol=0, atol=1e-10)
    assert len(cells) == LAYERS * WINDOWS + LAYERS + WINDOWS - 1


# Models that are refused, since their layers may differ in more than their weights


class Scale(nn.Module):
    """Has a parameter and no sub-modules."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x):
        return x * self.factor


class ScaledLinear(Scale):
    """Has both."""

    def __init__(self, factor):
        super().__init__(factor)
        self.proj = nn.Linear(40, 40)

    def forward(self, x):
        return self.proj(super().forward(x))


class Shift(nn.Module):
    """Has a buffer."""

    def __init__(self, by, persistent=True):
        super().__init__()
        self.register_buffer("by", torch.tensor(float(by)), persistent)

    def forward(self, x):
        return x + self.by


class Power(nn.Module):
    """Has tensors that are neither parameters nor buffers."""

    def __init__(self, exponent):
        super().__init__()
        self.exponents = [torch.tensor(float(exponent))]
        self.function = partial(torch.pow, exponent=self.exponents[0])

    def forward(self, x):
        return self.function(x.abs() + 1)


class MeanOverRows(nn.Module):
    """Has no state, but does not treat each row for itself."""

    def forward(self, x):
        return x - x.mean(0, keepdim=True)


class ForgetfulLayer(MelodiLayer):
    """Leaves nothing to the next window."""

    stacks = MelodiLayer.stacks

    def close(self, h, outputs, memory, chunk):
        h, memory = super().close(h, outputs, memory, chunk)
        return h, memory._replace(short=torch.zeros_like(memory.short))


class ForgetfulLongTermLayer(LongTermMelodiLayer):
    """The same, of a layer with long-term memory."""

    def close(self, h, outputs, memory, chunk):
        h, memory = super().close(h, outputs, memory, chunk)
        return h, memory._replace(short=torch.zeros_like(memory.short))


class ScaledLayer(SlidingWindowLayer):
    """Says that it can be stacked, and has an attribute of its own."""

    stacks = SlidingWindowLayer.stacks

    def __init__(self, config, i):
        super().__init__(config, i)
        self.scale = config.scales[i]

    def project(self, h):
        return super().project(self.scale * h)


def activations(make):
    def change(model, layers):
        for i, layer in enumerate(layers):
            layer.mlp.activation = make(i)

    return change


def each(path, name, value):
    """Set an attribute to `value(layer index)`."""

    def change(model, layers):
        for i, layer in enumerate(layers):
            setattr(layer.get_submodule(path), name, value(i))

    return change


def of_class(layer_class, i):
    """Put the weights of layer i into a layer of another class."""

    def change(model, layers):
        new = layer_class(model.config, i).eval()
        new.load_state_dict(layers[i].state_dict())
        layers[i] = new

    return change


def replace_a_method(i, name):
    def change(model, layers):
        layer, old = layers[i], getattr(layers[i], name)

        def new(h, outputs, memory, chunk):
            h, memory = old(h, outputs, memory, chunk)
            return h, memory._replace(short=2 * memory.short)

        setattr(layer, name, new)

    return change


def replace_in_all_layers(model, layers):
    function = layers[0].self_attn.bias_by_distance
    for layer in layers:
        layer.self_attn.bias_by_distance = function


def evaluate_a_layer(i):
    def change(model, layers):
        model.train()
        layers[i].eval()

    return change


def add_a_hook(kind):
    def change(model, layers):
        getattr(layers[1].mlp, kind)(lambda module, *given: given[-1])

    return change


def parametrise(model, layers):
    parametrize.register_parametrization(layers[1].mlp.up_proj, "weight", nn.Tanh())


def parametrise_the_gain(model, layers):
    parametrize.register_parametrization(layers[1].input_layernorm, "weight", nn.Tanh())


def prune_weights(model, layers):
    prune.l1_unstructured(layers[1].mlp.up_proj, "weight", 0.5)


def normalise_weights(model, layers):
    nn.utils.parametrizations.weight_norm(layers[1].mlp.up_proj)


def adapt(**how):
    def change(model, layers):
        lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **how)
        get_peft_model(model, lora)

    return change


def quantise(model, layers):
    quantize_(layers, Int8WeightOnlyConfig(version=2))


def compile_a_layer(model, layers):
    layers[0].compile(backend="eager")


def compile_a_module(model, layers):
    layers[1].mlp = torch.compile(layers[1].mlp, backend="eager")


def checkpoint_activations(model, layers):
    enable = "activation_checkpointing_enable"  # gradient_..., before transformers 5.20
    getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")()


def change_a_type(model, layers):
    layers[1].post_attention_layernorm.bfloat16()
    layers[1].mlp.bfloat16()


def widen_a_layer(model, layers):
    layers[1].mlp.up_proj = nn.Linear(32, 48, bias=False).eval()
    layers[1].mlp.down_proj = nn.Linear(48, 32, bias=False).eval()


def take_a_bias_away(model, layers):
    layers[1].mlp.up_proj = nn.Linear(32, 40, bias=False).eval()


def copy_the_configuration(model, layers):
    layers[1].self_attn.config = copy.deepcopy(model.config)
    layers[1].self_attn.config._attn_implementation = "eager"


def add_a_weight(model, layers):
    layers[1].register_parameter("gain", nn.Parameter(torch.ones(1)))


def add_a_module(model, layers):
    layers[1].mlp.another = nn.Dropout()


PARAMETRISED = r"layers\.1\.mlp\.up_proj is a ParametrizedLinear, whose code"
ACTIVATION = r"layers\.0\.mlp\.activation is a \w+, whose code"
REFUSED = {
    "a leaf that owns a parameter": (activations(lambda i: Scale(1 + i)), ACTIVATION),
    "the same in one layer": (
        lambda model, layers: setattr(layers[2].mlp, "activation", Scale(3)),
        r"layers\.2\.mlp\.activation is a Scale, whose code",
    ),
    "a parameter and sub-modules": (activations(lambda i: ScaledLinear(1 + i)), ACTIVATION),
    "a buffer": (activations(lambda i: Shift(i)), ACTIVATION),
    "a buffer that is not saved": (activations(lambda i: Shift(i, False)), ACTIVATION),
    "tensors and partials as attributes": (activations(lambda i: Power(i)), ACTIVATION),
    "nothing, but rows are mixed": (activations(lambda i: MeanOverRows()), ACTIVATION),
    "an activation with a parameter": (
        activations(lambda i: nn.PReLU()),
        r"layers\.0\.mlp\.activation has the parameters weight; none can be stacked",
    ),
    "another slope": (
        activations(lambda i: nn.LeakyReLU(0.3 * i)),
        r"layers\.1\.mlp\.activation\.negative_slope is 0\.3, that of layers\.0 is 0\.0",
    ),
    "a tensor as a slope": (
        activations(lambda i: nn.LeakyReLU(torch.tensor(0.3 * i))),
        r"layers\.1\.mlp\.activation\.negative_slope is tensor\(0\.3",
    ),
    "eps of a norm": (
        each("input_layernorm", "eps", lambda i: 10.0**-i),
        r"layers\.1\.input_layernorm\.eps is 0\.1, that of layers\.0 is 1\.0",
    ),
    "eps of keys and queries": (
        each("self_attn", "eps", lambda i: 10.0**-i),
        r"layers\.1\.self_attn\.eps is 0\.1",
    ),
    "dropout": (
        each("dropout", "p", lambda i: 0.1 * i),
        r"layers\.1\.dropout\.p is 0\.1, that of layers\.0 is 0\.0",
    ),
    "dropout of attention": (
        each("self_attn.dropout", "p", lambda i: 0.1 * i),
        r"layers\.1\.self_attn\.dropout\.p is 0\.1",
    ),
    "how empty slots are treated": (
        lambda model, layers: setattr(layers[1].self_attn, "with_empty", attention.hide_empty),
        r"layers\.1\.self_attn\.with_empty is <function hide_empty",
    ),
    "a configuration of its own": (copy_the_configuration, r"layers\.1\.self_attn\.config is"),
    "evaluation of the first layer": (
        evaluate_a_layer(0),
        r"layers\.1\.training is True, that of layers\.0 is False",
    ),
    "evaluation of the last layer": (evaluate_a_layer(2), r"layers\.2\.training is False"),
    "evaluation of a module": (
        lambda model, layers: layers[1].mlp.up_proj.train(),
        r"layers\.1\.mlp\.up_proj\.training is True",
    ),
    "a method": (replace_a_method(2, "close"), r"layers\.2 has a close of its own"),
    "a method of the long-term layer": (
        replace_a_method(1, "close"),
        r"layers\.1 has a close of its own",
    ),
    "the same function in all layers": (
        replace_in_all_layers,
        r"layers\.0\.self_attn has a bias_by_distance of its own",
    ),
    "a class of the user": (
        of_class(ForgetfulLayer, 2),
        r"layers\.2 is a ForgetfulLayer, layers\.0 a MelodiLayer",
    ),
    "a class of the user with long-term memory": (
        of_class(ForgetfulLongTermLayer, 1),
        r"layers\.1 is a ForgetfulLongTermLayer, which",
    ),
    "hooks before": (add_a_hook("register_forward_pre_hook"), r"layers\.1\.mlp has hooks"),
    "hooks behind": (add_a_hook("register_forward_hook"), r"layers\.1\.mlp has hooks"),
    "hooks on the way back": (
        add_a_hook("register_full_backward_hook"),
        r"layers\.1\.mlp has hooks",
    ),
    "hooks before the way back": (
        add_a_hook("register_full_backward_pre_hook"),
        r"layers\.1\.mlp has hooks",
    ),
    "a parametrisation": (
        parametrise,
        r"layers\.1\.mlp\.up_proj is a ParametrizedLinear, whose code",
    ),
    "a parametrised gain": (
        parametrise_the_gain,
        r"layers\.1\.input_layernorm is a ParametrizedRMSNorm, whose code",
    ),
    "pruning": (prune_weights, r"layers\.1\.mlp\.up_proj has hooks"),
    "weight norm": (
        normalise_weights,
        r"layers\.1\.mlp\.up_proj is a ParametrizedLinear, whose code",
    ),
    "adapters": (adapt(), r"layers\.0\.self_attn\.q_proj is a Linear, whose code"),
    "adapters in one layer": (
        adapt(layers_to_transform=[2]),
        r"layers\.2\.self_attn\.q_proj is a Linear, whose code",
    ),
    "quantised weights": (
        quantise,
        r"layers\.0\.self_attn\.q_proj\.weight is a Int8Tensor on cpu, not an nn\.Parameter",
    ),
    "a compiled layer": (compile_a_layer, r"layers\.0 has a _compiled_call_impl of its own"),
    "a compiled module": (compile_a_module, r"layers\.1\.mlp is a OptimizedModule, whose code"),
    "activation checkpointing": (
        checkpoint_activations,
        r"layers\.0 has a gradient_checkpointing of its own",
    ),
    "another type": (
        change_a_type,
        r"layers\.1\.post_attention_layernorm\.weight is \(32, 'torch\.bfloat16', 'cpu'\)",
    ),
    "another width": (widen_a_layer, r"layers\.1\.mlp\.up_proj\.out_features is 48"),
    "no bias": (take_a_bias_away, r"layers\.1\.mlp\.up_proj\.bias is None, that of layers"),
    "one more parameter": (add_a_weight, r"layers\.1 has the parameters gain"),
    "one more module": (add_a_module, r"layers\.1\.mlp\.another"),
}


@torch.no_grad()
def assert_refused(model, match, cells):
    ids = draw(2, 2 * WINDOW)
    cells.clear()
    model.config.schedule = "layers"
    wanted = model(ids[:, : WINDOW + 3]).logits
    model.config.schedule = "wavefront"
    with pytest.raises(ValueError, match=f"schedule is 'wavefront', but {match}") as error:
        model(ids)
    assert str(error.value).endswith("Set model.config.schedule to 'layers'.")
    cells.clear()
    if not model.training:  # no two whole windows
        assert_equal(model(ids[:, : WINDOW + 3]).logits, wanted)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_differ_in_more_than_weights_are_refused(case, cells):
    model, (change, match) = build("melodi"), REFUSED[case]
    change(model, model.model.layers)
    with torch.compiler.set_stance("force_eager"):
        assert_refused(model, match, cells)


@pytest.mark.usefixtures("float64")
def test_a_class_of_the_user_may_say_that_it_can_be_stacked(cells):
    """Its attributes are compared all the same."""
    model, ids = build("transformer_xl").double(), draw(2, WINDOWS * WINDOW)
    for scales in ([2.0, 2.0, 2.0], [2.0, 2.0, 3.0]):
        model.config.scales = scales
        for i in range(LAYERS):
            of_class(ScaledLayer, i)(model, model.model.layers)
        model.double()
        if scales[2] == 2:
            layers, diagonals = by_both(model, lambda: train(model, [ids]))
            torch.testing.assert_close(diagonals, layers, rtol=0, atol=1e-10)
    assert_refused(model, r"layers\.2\.scale is 3\.0, that of layers\.0 is 2\.0", cells)


def test_methods_replaced_in_a_class(monkeypatch, cells):
    """Those of the class that reads all layers are called; those of a subclass would not be."""
    model = build("melodi").double()

    def close(self, h, outputs, memory, chunk):
        h, memory = old(self, h, outputs, memory, chunk)
        return h, memory._replace(short=torch.zeros_like(memory.short))

    old = MelodiLayer.close
    monkeypatch.setattr(MelodiLayer, "close", close)
    ids = draw(2, WINDOWS * WINDOW)
    layers, diagonals = by_both(model, lambda: model(ids).logits)
    torch.testing.assert_close(diagonals, layers, rtol=0, atol=1e-10)
    monkeypatch.undo()
    monkeypatch.setattr(LongTermMelodiLayer, "close", close, raising=False)
    assert_refused(model, "layers.1 is a LongTermMelodiLayer, whose close would", cells)


def test_hooks_on_all_modules_are_refused(cells):
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert_refused(build("melodi"), "hooks are registered for all modules", cells)
    finally:
        handle.remove()


# accelerate places a parameter that a model owns itself, and does not know it again
@pytest.mark.filterwarnings("ignore:The following device_map keys do not match:UserWarning")
def test_offloaded_weights_are_refused(cells, tmp_path):
    build("melodi").save_pretrained(tmp_path)
    half = {"cpu": int(0.7 * sum(weight.nbytes for weight in build("melodi").parameters()))}
    how = {"device_map": "auto", "max_memory": half, "offload_folder": str(tmp_path / "offload")}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **how)
    assert_refused(model, r"layers\.\d[\w.]* has a forward of its own", cells)


@pytest.mark.parametrize("name", OTHERS)
def test_systems_without_a_wavefront_are_refused(name, cells):
    assert_refused(build(name), r"layers\.\d is a \w+, which", cells)


# The choice


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


def test_the_default_is_layers_and_auto_means_the_same(cells, tmp_path):
    """Checkpoints that were saved while "auto" was the default still load."""
    assert build("melodi").config.schedule == "layers"
    build("melodi", schedule="auto").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.schedule == "auto"
    model(draw(2, 10 * WINDOW))
    assert len(cells) == LAYERS * 10


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
