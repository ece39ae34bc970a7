"""generate() for models whose cache is a memory, and continuing from a memory.

memory = model.read_document(book, tokenizer=tokenizer)                 read once
answer = model.continue_from(memory, question, max_new_tokens=50)       query repeatedly

A conversation continues from the memory of the turn before:

turn = model.continue_from(memory, question, return_dict_in_generate=True, max_new_tokens=50)
turn = model.continue_from(turn.cache, next_question, ...)
"""

import inspect
from typing import Any

import torch
from transformers import GenerationMixin, StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.utils import ModelOutput

from .cache import (
    PADDING_ID,
    RECENT,
    UNKNOWN_ID,
    check_cache,
    clone_cache,
    mid_window,
    shared_state,
)
from .reading import read_document
from .validation import CACHE_NAME, check_cache_has_grown, rename_cache, require
from .windows import all_mid_window


class MemoryGenerationMixin(GenerationMixin):
    """GenerationMixin for models whose cache is a memory."""

    config: Any  # that of the model
    read_document = read_document

    def generate(self, *args, **kwargs):
        """Generate as in transformers; the cache is `cache` or `past_key_values`.

        As in transformers, the cache has not read the last token that was generated. Raises
        `ValueError` for ids that continue a memory without repeating what it has read (transformers
        would drop some of them; see `continue_from`), `RuntimeError` if a step does not write to
        the cache.
        """
        named = inspect.signature(super().generate).bind(*args, **kwargs).arguments
        kwargs = rename_cache(named.pop("kwargs", {}) | named)
        check_settings(self, kwargs)
        cache, mask = kwargs.get(CACHE_NAME), kwargs.get("attention_mask")
        ids = kwargs.get("inputs", kwargs.get("input_ids"))
        if ids is not None and kwargs.get("inputs_embeds") is None:
            check_ids(ids)
            check_new_ids(cache, ids, mask)
            if cache is not None and mask is not None and is_assisted(self, kwargs):
                # transformers would remove the last columns of a mask that is longer than the ids.
                kwargs["attention_mask"] = mask[:, -ids.shape[1] :]
        output = super().generate(**follow_finished_rows(self, kwargs))  # type: ignore[misc]
        if isinstance(output, ModelOutput):
            output.cache = getattr(output, CACHE_NAME, None)
        return output

    def continue_from(self, memory=None, input_ids=None, attention_mask=None, **kwargs):
        """Generate from a memory, given new ids only. The memory is not changed.

        Args:
            memory: a `MelodiCache` of as many rows as input_ids, or of one row, from which all
                rows continue. `cache` and `past_key_values` are other names of it.
            input_ids, attention_mask: B T, the new ids and, if rows are padded, 0 at padding.
            kwargs: as for `generate`. With `return_dict_in_generate=True` the result's `cache` is
                the memory for the next turn: each row has read its new ids and all that was
                generated for it, the last token too. This takes one more call of the model, of one
                token; with beams of all new tokens, since the cache of a beam search does not
                belong to the sequences that it returns.

        Returns what `generate` returns; sequences begin with input_ids. Raises `ValueError` for
        a memory of another type, for ids that are not B T, and as `generate` does.
        """
        kwargs = rename_cache(kwargs)
        memory = choose_memory(memory, kwargs.pop(CACHE_NAME, None))
        check_cache(memory, self.config.num_hidden_layers, "memory")
        check_ids(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        found = f"{tuple(mask.shape)} and input_ids {tuple(input_ids.shape)}"
        remedy = "give the mask of the new ids alone"
        require(mask.shape == input_ids.shape, f"attention_mask has shape {found}: {remedy}")
        rows, past = len(input_ids), int(memory.get_seq_length())
        copies = setting(self, kwargs, "num_return_sequences", 1)
        cache = copy_rows(memory, rows, max(copies, setting(self, kwargs, "num_beams", 1)))
        whole_mask = torch.cat((mask.new_ones(rows, past), mask), dim=1)
        kwargs = follow_finished_rows(self, {"use_cache": True} | kwargs)
        output: Any = self.generate(input_ids, attention_mask=whole_mask, cache=cache, **kwargs)
        if not isinstance(output, torch.Tensor):
            copies, total = len(output.sequences) // rows, past + output.sequences.shape[1]
            cache = copy_rows(memory, rows, copies) if "beam_indices" in output else cache
            mask = mask.repeat_interleave(copies, dim=0)
            mask = mask_tokens(output, mask, kwargs.get("finished_rows"))
            unread = total - columns_read(cache)
            if unread > 0:
                ids, how = output.sequences[:, -unread:], {"cache": cache, "logits_to_keep": 1}
                with torch.no_grad():
                    self(ids, attention_mask=mask[:, -unread:], **how)  # type: ignore[operator]
            output[CACHE_NAME] = output.cache = cache
        return output

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids, next_sequence_length=None, inputs_embeds=None, finished_rows=None, **kwargs
    ):
        """Prepare a step as in transformers; padding behind a row that has finished is masked.

        finished_rows: `FinishedRows`, or None if rows do not finish one by one.
        """
        kwargs = rename_cache(kwargs)
        cache, is_first = kwargs.get(CACHE_NAME), kwargs.get("is_first_iteration")
        if kwargs.get("use_cache"):
            check_cache_has_grown(cache, is_first)
        if is_first and next_sequence_length is None and inputs_embeds is None:
            # Assisted decoding passes all ids in the first step of a later turn.
            next_sequence_length = count_unread_columns(cache, input_ids)
        kwargs |= {"next_sequence_length": next_sequence_length, "inputs_embeds": inputs_embeds}
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]
        if cache is None:
            return inputs
        is_wrapped = getattr(self.prepare_inputs_for_generation, "__self__", None) is not self
        if is_wrapped:  # by PEFT, which reads the cache under this name with all versions
            inputs["past_key_values"] = cache
        mask = (inputs if finished_rows is None else kwargs).get("attention_mask")
        if is_first or (finished_rows is None and mask is None):
            return inputs
        mask = torch.ones_like(input_ids) if mask is None else mask
        # PEFT extends the mask by the columns of its prompt, which needs all columns.
        mask = mask if is_wrapped else mask[:, -inputs["input_ids"].shape[1] :]
        if finished_rows is not None:
            mask = torch.cat((mask[:, :-1], finished_rows.is_reading(mask)), dim=1)
        inputs["attention_mask"] = mask
        return inputs

    def _validate_model_kwargs(self, model_kwargs):
        # The method that PEFT puts in place of the one above does not name `finished_rows`.
        others = {name: x for name, x in model_kwargs.items() if name != "finished_rows"}
        super()._validate_model_kwargs(others)  # type: ignore[misc]

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, **_):
        """Return the padding mask of this call's columns, the only mask that is needed."""
        if attention_mask is None or inputs_embeds.shape[1] == 1:
            return None
        return attention_mask[:, -inputs_embeds.shape[1] :].contiguous()


class CompiledSteps:
    """The steps of one generate() with a static cache.

    Tokens that begin or complete a window need other operations than the rest. In a graph these
    would be a branch in every layer, which waits for the device and which torch excludes from CUDA
    graphs. So the graph is for tokens inside the windows of all rows, and the others run eagerly.

    The offsets of the rows are read from the device once, then counted as if no row finished.
    """

    def __init__(self, model, compiled):
        self.model, self.compiled = model, compiled
        self.offsets: set[int] | None = None  # of the rows in their windows, None to read them

    def __call__(self, input_ids=None, attention_mask=None, **inputs):
        mask = input_ids if attention_mask is None else attention_mask
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        cache, length = inputs.get(CACHE_NAME), self.model.config.window_length
        state = shared_state(cache)
        # One token per row, after others; a longer mask may hide some rows.
        if state is None or input_ids is None or not input_ids.shape[1] == mask.shape[1] == 1:
            self.offsets = None
            return self.compiled(**inputs)
        if self.offsets is None:
            self.offsets = set((state.progress.tokens_read % length).tolist())
        is_mid_window = all_mid_window(self.offsets, length)
        self.offsets = {(offset + 1) % length for offset in self.offsets}
        if not is_mid_window:
            return self.model(**inputs)
        with mid_window(cache):
            return self.compiled(**inputs)


class FinishedRows(StoppingCriteria):
    """Stop each row by the user's criteria, and record which rows have finished.

    transformers appends padding to a row that has finished; the token that finished it is read.
    """

    def __init__(self, model, kwargs):
        self.criteria = StoppingCriteriaList(setting(model, kwargs, "stopping_criteria", []))
        strings, tokenizer = setting(model, kwargs, "stop_strings"), kwargs.get("tokenizer")
        if strings is not None and tokenizer is not None:
            self.criteria.append(StopStringCriteria(tokenizer, strings))
        end_ids = setting(model, kwargs, "eos_token_id", [])
        self.end_ids = torch.as_tensor(end_ids, dtype=torch.long).flatten()
        self.finished = torch.zeros(1, dtype=torch.bool)  # (B,), after the last token, and
        self.finished_before = self.finished  # before it

    def __call__(self, input_ids, scores, **kwargs):
        last = input_ids[:, -1]
        stops = torch.zeros_like(last, dtype=torch.bool)
        for criterion in self.criteria:
            stops = stops | criterion(input_ids, scores, **kwargs)
        self.end_ids = self.end_ids.to(last.device)  # copied once: the copy waits for the device
        self.finished_before = torch.zeros_like(stops) | self.finished.to(last.device)
        self.finished = self.finished_before | stops | torch.isin(last, self.end_ids)
        return stops

    def is_reading(self, ids):
        """Return the rows that had not finished before their last token, a mask (B, 1)."""
        is_finished = self.finished_before.reshape(-1, 1).to(ids.device)
        return ids.new_ones(len(ids), 1, dtype=torch.bool) & ~is_finished


def follow_finished_rows(model, kwargs):
    """Add `FinishedRows` to the arguments of generate() if rows may finish one by one."""
    ends = ("eos_token_id", "stop_strings", "stopping_criteria")
    can_finish = any(setting(model, kwargs, name) is not None for name in ends)
    is_search = is_assisted(model, kwargs) or setting(model, kwargs, "num_beams", 1) > 1
    if "finished_rows" in kwargs or is_search or not can_finish:
        return kwargs
    rows = FinishedRows(model, kwargs)
    return kwargs | {"stopping_criteria": StoppingCriteriaList([rows]), "finished_rows": rows}


def is_assisted(model, kwargs):
    """Whether generate() proposes candidate tokens and removes them from the cache if wrong."""
    return any(setting(model, kwargs, x) for x in ("assistant_model", "prompt_lookup_num_tokens"))


def setting(model, kwargs, name, default=None):
    """Return a setting of generate(): an argument, or from the generation config."""
    config = kwargs.get("generation_config") or model.generation_config
    value = kwargs.get(name, getattr(config, name, None))
    return default if value is None else value


def choose_memory(memory, cache):
    """Return the memory that was passed under one of its names."""
    remedy = "pass what model.read_document(...) returned, or call model.generate(input_ids, ...)"
    given = [x for x in (memory, cache) if x is not None]
    require(given, f"memory is None: {remedy}, which needs no memory")
    found = f"memory is a {type(memory).__name__} and a cache is given, too: these are two names"
    require(given[0] is given[-1], f"{found}; pass one of them, and new ids as input_ids=")
    return given[0]


def copy_rows(memory, rows, copies):
    """Copy a memory for `copies` sequences of each of `rows` rows."""
    cache, state = clone_cache(memory), shared_state(memory)
    is_shared = state is not None and len(state.progress.tokens_read) == 1
    repeats = copies * rows if is_shared else copies
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)
    return cache


def mask_tokens(output, prompt_mask, finished_rows):
    """Return a mask of what generate() returned, 0 at padding; only unread columns count."""
    mask = torch.ones_like(output.sequences)
    prompt, new = mask.tensor_split([prompt_mask.shape[1]], dim=1)
    prompt.copy_(prompt_mask)
    if "beam_indices" in output:
        new.copy_(output.beam_indices >= 0)
    elif finished_rows is not None:  # the last token is the only one that was not read
        new[:, -1:] = finished_rows.is_reading(new)
    return mask


def check_settings(model, kwargs):
    """Check the cache, and raise `ValueError` for settings that give unexpected tokens with it."""
    found = "assistant_early_exit would share one memory between a model and its first layers"
    is_early = setting(model, kwargs, "assistant_early_exit") is not None
    require(not is_early, f"{found}: give assistant_model or prompt_lookup_num_tokens")
    cache = kwargs.get(CACHE_NAME)
    if cache is not None:
        check_cache(cache, model.config.num_hidden_layers)
        cache.columns_at_last_step = None
        found = "use_cache is False and a cache is given: each step would read everything again"
        require(setting(model, kwargs, "use_cache"), f"{found}; pass use_cache=True or no cache")


def check_ids(input_ids):
    """Raise `ValueError` unless ids are rows and columns, at least one of each."""
    shape = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else ()
    found = f"input_ids are {shape or type(input_ids).__name__}"
    require(len(shape) == 2 and all(shape), f"{found}: give a tensor of ids, rows and columns")


def check_new_ids(cache, input_ids, attention_mask):
    """Raise `ValueError` for new ids alone, unless a mask of all columns marks them as such."""
    past, columns = columns_read(cache), input_ids.shape[1]
    is_marked = attention_mask is not None and attention_mask.shape[1] == past + columns
    if is_marked or count_unread_columns(cache, input_ids, attention_mask) is not None:
        return
    raise ValueError(
        f"input_ids have {columns} columns and do not continue the {past} columns that the cache "
        f"has read: with new ids alone call model.continue_from(cache, input_ids, ...); otherwise "
        f"give all ids, those that were read first, with zeros in attention_mask where padding was"
    )


def columns_read(cache):
    """Return how many columns a cache has read, padding included."""
    return 0 if cache is None else int(cache.get_seq_length())


def count_unread_columns(cache, input_ids, attention_mask=None):
    """Count the columns behind those that a cache has read, None if ids do not begin with them."""
    past, state, (rows, columns) = columns_read(cache), shared_state(cache), input_ids.shape
    if past == 0 or columns <= past:
        return columns if past == 0 else None
    read = slice(max(0, past - RECENT), past)  # ids further back are not held
    ids, recent = input_ids[:, read], state.recent[:, -past:]
    if len(recent) != rows:
        return columns - past  # refused by the model
    is_padding = recent == PADDING_ID
    is_equal = is_padding | (recent == ids) | (recent <= UNKNOWN_ID)
    if attention_mask is not None and attention_mask.shape[1] == columns:
        is_masked = attention_mask[:, read] == 0
        is_equal &= (is_masked == is_padding) | (recent < UNKNOWN_ID)
    return columns - past if is_equal.all() else None
