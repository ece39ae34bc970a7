"""generate() with a memory: what transformers leaves open, and continuing from what was read.

memory = model.read_document(book, tokenizer=tokenizer)     once
model.continue_from(memory, question, max_new_tokens=50)    as often as you like
"""

import torch
from transformers import GenerationMixin

from .cache import RECENT, clone_cache
from .reading import read_document


class MemoryGenerationMixin(GenerationMixin):
    """GenerationMixin for models whose cache is a memory."""

    read_document = read_document

    def generate(self, *args, **kwargs):
        """As in transformers. Ids that go on from a memory without repeating what it has read are
        refused with a `ValueError` (transformers would drop some of them): see `continue_from`."""
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        cache = kwargs.get("past_key_values")
        if ids is not None and cache is not None and kwargs.get("inputs_embeds") is None:
            refuse_lost_ids(cache, ids, kwargs.get("attention_mask"))
        ending = ending_tokens(self, args, kwargs)
        if ending is not None:
            kwargs["ending"] = ending
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def continue_from(self, memory, input_ids, attention_mask=None, **how):
        """Generate after what a memory has read, given new ids alone. The memory stays as it was.

        memory: a `MelodiCache` of as many rows as input_ids, or of one, which all rows go on from.
        input_ids, attention_mask: B T, the new ids and, if rows are padded, where they are real.
        how: as for `generate`; with `return_dict_in_generate` the result's `past_key_values` is the
            memory after it all.

        Returns what `generate` returns; sequences begin with input_ids.
        """
        cache, rows = clone_cache(memory), len(input_ids)
        past = int(cache.get_seq_length())
        if past and cache.batch_size == 1 < rows:
            cache.batch_repeat_interleave(rows)
        copies = max(setting(self, how, "num_beams"), setting(self, how, "num_return_sequences"))
        if past and copies > 1:
            cache.batch_repeat_interleave(copies)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        read = attention_mask.new_ones(rows, past)
        mask = torch.cat((read, attention_mask), dim=1)
        return self.generate(input_ids, attention_mask=mask, past_key_values=cache, **how)

    def prepare_inputs_for_generation(self, input_ids, *args, ending=None, **kwargs):
        """As in transformers; what is put behind a row that has ended is padding, not read.

        ending: the padding token and the tokens that end a row.
        """
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, *args, **kwargs
        )
        cache, first = kwargs.get("past_key_values"), kwargs.get("is_first_iteration")
        if ending is None or cache is None or first or inputs["input_ids"].shape[1] != 1:
            return inputs
        ended = rows_ended(input_ids, *ending)
        if cache.is_compileable or ended.any():  # a compiled graph has a mask always or never
            inputs["attention_mask"] = (~ended)[:, None]
        return inputs

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values=None, **_):
        """Generation needs no mask but that of the padding in the columns of this call."""
        if attention_mask is None or inputs_embeds.shape[1] == 1:
            return None
        return attention_mask[:, -inputs_embeds.shape[1] :].contiguous()


def refuse_lost_ids(cache, input_ids, attention_mask):
    """Refuse ids that do not begin with what the memory has read, unless a mask as long as both
    says that they come after it."""
    past, columns = int(cache.get_seq_length()), input_ids.shape[1]
    recent = getattr(cache.layers[0], "recent", None) if past else None
    if recent is None or (attention_mask is not None and attention_mask.shape[1] == past + columns):
        return
    known = min(past, RECENT)
    begins = columns > past
    if begins and len(recent) == len(input_ids):  # a cache of other rows is refused elsewhere
        recent, repeated = recent[:, RECENT - known :], input_ids[:, past - known : past]
        begins = bool(((recent < 0) | (recent == repeated)).all())  # not padding, not embeddings
    if not begins:
        raise ValueError(
            f"input_ids have {columns} columns and do not go on from the {past} columns that "
            f"past_key_values has read: with new ids alone call "
            f"model.continue_from(past_key_values, input_ids, ...); otherwise give all ids, those "
            f"that were read first"
        )


def setting(model, how, name):
    """A setting of generate(): an argument, or of the generation config."""
    config = how.get("generation_config") or model.generation_config
    value = how.get(name, getattr(config, name, None))
    return 1 if value is None else value


def ending_tokens(model, args, kwargs):
    """The padding token and the tokens that end a row, or None if rows do not end one by one."""
    if kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens"):
        return None
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    config = config or model.generation_config
    end = kwargs.get("eos_token_id", config.eos_token_id)
    if end is None:
        return None
    end = [end] if isinstance(end, int) else [int(token) for token in end]
    pad = kwargs.get("pad_token_id", config.pad_token_id)
    return end[0] if pad is None else int(pad), end


def rows_ended(input_ids, pad, end):
    """Rows that end in padding behind a token that ends a row, a mask (B,)."""
    tail = input_ids[:, -RECENT:]
    trailing = (tail == pad).long().flip(1).cumprod(1).sum(1)  # padding tokens at the end
    before = tail.gather(1, (tail.shape[1] - 1 - trailing).clamp(min=0)[:, None])[:, 0]
    is_end = torch.isin(before, torch.tensor(end, device=tail.device))
    ended = (trailing > 0) & (is_end | (trailing == tail.shape[1]))
    return ended | (trailing > 1) if pad in end else ended
