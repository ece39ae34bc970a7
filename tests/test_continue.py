"""Going on from a memory: with new ids alone, with all ids, and after rows that ended early."""

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, StaticCache

from melodi_hf import MelodiCache

from .models import (
    DOCUMENT,
    EACH,
    VARIED,
    VOCABULARY,
    WINDOW,
    assert_equal,
    assert_near,
    build,
    draw,
)

NEW = WINDOW + 2  # tokens


def generate(model, ids, **how):
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW} | how
    return model.generate(ids, **how)


def read(model, ids, **how):
    """A cache after reading `ids`."""
    cache = MelodiCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache, **how)
    return cache


@pytest.mark.parametrize("name", VARIED)
def test_new_ids_alone_go_on_from_a_memory_that_stays_as_it_was(name):
    model, document = build(name), draw(2, DOCUMENT)
    memory = read(model, document)
    for question in (draw(2, 1), draw(2, 4), draw(2, DOCUMENT + 6)):  # shorter and longer
        ids = torch.cat((document, question), dim=1)
        found = model.continue_from(memory, question, do_sample=False, max_new_tokens=NEW)
        assert_equal(found[:, : question.shape[1]], question)
        assert_equal(found[:, question.shape[1] :], generate(model, ids)[:, ids.shape[1] :])


@pytest.mark.parametrize("name", EACH)
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


@pytest.mark.parametrize("name", EACH)
def test_turns_with_new_ids_alone(name):
    model, ids, memory = build(name), draw(1, 5), MelodiCache(build(name).config)
    told = ids[:, :0]
    for turn in (ids, draw(1, WINDOW), draw(1, 3)):
        out = model.continue_from(
            memory, turn, do_sample=False, max_new_tokens=6, return_dict_in_generate=True
        )
        told = torch.cat((told, turn), dim=1)
        assert_equal(
            out.sequences[:, turn.shape[1] :],
            generate(model, told, max_new_tokens=6)[:, told.shape[1] :],
        )
        memory = out.cache
        # the last token is not read yet: it comes first next time
        memory_of_all = memory.clone()
        with torch.no_grad():
            model(out.sequences[:, -1:], cache=memory_of_all)
        memory, told = memory_of_all, torch.cat((told, out.sequences[:, turn.shape[1] :]), dim=1)
        assert memory.get_seq_length() == told.shape[1]


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, DOCUMENT - 1, DOCUMENT, DOCUMENT + 1, 3 * DOCUMENT])
def test_ids_that_would_be_lost_are_refused(name, masked, length):
    """transformers takes the new ids for all ids, and drops as many as were read."""
    model, new = build(name), draw(1, length)
    mask = {"attention_mask": torch.ones_like(new)} if masked else {}
    memory = read(model, draw(1, DOCUMENT))
    with pytest.raises(ValueError, match=rf"the {DOCUMENT} columns .*model.continue_from\("):
        model.generate(new, cache=memory, max_new_tokens=3, **mask)
    assert memory.get_seq_length() == DOCUMENT


@pytest.mark.parametrize("name", EACH)
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


@pytest.mark.parametrize("name", EACH)
def test_the_document_may_have_been_given_as_embeddings(name):
    model, document = build(name), draw(1, DOCUMENT)
    cache = MelodiCache(model.config)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(document), cache=cache)
    ids = torch.cat((document, draw(1, 3)), dim=1)
    assert_equal(generate(model, ids, cache=cache), generate(model, ids))


def row_that_ends(model):
    """Two prompts, and where row 0 comes to a token that neither had before, if it does."""
    ids = draw(2, WINDOW - 2)
    first, second = generate(model, ids, max_new_tokens=2 * WINDOW)[:, ids.shape[1] :].tolist()
    for at, token in enumerate(first[:WINDOW]):
        if at > 0 and token not in first[:at] and token not in second:
            return ids, at, token
    return None


@pytest.mark.parametrize("name", VARIED)
@pytest.mark.parametrize("pad_is_end", [False, True])
def test_a_second_turn_after_rows_that_ended_early(name, pad_is_end):
    """Row by row the logits that each conversation has alone, though one row had ended."""
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
    """Ends row 0 at a column, whatever it says there."""

    def __call__(self, input_ids, scores, **how):
        return torch.tensor([True, False]) & (input_ids.shape[1] >= WINDOW + 3)


@pytest.mark.parametrize("name", EACH)
def test_a_second_turn_after_a_row_that_was_stopped(name):
    model, ids, turn = build(name), draw(2, WINDOW - 2), draw(2, 3)
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


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("helper", ["assistant_model", "prompt_lookup_num_tokens"])
def test_turns_with_all_ids_and_assistance(name, helper):
    model, ids, cache = build(name), draw(1, WINDOW), MelodiCache(build(name).config)
    how = {helper: build(name, seed=1) if helper == "assistant_model" else 4}
    for _ in range(3):
        found = generate(model, ids, cache=cache, **how)
        assert_equal(found, generate(model, ids))
        assert cache.get_seq_length() == found.shape[1] - 1
        ids = torch.cat((found, draw(1, 3)), dim=1)


@pytest.mark.parametrize("name", EACH)
def test_padding_that_lies_elsewhere_than_it_was_read_is_refused(name):
    model, ids = build(name), draw(2, DOCUMENT)
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    memory = read(model, ids, attention_mask=mask)
    whole = torch.cat((ids, draw(2, 3)), dim=1)
    moved = torch.ones_like(whole)
    moved[1, -7:-5] = 0
    with pytest.raises(ValueError, match="zeros in attention_mask where padding was"):
        generate(model, whole, attention_mask=moved, cache=memory)


@pytest.mark.parametrize("name", EACH)
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


@pytest.mark.parametrize("name", EACH)
def test_what_would_give_other_tokens_is_refused(name):
    model, ids = build(name), draw(1, 5)
    with pytest.raises(ValueError, match="use_cache is False and a cache is given"):
        generate(model, ids, cache=MelodiCache(model.config), use_cache=False)
    with pytest.raises(ValueError, match="assistant_early_exit would share one memory"):
        generate(model, ids, assistant_early_exit=1)
    for wrong in ([1, 2], ids[0], ids[:, :0]):
        with pytest.raises(ValueError, match="give a tensor of ids, rows and columns"):
            model.continue_from(read(model, ids), wrong)
    with pytest.raises(ValueError, match="give the mask of the new ids alone"):
        model.continue_from(read(model, ids), ids, attention_mask=torch.ones(1, 10))


@pytest.mark.parametrize("name", EACH)
def test_a_prompt_may_be_embeddings(name):
    model, ids = build(name), draw(2, DOCUMENT)
    wanted = generate(model, ids)[:, DOCUMENT:]
    embeds = model.get_input_embeddings()(ids).detach()
    how = {"inputs_embeds": embeds, "attention_mask": torch.ones_like(ids)}
    found = model.generate(do_sample=False, max_new_tokens=NEW, **how)
    assert_equal(found, wanted)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_memory_read_in_another_precision(name, dtype):
    model, ids = build(name), draw(2, DOCUMENT)
    memory = read(model.to(dtype), ids)
    model.to(torch.float32)
    with torch.no_grad():
        found = model(draw(2, DOCUMENT), cache=memory).logits
    assert found.dtype == torch.float32
    assert found.isfinite().all()
