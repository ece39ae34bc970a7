"""Continuing from a memory: with new ids only, with all ids, and after rows finished early."""

import copy
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, StaticCache

from melodi_hf import MelodiCache

from .cases import every_case
from .models import (
    DOCUMENT,
    EACH,
    FEW,
    VOCABULARY,
    WINDOW,
    assert_equal,
    assert_near,
    build,
    draw,
    tokens_read,
)

NEW = WINDOW + 2  # tokens


def generate(model, ids, **how):
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW} | how
    return model.generate(ids, **how)


def read(model, ids, **how):
    """Return a cache that has read `ids`."""
    cache = MelodiCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache, **how)
    return cache


@pytest.mark.parametrize("name", [*EACH, "plain_transformer", "memorizing_transformer_side"])
def test_new_ids_alone_go_on_from_a_memory_that_stays_as_it_was(name):
    model, document = build(name), draw(2, DOCUMENT)
    memory = read(model, document)
    for question in (draw(2, 1), draw(2, 4), draw(2, DOCUMENT + 6)):  # shorter and longer
        ids = torch.cat((document, question), dim=1)
        found = model.continue_from(memory, question, do_sample=False, max_new_tokens=NEW)
        assert_equal(found[:, : question.shape[1]], question)
        assert_equal(found[:, question.shape[1] :], generate(model, ids)[:, ids.shape[1] :])


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_several_questions_about_one_document(name, how):
    """One row of memory, three rows of questions, of different lengths, and several answers."""
    model, document = build(name), draw(1, DOCUMENT)
    questions = [draw(1, n) for n in (5, 2, WINDOW + 1)]
    width = max(question.shape[1] for question in questions)
    ids = torch.cat([torch.nn.functional.pad(q, (width - q.shape[1], 0)) for q in questions])
    how = {"max_new_tokens": 5} | how
    torch.manual_seed(1)
    found = model.continue_from(read(model, document), ids, attention_mask=(ids > 0).long(), **how)
    whole = torch.cat((document.expand(3, -1), ids), dim=1)
    torch.manual_seed(1)
    mask = torch.cat((torch.ones(3, DOCUMENT), ids > 0), dim=1).long()
    wanted = model.generate(whole, attention_mask=mask, **how)
    assert_equal(found, wanted[:, DOCUMENT:])


@pytest.mark.parametrize("name", FEW)
def test_turns_with_new_ids_alone(name):
    model, memory, said = build(name), MelodiCache(build(name).config), draw(1, 0)
    for turn in (draw(1, 5), draw(1, WINDOW), draw(1, 3)):
        out = model.continue_from(
            memory, turn, do_sample=False, max_new_tokens=6, return_dict_in_generate=True
        )
        said = torch.cat((said, turn), dim=1)
        wanted = generate(model, said, max_new_tokens=6)
        assert_equal(out.sequences[:, turn.shape[1] :], wanted[:, said.shape[1] :])
        memory, said = out.cache, wanted
        assert memory.get_seq_length() == said.shape[1]


class StopAtSome(StoppingCriteria):
    """Finish a row at every fourth id."""

    def __call__(self, input_ids, scores, **how):
        return input_ids[:, -1] % 4 == 0


ENDS = list(range(0, VOCABULARY, 4))
SAMPLING = {"do_sample": True, "num_return_sequences": 2, "top_k": 0}
BEAMS = {"num_beams": 3, "do_sample": False}
TURNS = {  # how tokens are chosen, and whether rows finish at every fourth id
    "greedy": ({"do_sample": False}, False),
    "greedy, rows that end": ({"do_sample": False, "eos_token_id": ENDS}, True),
    "sampling": (SAMPLING, False),
    "sampling, rows that end": (SAMPLING | {"eos_token_id": ENDS}, True),
    "sampling, rows that are stopped": (
        SAMPLING | {"eos_token_id": 4, "stopping_criteria": StoppingCriteriaList([StopAtSome()])},
        True,
    ),
    "beams": (BEAMS, False),
    "beams that end": (BEAMS | {"num_return_sequences": 2, "eos_token_id": ENDS}, True),
    "sampled beams that end": (BEAMS | {"do_sample": True, "eos_token_id": ENDS}, True),
    "prompt lookup": ({"do_sample": False, "prompt_lookup_num_tokens": 4}, False),
    "assistant": ({"do_sample": False, "assistant_model": True}, False),
    "assistant, a row that ends": (
        {"do_sample": True, "assistant_model": True, "eos_token_id": ENDS},
        True,
    ),
}
# A static cache does not support crop(), which assisted decoding needs.
SIMPLE = [kind for kind in TURNS if "assistant" not in kind and "lookup" not in kind]


# The hardest kinds, for the other memories.
HARD = ["sampling, rows that end", "sampled beams that end", "assistant, a row that ends"]


@pytest.mark.parametrize(
    ("name", "kind", "is_static"),
    [
        *product(["melodi"], TURNS, [False]),
        *product(["melodi"], SIMPLE, [True]),
        *product(FEW[1:], HARD, [False]),
        *product(FEW[1:], ["sampled beams that end"], [True]),
    ],
)
def test_turn_after_turn_equals_one_long_text(name, kind, is_static):
    """Each row of the memory has read its whole conversation, the last token too."""
    how, ends = TURNS[kind]
    model, rows, columns = build(name), 2, 0
    if "assistant" in kind or "lookup" in kind:
        rows = 1
    if "assistant" in kind:
        how = how | {"assistant_model": build(name, seed=1)}
    if is_static:
        memory = StaticCache(config=model.config, max_cache_len=9 * WINDOW)
    else:
        memory = MelodiCache(model.config)
    said = [[] for _ in range(rows)]
    torch.manual_seed(3)
    for width in (WINDOW + 1, 4):
        ids = draw(len(said), width)
        mask = torch.ones_like(ids)
        mask[len(ids) > 1 :, :2] = 0
        out = model.continue_from(
            memory,
            ids,
            attention_mask=mask,
            max_new_tokens=WINDOW + 1,
            return_dict_in_generate=True,
            pad_token_id=0,
            **how,
        )
        copies = len(out.sequences) // len(ids)
        for row, answer in enumerate(out.sequences[:, width:].tolist()):
            if row % copies == 0:
                before = said.pop(0) + ids[row // copies, mask[row // copies] == 1].tolist()
            last = next((i for i, token in enumerate(answer) if ends and token % 4 == 0), WINDOW)
            said.append(before + answer[: last + 1])
        memory, columns = out.cache, columns + out.sequences.shape[1]
        assert memory.get_seq_length() == columns
        assert tokens_read(memory).tolist() == [len(told) for told in said]
        following = draw(len(said), DOCUMENT)
        with torch.no_grad():
            logits = model(following, cache=copy.deepcopy(memory)).logits
            for told, row, found in zip(said, following, logits, strict=True):
                alone = torch.cat((torch.tensor(told), row))[None]
                assert_near(found, model(alone).logits[0, -DOCUMENT:])


@every_case("masked", [False, True])
@every_case("length", [1, DOCUMENT, DOCUMENT + 1])
def test_ids_that_would_be_lost_are_refused(masked, length):
    """transformers takes the new ids for all ids, and drops as many as were read."""
    model, new = build("melodi"), draw(1, length)
    mask = {"attention_mask": torch.ones_like(new)} if masked else {}
    memory = read(model, draw(1, DOCUMENT))
    with pytest.raises(ValueError, match=rf"the {DOCUMENT} columns .*model.continue_from\("):
        model.generate(new, cache=memory, max_new_tokens=3, **mask)
    assert memory.get_seq_length() == DOCUMENT


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("kind", [MelodiCache, DynamicCache])
def test_all_ids_are_not_refused(name, kind):
    model, document = build(name), draw(2, DOCUMENT)
    ids = torch.cat((document, draw(2, 3)), dim=1)
    cache = kind(config=model.config)
    with torch.no_grad():
        model(document, cache=cache)
    assert_equal(generate(model, ids, cache=cache), generate(model, ids))
    changed = ids.clone()
    changed[1, 7] = changed[1, 7] % 60 + 1  # not what was read
    with pytest.raises(ValueError, match=r"model.continue_from\("):
        generate(model, changed, cache=cache)


def test_the_document_may_have_been_given_as_embeddings():
    model, document = build("melodi"), draw(1, DOCUMENT)
    cache = MelodiCache(model.config)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(document), cache=cache)
    ids = torch.cat((document, draw(1, 3)), dim=1)
    assert_equal(generate(model, ids, cache=cache), generate(model, ids))


def row_that_ends(model):
    """Return two prompts and the first new token that occurs in row 0 only, or None."""
    ids = draw(2, WINDOW - 2)
    first, second = generate(model, ids, max_new_tokens=2 * WINDOW)[:, ids.shape[1] :].tolist()
    for at, token in enumerate(first[:WINDOW]):
        if at > 0 and token not in first[:at] and token not in second:
            return ids, at, token
    return None


@pytest.mark.parametrize(
    ("name", "pad_is_end"), [("melodi", True), *((name, False) for name in FEW)]
)
def test_a_second_turn_after_rows_that_ended_early(name, pad_is_end):
    """After one row finished, logits of each row equal those of its conversation alone."""
    model = build(name)
    found = next(filter(None, (row_that_ends(model) for _ in range(100))), None)
    assert found, "100 prompts gave no row with a token of its own"
    ids, at, end = found
    cache = MelodiCache(model.config)
    how = {"eos_token_id": end, "pad_token_id": end if pad_is_end else 0}
    found = generate(model, ids, max_new_tokens=2 * WINDOW, cache=cache, **how)
    turn, following = draw(2, 3), draw(2, DOCUMENT)
    mask = torch.ones_like(found)
    mask[0, ids.shape[1] + at + 1 :] = 0
    whole = torch.cat((found, turn), dim=1)
    mask = torch.cat((mask, torch.ones_like(turn)), dim=1)
    generate(model, whole, attention_mask=mask, cache=cache, max_new_tokens=1)
    with torch.no_grad():
        logits = model(following, cache=cache).logits
        for row, real in enumerate(mask.bool()):
            alone = torch.cat((whole[row, real], following[row]))[None]
            assert_near(logits[row], model(alone).logits[0, -DOCUMENT:])


class StopRowZero(StoppingCriteria):
    """Finish row 0 at a certain column."""

    def __call__(self, input_ids, scores, **how):
        return torch.tensor([True, False]) & (input_ids.shape[1] >= WINDOW + 3)


def test_a_second_turn_after_a_row_that_was_stopped():
    model, ids, turn = build("melodi"), draw(2, WINDOW - 2), draw(2, 3)
    cache = MelodiCache(model.config)
    stop = StoppingCriteriaList([StopRowZero()])
    how = {"cache": cache, "stopping_criteria": stop, "max_new_tokens": 2 * WINDOW}
    found = generate(model, ids, eos_token_id=VOCABULARY - 1, pad_token_id=0, **how)
    mask = torch.ones_like(found)
    mask[0, WINDOW + 3 :] = 0
    assert (found[0, WINDOW + 3 :] == 0).all()
    whole, mask = torch.cat((found, turn), dim=1), torch.cat((mask, torch.ones_like(turn)), dim=1)
    generate(model, whole, attention_mask=mask, cache=cache, max_new_tokens=1)
    following = draw(2, DOCUMENT)
    with torch.no_grad():
        logits = model(following, cache=cache).logits
        for row, real in enumerate(mask.bool()):
            alone = torch.cat((whole[row, real], following[row]))[None]
            assert_near(logits[row], model(alone).logits[0, -DOCUMENT:])


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("helper", ["assistant_model", "prompt_lookup_num_tokens"])
def test_turns_with_all_ids_and_assistance(name, helper):
    model, ids, cache = build(name), draw(1, WINDOW), MelodiCache(build(name).config)
    how = {helper: build(name, seed=1) if helper == "assistant_model" else 4}
    for _ in range(3):
        found = generate(model, ids, cache=cache, **how)
        assert_equal(found, generate(model, ids))
        assert cache.get_seq_length() == found.shape[1] - 1
        ids = torch.cat((found, draw(1, 3)), dim=1)


def test_padding_that_lies_elsewhere_than_it_was_read_is_refused():
    model, ids = build("melodi"), draw(2, DOCUMENT)
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    memory = read(model, ids, attention_mask=mask)
    whole = torch.cat((ids, draw(2, 3)), dim=1)
    moved = torch.ones_like(whole)
    moved[1, -7:-5] = 0
    with pytest.raises(ValueError, match="zeros in attention_mask where padding was"):
        generate(model, whole, attention_mask=moved, cache=memory)


@pytest.mark.parametrize("name", FEW)
def test_a_static_memory_stays_as_it_was_too(name):
    model, document, question = build(name), draw(1, DOCUMENT), draw(1, 3)
    memory = StaticCache(config=model.config, max_cache_len=DOCUMENT)
    with torch.inference_mode():
        model(document, cache=memory)
    ids = torch.cat((document, question), dim=1)
    for _ in range(2):
        found = model.continue_from(memory, question, do_sample=False, max_new_tokens=NEW)
        assert_equal(found[:, 3:], generate(model, ids)[:, ids.shape[1] :])
    assert int(memory.get_seq_length()) == DOCUMENT


def test_what_would_give_other_tokens_is_refused():
    model, ids = build("melodi"), draw(1, 5)
    with pytest.raises(ValueError, match="use_cache is False and a cache is given"):
        generate(model, ids, cache=MelodiCache(model.config), use_cache=False)
    with pytest.raises(ValueError, match="assistant_early_exit would share one memory"):
        generate(model, ids, assistant_early_exit=1)
    for wrong in ([1, 2], ids[0], ids[:, :0], ids[:0]):
        with pytest.raises(ValueError, match="give a tensor of ids, rows and columns"):
            model.continue_from(read(model, ids), wrong)
    with pytest.raises(ValueError, match="give the mask of the new ids alone"):
        model.continue_from(read(model, ids), ids, attention_mask=torch.ones(1, 10))


def test_the_memory_has_three_names():
    model, ids, question = build("melodi"), draw(1, DOCUMENT), draw(1, 3)
    memory, how = read(model, ids), {"do_sample": False, "max_new_tokens": NEW}
    wanted = model.continue_from(memory, question, **how)
    for key in ("memory", "cache", "past_key_values"):
        assert_equal(model.continue_from(input_ids=question, **{key: memory}, **how), wanted)
    for key in ("cache", "past_key_values"):
        with pytest.raises(ValueError, match="memory is a Tensor and a cache is given, too"):
            model.continue_from(question, **{key: memory})


def test_what_is_no_memory():
    model, ids = build("melodi"), draw(1, 3)
    memory = model(ids, return_memory=True).memory
    other = DynamicCache(config=LlamaConfig(num_hidden_layers=3))
    cases = [
        (memory, r"is a Memory, the memory of training .*MelodiCache.from_memory\(memory, model"),
        ("a/b.bin", r"is the path 'a/b.bin': load the file, MelodiCache.load\('a/b.bin', model="),
        (Path("b.bin"), "is the path 'b.bin'"),
        (3, "is a int: give MelodiCache"),
        (((ids, ids),), "is a tuple: give MelodiCache"),
        (model, "is a MelodiForCausalLM: give MelodiCache"),
        (other, r"holds 3 layers \(DynamicLayer\) and this model has 3"),
        (MelodiCache(build("melodi", num_hidden_layers=2).config), "holds 2 layers .* has 3"),
    ]
    calls = [
        lambda wrong: model.continue_from(wrong, ids),
        lambda wrong: model.generate(ids, cache=wrong),
        lambda wrong: model.read_document(ids, cache=wrong),
        lambda wrong: model(ids, cache=wrong),
    ]
    for wrong, message in cases:
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call(wrong)
    with pytest.raises(ValueError, match=r"memory is None: pass what model\.read_document"):
        model.continue_from(None, ids)
    for wrong in (model, None, {}, LlamaConfig()):
        name = type(wrong).__name__
        with pytest.raises(ValueError, match=rf"config is a {name}: .*MelodiCache\(model.config\)"):
            MelodiCache(wrong)


def test_a_batch_without_rows():
    model, none = build("melodi"), torch.zeros(0, 5, dtype=torch.long)
    calls = [
        model.generate,
        model.read_document,
        lambda ids: model.continue_from(read(model, draw(1, 3)), ids),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"\(0, 5\)"):
            call(none)


def test_a_prompt_may_be_embeddings():
    model, ids = build("melodi"), draw(2, DOCUMENT)
    wanted = generate(model, ids)[:, DOCUMENT:]
    embeds = model.get_input_embeddings()(ids).detach()
    how = {"inputs_embeds": embeds, "attention_mask": torch.ones_like(ids)}
    found = model.generate(do_sample=False, max_new_tokens=NEW, **how)
    assert_equal(found, wanted)


@pytest.mark.parametrize("name", EACH)
def test_a_memory_read_in_another_precision(name):
    model, ids, following = build(name), draw(2, DOCUMENT), draw(2, DOCUMENT)
    memory = read(model.double(), ids)
    model.float()
    with torch.no_grad():
        found = model(following, cache=memory).logits
        assert found.dtype == torch.float32
        assert_near(found, model(following, cache=read(model, ids)).logits)
        memory = read(model.bfloat16(), ids)
        found = model.float()(following, cache=memory).logits
    assert found.dtype == torch.float32
    assert found.isfinite().all()
