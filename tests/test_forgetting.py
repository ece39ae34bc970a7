"""Parts of a memory can be taken out of it, and what is left is what the model would hold."""

import math

import pytest
import torch

from melodi_hf.models.meliad import to_meliad

from .cases import every_case
from .models import (
    EACH,
    REMEMBERING,
    WINDOW,
    assert_differ,
    assert_equal,
    assert_near,
    build,
    draw,
)
from .references import blocks, melodi
from .test_parity import sizes_of

WINDOWS = 6  # of a document: more than a queue of three holds
MASKED = {"mask_empty_memory": True}


@torch.no_grad()
def read(model, ids, **left):
    """Logits of B T, window by window; before each the memory forgets all but `left`."""
    memory, logits = None, []
    for window in ids.split(WINDOW, dim=1):
        if memory is not None and left:
            memory = model.base_model.forget(memory, **left)
        output = model(window, memory=memory, return_memory=True)
        memory = output.memory
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def read_each_window_alone(model, ids):
    return torch.cat([model(window).logits for window in ids.split(WINDOW, dim=1)], dim=1)


@pytest.mark.parametrize("name", REMEMBERING)
def test_nothing_left_is_as_if_a_document_began_at_every_window(name):
    for changes in ({}, MASKED):
        model, ids = build(name, **changes), draw(2, WINDOWS * WINDOW)
        nothing = dict.fromkeys(model.base_model.windows_kept(), 0)
        assert_near(read(model, ids, **nothing), read_each_window_alone(model, ids))
        assert_differ(read(model, ids, **nothing), read(model, ids))


@pytest.mark.parametrize(
    "changes",
    [{"long_memory_layers": (0, 2)}, {"num_short_memory_tokens": 0}, {"mix_tokens": False}],
    ids=str,
)
def test_a_queue_cut_short_is_the_queue_of_a_model_built_with_fewer_windows(changes):
    model = build("melodi", **MASKED, **changes)
    ids = draw(2, WINDOWS * WINDOW)
    for windows in (1, 2):
        shorter = build("melodi", **MASKED, **changes, long_memory_windows=windows)
        shorter.load_state_dict(model.state_dict())
        assert_near(read(model, ids, long=windows), read(shorter, ids))
        assert_differ(read(model, ids, long=windows), read(model, ids))


@pytest.mark.parametrize("name", ["melodi", "melodi_masked"])
def test_to_keep_all_windows_is_to_forget_none(name):
    model, ids = build(name), draw(2, WINDOWS * WINDOW)
    for left in ({"long": 3}, {"long": 99}, {"short": 1}, {"short": 99, "long": 3}):
        assert_equal(read(model, ids, **left), read(model, ids))
    assert_differ(read(model, ids, long=2), read(model, ids))


@torch.no_grad()
def read_naively(model, ids, masked, short=1, long=99):
    """Logits of one document (T,) by the twin, whose states are cut by hand before each window."""
    params, sizes = to_meliad(dict(model.named_parameters()), model.config), sizes_of(model.config)
    pushed = sizes["long_term_memory_increment_size"]
    state, hidden = melodi.empty_state(params, sizes, 1), []
    for number, window in enumerate(ids.split(WINDOW)):
        x, u = params["embed/embedding"][window], params["layer_stack/summary_embeddings"]
        for i in range(sizes["num_layers"]):
            start = melodi.STACK.format(i) + "melodi_layer/"
            layer = {n[len(start) :]: t for n, t in params.items() if n.startswith(start)}
            z, m = state[melodi.SHORT.format(i)][0], state[melodi.LONG.format(i)][0]
            held = min(len(m), min(number, long) * pushed)
            z, m = z * short, torch.cat((m[: len(m) - held] * 0, m[len(m) - held :]))
            seen = (len(z) * short if number else 0, held) if masked else (len(z), len(m))
            x, u, z, m = melodi.read_window(layer, sizes, x, u, z, m, seen)
            state[melodi.SHORT.format(i)][0], state[melodi.LONG.format(i)][0] = z, m
        hidden.append(blocks.rms_norm(x, params["layer_stack/final_layernorm/scale"]))
    return torch.cat(hidden) @ params["embed/embedding"].T * model.config.hidden_size**-0.5


@every_case("masked", [False, True])
@every_case("left", [{"short": 0}, {"long": 0}, {"long": 1}, {"short": 0, "long": 2}], ids=str)
def test_every_part_is_forgotten_as_the_twin_forgets_it(masked, left):
    model = build("melodi", mask_empty_memory=masked)
    ids = draw(1, 5 * WINDOW)
    assert_near(read(model, ids, **left)[0], read_naively(model, ids[0], masked, **left))
    assert_differ(read(model, ids, **left), read(model, ids))


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_a_memory_that_forgot_grows_again(masked):
    model, ids = build("melodi", mask_empty_memory=masked), draw(2, WINDOWS * WINDOW)
    before = model(ids[:, : 3 * WINDOW], return_memory=True).memory
    left = model.base_model.forget(before, long=1, short=0)
    rest = ids[:, 3 * WINDOW :]
    memory, apart = left, []
    for window in rest.split(WINDOW, dim=1):
        output = model(window, memory=memory, return_memory=True)
        memory = output.memory
        apart.append(output.logits)
    assert_near(model(rest, memory=left).logits, torch.cat(apart, dim=1))
    assert_differ(model(rest, memory=left).logits, model(rest, memory=before).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["melodi_masked", "transformer_xl"])
def test_rows_forget_alone_wherever_they_stand(name):
    model, ids = build(name, **MASKED), draw(2, 4 * WINDOW)
    kinds = model.base_model.windows_kept()
    left = {kind: 0 if kind == "short" else 1 for kind in kinds}

    def go_on(ids, rest, resets, mask=None):
        """The last window begins a new document in some rows: these have less to forget."""
        memory = model(ids[:, :-WINDOW], return_memory=True).memory
        last = {"reset_memory": torch.tensor(resets), "return_memory": True}
        memory = model(ids[:, -WINDOW:], memory=memory, **last).memory
        memory = model.base_model.forget(memory, **left)
        return model(rest, memory=memory, attention_mask=mask).logits

    rest = draw(2, 2 * WINDOW)
    mask = torch.ones_like(rest)
    mask[0, : WINDOW - 3] = 0  # the row has less to read, so windows close at different steps
    found = go_on(ids, rest, [True, False], mask)
    for row, begin in ((0, WINDOW - 3), (1, 0)):
        alone = go_on(ids[row : row + 1], rest[row : row + 1, begin:], [row == 0])
        assert_near(found[row : row + 1, begin:], alone)


@torch.no_grad()
def test_a_new_document_has_forgotten_nothing():
    model, ids = build("melodi_masked"), draw(2, 3 * WINDOW)
    memory = model(ids, return_memory=True).memory
    memory = model.base_model.forget(memory, short=0)
    reset = torch.tensor([True, False])
    rest = draw(2, 3 * WINDOW)
    found = model(rest, memory=memory, reset_memory=reset).logits
    assert_near(found[:1], model(rest[:1]).logits)
    assert_differ(found[1:], model(rest[1:]).logits)


@torch.no_grad()
def test_what_was_forgotten_does_not_come_back():
    model, rest = build("melodi_masked"), draw(1, WINDOW)
    memory = model(draw(1, 3 * WINDOW), return_memory=True).memory
    once = model.base_model.forget(memory, long=1)
    twice = model.base_model.forget(once, long=3, short=1)
    assert_equal(model(rest, memory=twice).logits, model(rest, memory=once).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", EACH)
def test_the_memory_that_was_given_stays_as_it_was(name):
    model = build(name)
    memory = model(draw(2, 2 * WINDOW), return_memory=True).memory
    copies = [[tensor.clone() for tensor in layer] for layer in memory.layers]
    model.base_model.forget(memory, **dict.fromkeys(model.base_model.windows_kept(), 0))
    for layer, copied in zip(memory.layers, copies, strict=True):
        for tensor, copy in zip(layer, copied, strict=True):
            assert_equal(tensor, copy)


def test_models_tell_what_they_could_forget():
    for name, changes, kept in (
        ("melodi", {}, {"short": 1, "long": 3}),
        ("melodi_masked", {}, {"short": 1, "long": 3}),  # the oldest in part
        ("melodi", {"long_memory_layers": ()}, {"short": 1}),
        ("melodi_no_short", {}, {"long": 3}),
        ("melodi_no_short", {"long_memory_layers": ()}, {}),
        ("transformer_xl", {}, {"short": 1}),
        ("elastic_memory", {}, {"long": math.inf}),  # all of the past, or nothing
        ("elastic_memory", {"other_layers": "sliding"}, {"long": math.inf, "short": 1}),
    ):
        assert build(name, **changes).base_model.windows_kept() == kept


@torch.no_grad()
def test_what_cannot_be_forgotten_is_refused():
    model = build("melodi", long_memory_layers=())
    memory = model(draw(1, WINDOW), return_memory=True).memory
    with pytest.raises(ValueError, match="no long-term memory to forget: this model has short"):
        model.base_model.forget(memory, long=0)
    with pytest.raises(ValueError, match="short=-1 windows to keep: give 0 or more"):
        model.base_model.forget(memory, short=-1)
    within = model(draw(1, WINDOW + 1), return_memory=True).memory
    with pytest.raises(ValueError, match="within a window"):
        model.base_model.forget(within, short=0)
