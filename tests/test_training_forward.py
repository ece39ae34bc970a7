"""What a training step sees: loss, gradients, checkpointing, dropout, and the formats."""

import pytest
import torch
from torch.nn import functional

from .cases import every_case
from .models import (
    DOCUMENT,
    EACH,
    FEW,
    MODEL_CLASSES,
    REMEMBERING,
    VOCABULARY,
    WINDOW,
    assert_differ,
    assert_equal,
    assert_near,
    build,
    build_config,
    draw,
    read_with_cache,
)


def gradients(model):
    """The gradients, zeros for a parameter that the loss does not depend on."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def labelled(*shape):
    """Ids and labels, some of which are left out."""
    ids = draw(*shape)
    labels = ids.clone()
    labels[:, 2:5] = -100
    labels[0, -1] = -100
    return ids, labels


@every_case("shifted", [False, True], ids=["labels", "shift_labels"])
@every_case("num_items", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])
def test_loss_and_gradients_are_those_of_cross_entropy(shifted, num_items):
    model = build("melodi")
    ids, labels = labelled(3, DOCUMENT)
    target = functional.pad(labels[:, 1:], (0, 1), value=-100)
    given = {"shift_labels": target} if shifted else {"labels": labels}
    output = model(ids, num_items_in_batch=num_items, **given)
    output.loss.backward()
    found = gradients(model)
    model.zero_grad()
    logits = model(ids).logits.flatten(0, 1)
    if num_items is None:
        wanted = functional.cross_entropy(logits, target.flatten())
    else:
        wanted = functional.cross_entropy(logits, target.flatten(), reduction="sum") / 7
    wanted.backward()
    torch.testing.assert_close(output.loss, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, gradients(model), rtol=1e-5, atol=1e-6)


def test_targets_left_out_do_not_count():
    model = build("melodi")
    ids, labels = labelled(2, DOCUMENT)
    with torch.no_grad():
        loss = model(ids, labels=labels).loss
        assert_differ(model(ids, labels=ids).loss, loss)
        kept = model(ids).logits[:, :-1][labels[:, 1:] != -100]
        counted = labels[:, 1:][labels[:, 1:] != -100]
    assert_near(loss, functional.cross_entropy(kept, counted), atol=1e-6)


def test_shift_labels_take_precedence():
    model, ids = build("melodi"), draw(2, DOCUMENT)
    other = draw(2, DOCUMENT)
    with torch.no_grad():
        loss = model(ids, labels=ids, shift_labels=other).loss
        assert_equal(loss, model(ids, shift_labels=other).loss)
        assert_differ(loss, model(ids, labels=ids).loss)


def train(model, segments):
    """Losses and gradients of a row of steps, each continuing the memory of the one before."""
    memory, found = None, []
    model.zero_grad()
    for i, ids in enumerate(segments):
        torch.manual_seed(i)
        reset = torch.tensor([False, i == 2])
        output = model(
            ids, labels=ids, memory=memory, reset_memory=reset, return_memory=True, use_cache=False
        )
        output.loss.backward()
        memory = output.memory
        found.append((output.loss.detach(), gradients(model)))
    return found


@pytest.mark.parametrize(
    ("name", "use_reentrant"),
    [*((name, False) for name in (*EACH, "memorizing_transformer_side")), ("melodi", True)],
)
def test_checkpointing_changes_neither_loss_nor_gradients(name, use_reentrant):
    model = build(name, dropout=0.1, attention_dropout=0.1).train()
    segments = [draw(2, length) for length in (2 * WINDOW, WINDOW + 3, 2 * WINDOW)]
    calls = []
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    wanted = train(model, segments)
    once = len(calls)
    enable = "activation_checkpointing_enable"  # gradient_..., before transformers 5.20
    enable = enable if hasattr(model, enable) else "gradient_checkpointing_enable"
    getattr(model, enable)({"use_reentrant": use_reentrant})
    found = train(model, segments)
    assert once >= len(segments)
    assert len(calls) == once + 2 * once  # forward, and again in backward
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def gradient_of_the_last_window(model, ids, calls):
    """Of the input embeddings, when the last window's logits are asked for."""
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    memory = None
    for piece in x.split(ids.shape[1] // calls, dim=1):
        output = model(inputs_embeds=piece, memory=memory, return_memory=True)
        memory = output.memory
    output.logits[:, -1].square().sum().backward()
    return x.grad[:, :WINDOW]


# The paper's memories stop them: test_compression.
CROSSED = [name for name in REMEMBERING if not name.startswith("compressive")]


@pytest.mark.parametrize("name", CROSSED)
def test_gradients_cross_windows_but_not_calls(name):
    model, ids = build(name).train(), draw(1, 2 * WINDOW)
    within = gradient_of_the_last_window(model, ids, calls=1)
    across = gradient_of_the_last_window(model, ids, calls=2)
    assert within.abs().max() > 1e-4
    assert_equal(across, torch.zeros_like(across))


def unread_by_anything(config):
    """The summary tokens' way beyond the last layer that keeps something of them; a compression
    that another loss trains, in training alone, or whose slots enter the memory too late."""
    if config.model_type == "compressive_transformer":
        layers = range(config.num_hidden_layers)
        return tuple(f"model.layers.{i}.compression." for i in layers)
    if config.model_type != "melodi":
        return ()
    every = range(config.num_hidden_layers)
    keeping = every if config.num_short_memory_tokens else config.long_memory_layers
    last = max(keeping, default=-1)
    beyond = tuple(f"model.layers.{i}.summary_mixer." for i in every if i >= last)
    return beyond if last >= 0 else (*beyond, "model.summary_embeddings")


def test_every_parameter_that_is_read_has_a_gradient(model):
    model.zero_grad()
    ids = draw(2, 3 * WINDOW)
    model(ids, labels=ids).loss.backward()
    asleep = unread_by_anything(model.config)
    for name, parameter in model.named_parameters():
        moves = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert moves == (not name.startswith(asleep)), name
    model.zero_grad()


@pytest.mark.parametrize("name", EACH)
def test_dropout_acts_in_training_alone(name):
    """With gradients and without: another kernel attends where they flow."""
    for site in ("dropout", "attention_dropout"):
        model, ids = build(name, **{site: 0.3}), draw(2, DOCUMENT)
        with torch.no_grad():
            evaluated = model(ids).logits
            assert_equal(model(ids).logits, evaluated)
        model.train()
        for enabled in (False, True):
            with torch.set_grad_enabled(enabled):
                once, twice = model(ids).logits, model(ids).logits
            assert_differ(once, twice)
            assert_differ(once, evaluated)


def test_without_dropout_training_reads_as_evaluation(model):
    ids = draw(2, DOCUMENT)
    with torch.no_grad():
        evaluated = model(ids).logits
    trained = model.train()(ids).logits
    model.eval()
    assert_near(trained, evaluated)


@pytest.mark.parametrize("field", ["dropout", "attention_dropout"])
def test_dropout_keeps_the_mean(field):
    """What is left is scaled up: over many draws the loss stays near that without dropout."""
    model, ids = build("melodi", **{field: 0.05}), draw(2, DOCUMENT)
    with torch.no_grad():
        evaluated = model(ids).logits
        model.train()
        mean = sum(model(ids).logits for _ in range(16)) / 16
        once = model(ids).logits
    assert (mean - evaluated).square().mean() < 0.4 * (once - evaluated).square().mean()


def test_embeddings_in_place_of_ids():
    model, ids = build("melodi"), draw(2, DOCUMENT)
    with torch.no_grad():
        x = model.get_input_embeddings()(ids)
        assert_equal(model(inputs_embeds=x).logits, model(ids).logits)
        assert_differ(model(inputs_embeds=x.flip(1)).logits, model(ids).logits)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", FEW)
def test_hidden_states_are_those_between_the_layers(name, padded):
    model, ids, mask = build(name), draw(2, DOCUMENT), torch.ones(2, DOCUMENT, dtype=torch.long)
    mask[1, : WINDOW + 3] = 0
    given = {"attention_mask": mask} if padded else {}
    shorter = build(name, num_hidden_layers=2)  # the same two layers
    shorter.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        output = model(ids, output_hidden_states=True, **given)
        states = output.hidden_states
        assert len(states) == model.config.num_hidden_layers + 1
        assert {state.shape for state in states} == {(2, DOCUMENT, model.config.hidden_size)}
        assert_equal(states[0], model.get_input_embeddings()(ids))
        wanted = shorter.model(ids, output_hidden_states=True, **given)
        assert_equal(states[1], wanted.hidden_states[1])
        assert_near(model.model.norm(states[2])[mask > 0], wanted.last_hidden_state[mask > 0])
        assert_equal(states[-1], model.model(ids, **given).last_hidden_state)
        assert_equal(model.lm_head(states[-1] * model.config.hidden_size**-0.5), output.logits)
        if padded:
            alone = model(ids[1:, WINDOW + 3 :], output_hidden_states=True).hidden_states
            for state, wanted in zip(states, alone, strict=True):
                assert_near(state[1, WINDOW + 3 :], wanted[0])


def test_logits_to_keep():
    model, ids = build("melodi"), draw(2, DOCUMENT)
    places = torch.tensor([3, WINDOW, DOCUMENT - 1])
    with torch.no_grad():
        logits = model(ids).logits
        assert_near(model(ids, logits_to_keep=2).logits, logits[:, -2:])
        assert_near(model(ids, logits_to_keep=places).logits, logits[:, places])
        assert model(ids, logits_to_keep=0).logits.shape == (2, DOCUMENT, VOCABULARY)


def test_columns_of_each_row_are_kept():
    model, ids = build("melodi"), draw(2, DOCUMENT)
    places = torch.tensor([[3, WINDOW], [DOCUMENT - 1, 0]])
    mask = torch.rand(2, DOCUMENT) < 0.3
    with torch.no_grad():
        logits = model(ids).logits
        wanted = torch.stack([row[kept] for row, kept in zip(logits, places, strict=True)])
        assert_near(model(ids, logits_to_keep=places).logits, wanted)
        assert_near(model(ids, logits_to_keep=mask).logits, logits[mask])


KEPT = {
    "the last": 4,
    "columns": torch.tensor([3, WINDOW]),
    "columns of each row": torch.tensor([[3, WINDOW], [DOCUMENT - 2, 0]]),
    "mask": torch.arange(2 * DOCUMENT).view(2, DOCUMENT) % 3 == 0,
}


@every_case("kept", KEPT.values(), ids=KEPT)
@every_case("skip_logits", [False, True])
def test_the_loss_is_that_of_the_columns_kept(kept, skip_logits):
    model, ids = build("melodi"), draw(2, DOCUMENT)
    targets = functional.pad(ids[:, 1:], (0, 1), value=-100)
    is_kept = torch.zeros(2, DOCUMENT, dtype=torch.bool)
    if isinstance(kept, int):
        is_kept[:, -kept:] = True
    elif kept.dtype == torch.bool:
        is_kept = kept
    else:
        is_kept.scatter_(1, kept.expand(2, 2), True)
    with torch.no_grad():
        logits = model(ids).logits
        wanted = functional.cross_entropy(logits[is_kept], targets[is_kept])
        found = model(ids, labels=ids, logits_to_keep=kept, skip_logits=skip_logits).loss
    assert_near(found, wanted)


@pytest.mark.parametrize("name", EACH)
def test_all_dropout_is_in_modules(name):
    """So that turning off the modules, as TRL does, turns off all of it."""
    model, ids = build(name, dropout=0.3, attention_dropout=0.3).train(), draw(2, DOCUMENT)
    with torch.no_grad():
        wanted = build(name)(ids).logits
        assert_differ(model(ids).logits, wanted)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0
        assert_near(model(ids).logits, wanted)


@pytest.mark.parametrize("name", EACH)
def test_float64_is_near_float32(name):
    ids = draw(2, DOCUMENT)
    with torch.no_grad():
        found = build(name).double()(ids).logits
        assert found.dtype == torch.float64
        assert_near(found, build(name)(ids).logits.double())


@pytest.fixture
def every_warning():
    """What torch says once in a process it says here whenever it happens."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.parametrize("name", [*EACH, "melodi_masked", "block_recurrent_two"])
@pytest.mark.usefixtures("every_warning")
def test_autocast_trains_and_generates(name):
    model, ids = build(name), draw(2, DOCUMENT)
    wanted = train(model.train(), [ids, ids])
    with torch.autocast("cpu", torch.bfloat16):
        found = train(model, [ids, ids])
        with torch.no_grad():
            whole = model.eval()(ids).logits
            generated = model.generate(
                ids[:, :WINDOW], attention_mask=torch.ones_like(ids[:, :WINDOW]), max_new_tokens=12
            )
            continued = read_with_cache(model, ids.split(5, dim=1))
    for (loss, grads), (exact, exact_grads) in zip(found, wanted, strict=True):
        assert loss.dtype == torch.float32
        assert abs(loss - exact) < 0.02 * exact
        both = (torch.cat([g.flatten() for g in x.values()]) for x in (grads, exact_grads))
        assert functional.cosine_similarity(*both, dim=0) > 0.98
    assert generated.shape == (2, WINDOW + 12)
    assert (continued.float() - whole.float()).abs().mean() < 0.1 * whole.float().std()


@pytest.mark.parametrize("name", FEW)
def test_the_loss_does_not_depend_on_where_padding_lies(name):
    """The first token of a row is predicted by nothing, wherever the row begins."""
    model, row = build(name), draw(1, 2 * WINDOW + 3)
    wanted = model(row, labels=row).loss
    for first in (0, 2, 5):
        ids = torch.cat((draw(1, first), row, draw(1, 5 - first)), dim=1)
        mask = torch.zeros_like(ids)
        mask[:, first : first + row.shape[1]] = 1
        labels = ids.masked_fill(mask == 0, -100)
        assert_near(model(ids, attention_mask=mask, labels=labels).loss, wanted)


@every_case("wrong", ["float ids", "list of ids", "additive mask"])
def test_inputs_of_another_kind_are_refused(wrong):
    model, ids = build("melodi"), draw(1, 5)
    mask = torch.zeros(1, 5) - 1e9 if wrong == "additive mask" else None
    ids = {"float ids": ids.float(), "list of ids": ids.tolist()}.get(wrong, ids)
    with pytest.raises(ValueError, match=r"whole numbers|other than 0 and 1"):
        model(ids, attention_mask=mask)


@pytest.mark.parametrize("name", ["melodi", "compressive_transformer"])
@pytest.mark.parametrize("padded", [False, True])
def test_skipping_the_logits_changes_neither_loss_nor_gradients(name, padded):
    model, ids = build(name).train(), draw(2, DOCUMENT)
    mask = torch.ones_like(ids)
    mask[1, :5] = 1 - padded
    kwargs = {"labels": ids, "attention_mask": mask, "num_items_in_batch": torch.tensor(50)}
    losses, gradients = [], []
    for skip in (False, True):
        model.zero_grad()
        output = model(ids, skip_logits=skip, **kwargs)
        assert (output.logits is None) == skip
        output.loss.backward()
        losses.append(output.loss.detach())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert_near(*losses, atol=1e-6)
    for plain, lean in zip(*gradients, strict=True):
        assert_near(lean, plain, atol=1e-6)


def test_logits_are_there_where_something_else_watches_the_head():
    model, ids = build("melodi"), draw(1, DOCUMENT)
    assert model(ids, skip_logits=True).logits is not None, "without labels there is no loss"
    with model.lm_head.register_forward_hook(lambda *_: None):
        assert model(ids, labels=ids, skip_logits=True).logits is not None
    assert model(ids, labels=ids, skip_logits=True).logits is None


@pytest.mark.parametrize("name", FEW)
def test_targets_of_padding_within_a_row_are_predicted_by_the_token_before_it(name):
    """Those before a row's first token are left out; the sum goes over single columns here."""
    model, ids = build(name), draw(2, DOCUMENT)
    mask = torch.rand(ids.shape) < 0.6
    mask[:, :3], mask[1, 3:6] = False, False
    targets, losses = draw(2, DOCUMENT), []
    with torch.no_grad():
        for row in range(2):
            alone = model(ids[row, mask[row]][None]).logits[0].log_softmax(-1)
            for column in range(DOCUMENT):
                read = int(mask[row, : column + 1].sum())
                if read:
                    losses.append(-alone[read - 1, targets[row, column]])
        found = model(ids, attention_mask=mask.long(), shift_labels=targets).loss
    assert 3 < len(losses) < 2 * DOCUMENT
    assert_near(found, torch.stack(losses).mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_one_batch_is_learned_by_heart(name):
    """As transformers asks: nine tenths of the loss are gone after 300 steps of 1e-3. So it is with
    the tied head of the default; the logits' factor 1/sqrt(D) slows down an untied one."""
    torch.manual_seed(0)
    config = build_config(name)
    model = MODEL_CLASSES[type(config)](config).train()
    ids, losses = draw(2, 4 * WINDOW), []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(300):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
