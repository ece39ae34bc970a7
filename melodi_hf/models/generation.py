"""generate() with a memory: what transformers leaves open, and continuing from what was read.

memory = model.read_document(book, tokenizer=tokenizer)                 read once
answer = model.continue_from(memory, question, max_new_tokens=50)       ask repeatedly

A conversation continues from the memory of the turn before:

turn = model.continue_from(memory, question, return_dict_in_generate=True, max_new_tokens=50)
turn = model.continue_from(turn.cache, next_question, ...)
"""

from typing import Any

import torch
from transformers import GenerationMixin, StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.utils import ModelOutput

from .cache import NOT_AN_ID, RECENT, UNKNOWN_ID, check_cache, clone_cache, within_windows
from .ragged import are_within
from .reading import read_document
from .versions import CACHE_NAME, check_cache_has_grown, choose_cache, rename_cache


class MemoryGenerationMixin(GenerationMixin):
    """GenerationMixin for models whose cache is a memory."""

    config: Any  # that of the model
    read_document = read_document

    def generate(self, *args, **kwargs):
        """As in transformers; the cache is `cache` or `past_key_values`.

        As in transformers, the cache has not read the last token that was generated.

        Ids that continue a memory without repeating what it has read are refused with a
        `ValueError` (transformers would drop some of them): see `continue_from`. A step that did
        not write to the cache raises `RuntimeError`.
        """
        kwargs = rename_cache(kwargs)
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        cache = kwargs.get(CACHE_NAME)
        if cache is not None:
            check_cache(cache, self.config.num_hidden_layers)
            cache.columns_at_last_step = None
        refuse_impossible(self, args, kwargs)
        for given in (ids, kwargs.get("inputs_embeds")):
            if isinstance(given, torch.Tensor) and given.shape[:1] == (0,):
                raise ValueError(
                    f"the input has shape {tuple(given.shape)}, "
                    f"the batch has 0 rows: give at least 1"
                )
        if ids is not None and cache is not None and kwargs.get("inputs_embeds") is None:
            mask = kwargs.get("attention_mask")
            refuse_lost_ids(cache, ids, mask)
            if mask is not None and is_assisted(self, args, kwargs):
                # If ids are new, transformers would cut off their part of the mask.
                kwargs["attention_mask"] = mask[:, -ids.shape[1] :]
        kwargs = follow_ended_rows(self, args, kwargs)
        output = super().generate(*args, **kwargs)  # type: ignore[misc]
        if isinstance(output, ModelOutput) and CACHE_NAME == "past_key_values":
            output.cache = output.past_key_values
        return output

    def continue_from(
        self,
        memory=None,
        input_ids=None,
        attention_mask=None,
        *,
        cache=None,
        past_key_values=None,
        **how,
    ):
        """Generate from what a memory has read, given new ids only. The memory stays as it was.

        memory: a `MelodiCache` of as many rows as input_ids, or of one row, from which all rows
            continue. `cache` and `past_key_values` are other names of it.
        input_ids, attention_mask: B T, the new ids and, if rows are padded, 0 at padding.
        how: as for `generate`. With `return_dict_in_generate=True` the result's `cache` is the
            memory of the next turn: each row has read all of its new ids and all that was generated
            for it, the last token too. This takes one more call of the model, of one token; with
            beams, of all new tokens, since the cache of a beam search is not that of the sequences
            that it returns.

        Returns what `generate` returns; sequences begin with input_ids. Raises `ValueError` for
        a memory that is none, for ids that are not B T, and whatever `generate` does.
        """
        memory = choose_memory(memory, cache, past_key_values)
        check_cache(memory, self.config.num_hidden_layers, "memory")
        refuse_no_rows(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)} and input_ids "
                f"{tuple(input_ids.shape)}: give the mask of the new ids alone"
            )
        rows, past = len(input_ids), int(memory.get_seq_length())
        num_beams = setting(self, how, "num_beams")
        copies = max(num_beams, setting(self, how, "num_return_sequences"))
        mask = torch.cat((attention_mask.new_ones(rows, past), attention_mask), dim=1)
        how = follow_ended_rows(self, (), {"use_cache": True} | how)
        cache = repeated(memory, rows, copies)
        output: Any = self.generate(input_ids, attention_mask=mask, cache=cache, **how)
        if isinstance(output, torch.Tensor):
            return output
        copies = len(output.sequences) // rows
        is_token = attention_mask.bool().repeat_interleave(copies, dim=0)
        if num_beams > 1:
            cache = repeated(memory, rows, copies)
            is_token = torch.cat((is_token, output.beam_indices >= 0), dim=1)
        else:
            columns = output.sequences.shape[1] - input_ids.shape[1]
            is_token = torch.cat((is_token, is_token.new_ones(len(is_token), columns)), dim=1)
            if columns and "ended_rows" in how:
                is_token[:, -1:] = ~how["ended_rows"].before_last(is_token)[:, None]
        read_rest(self, cache, output.sequences, is_token, past)
        output[CACHE_NAME] = output.cache = cache
        return output

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids, next_sequence_length=None, inputs_embeds=None, ended_rows=None, **kwargs
    ):
        """As in transformers; what is put behind a row that has ended is padding, not read.

        ended_rows: `EndedRows`, or None if rows do not end one by one.
        """
        kwargs = rename_cache(kwargs)
        cache, first = kwargs.get(CACHE_NAME), kwargs.get("is_first_iteration")
        if kwargs.get("use_cache"):
            check_cache_has_grown(cache, first)
        if cache is not None and first and next_sequence_length is None and inputs_embeds is None:
            # Assisted decoding gives all ids in the first step of a later turn.
            past = int(cache.get_seq_length())
            if past and goes_on_from(cache, input_ids, None):
                next_sequence_length = input_ids.shape[1] - past
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        is_wrapped = getattr(self.prepare_inputs_for_generation, "__self__", None) is not self
        if cache is not None and is_wrapped:
            inputs["past_key_values"] = cache  # by PEFT, which looks for this name on all versions
        if cache is not None and not first:
            set_step_mask(inputs, input_ids, cache, ended_rows, is_wrapped)
        return inputs

    def _validate_model_kwargs(self, model_kwargs):
        # `ended_rows` is ours; what PEFT puts in place of the method above does not name it.
        others = {name: x for name, x in model_kwargs.items() if name != "ended_rows"}
        super()._validate_model_kwargs(others)  # type: ignore[misc]

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, **_):
        """Generation needs no mask but that of the padding in the columns of this call."""
        if attention_mask is None or inputs_embeds.shape[1] == 1:
            return None
        return attention_mask[:, -inputs_embeds.shape[1] :].contiguous()


def set_step_mask(inputs, all_ids, cache, ended_rows, is_wrapped):
    """Set the mask of a step after the first: one of its own columns, 0 in rows that have ended.

    inputs: those of the step, changed in place; is_wrapped: whether PEFT will put the columns of
    its prompt before the mask, which must then be one of all ids.
    """
    given, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if given is None:
        return
    if mask is not None and not cache.is_compileable and not is_wrapped:
        inputs["attention_mask"] = mask[:, -given.shape[1] :]
    if ended_rows is None or given.shape[1] != 1:
        return
    ended = ended_rows.before_last(given)
    if cache.is_compileable or ended.any():  # a compiled graph has a mask always or never
        mask = (~ended)[:, None]
        if is_wrapped:
            mask = torch.cat((mask.new_ones(all_ids[:, 1:].shape), mask), dim=1)
        inputs["attention_mask"] = mask


class CompiledSteps:
    """The steps of one generate() with a static cache.

    A token that begins a window or closes one does what the others do not. In a graph that would be
    a branch in every layer, which asks the device each time and which torch leaves out of its CUDA
    graphs. So the graph is for tokens within the windows of all rows, and the others run eagerly:
    two of each window if all rows stand at the same slot.

    Where the rows stand is read once and counted from there, as if no row ended: the host does not
    wait. At the slots of a row that has ended a token may run eagerly without need.
    """

    def __init__(self, model, compiled):
        self.model, self.compiled = model, compiled
        self.slots: set[int] | None = None  # at which rows stand, unless they are to be read

    def __call__(self, **inputs):
        if not is_step(**inputs):
            self.slots = None
            return self.compiled(**inputs)
        cache, window = inputs[CACHE_NAME], self.model.config.window_length
        if self.slots is None:
            self.slots = set((cache.layers[0].progress.tokens_read % window).tolist())
        is_within = are_within(self.slots, window)
        self.slots = {(slot + 1) % window for slot in self.slots}
        if not is_within:
            return self.model(**inputs)
        with within_windows(cache):
            return self.compiled(**inputs)


def is_step(input_ids=None, attention_mask=None, **kwargs):
    """Whether a call reads one token of each row that goes on, after others. A mask of more columns
    (a prompt in pieces of one column) may let a row begin later."""
    cache = kwargs.get(CACHE_NAME)
    if cache is None or cache.layers[0].memory is None:
        return False
    each = (input_ids,) if attention_mask is None else (input_ids, attention_mask)
    return all(given is not None and given.shape[1] == 1 for given in each)


class EndedRows(StoppingCriteria):
    """Stops each row as the user's criteria do, and remembers which rows have ended.

    Behind a row that has ended transformers puts padding; the token that ended it is still read.
    """

    def __init__(self, model, args, kwargs):
        self.criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
        words = setting(model, kwargs, "stop_strings", args)
        if words is not None and kwargs.get("tokenizer") is not None:
            self.criteria.append(StopStringCriteria(kwargs["tokenizer"], words))
        end = setting(model, kwargs, "eos_token_id", args)
        self.end = [] if end is None else [end] if isinstance(end, int) else [int(i) for i in end]
        self.ended = self.ended_before = self.end_ids = None

    def __call__(self, input_ids, scores, **kwargs):
        last = input_ids[:, -1]
        stops = torch.zeros_like(last, dtype=torch.bool)
        for criterion in self.criteria:
            stops = stops | criterion(input_ids, scores, **kwargs)
        self.ended_before = torch.zeros_like(stops) if self.ended is None else self.ended
        self.ended = self.ended_before | stops
        if self.end:
            if self.end_ids is None:  # once: to bring numbers to a GPU makes the host wait for it
                self.end_ids = torch.tensor(self.end, device=last.device)
            self.ended = self.ended | torch.isin(last, self.end_ids)
        return stops

    def before_last(self, ids):
        """Rows that had ended before their last token, a mask (B,)."""
        if self.ended_before is None:
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        return self.ended_before


def refuse_impossible(model, args, kwargs):
    """Refuse what would give other tokens than it seems to."""
    has_memory = kwargs.get(CACHE_NAME) is not None
    if has_memory and not setting(model, kwargs, "use_cache", args):
        raise ValueError(
            "use_cache is False and a cache is given: each step would read everything into it "
            "again; pass one of them (use_cache=True continues from the memory)"
        )
    if setting(model, kwargs, "assistant_early_exit", args) is not None:
        raise ValueError(
            "assistant_early_exit would share one memory between a model and its first layers: "
            "give assistant_model or prompt_lookup_num_tokens"
        )


def choose_memory(memory, cache, past_key_values):
    """Return the memory that was passed under one of its three names."""
    given = choose_cache(cache, past_key_values)
    if memory is not None and given is not None and memory is not given:
        raise ValueError(
            f"memory is a {type(memory).__name__} and a cache is given, too: these are two names "
            f"of the same argument; pass one of them, and new ids as input_ids="
        )
    if memory is None and given is None:
        raise ValueError(
            "memory is None: pass what model.read_document(...) returned, or call "
            "model.generate(input_ids, ...), which needs no memory"
        )
    return given if memory is None else memory


def repeated(memory, rows, copies):
    """A copy of a memory for `copies` sequences of each of `rows` rows."""
    cache = clone_cache(memory)
    held = cache.layers[0].batch_size if cache.layers else 0
    if held == 1 < rows:
        cache.batch_repeat_interleave(rows)
    if held > 0 and copies > 1:
        cache.batch_repeat_interleave(copies)
    return cache


@torch.no_grad()
def read_rest(model, cache, sequences, is_token, past):
    """Read the last columns of `sequences` that a cache has not read.

    is_token: true at tokens, false at padding, of the shape of sequences; past: columns that the
    cache had read before the first of them.
    """
    unread = past + sequences.shape[1] - int(cache.get_seq_length())
    if unread > 0:
        mask = is_token[:, -unread:].to(torch.long)
        model(sequences[:, -unread:], attention_mask=mask, cache=cache, logits_to_keep=1)


def refuse_no_rows(input_ids):
    """New ids are rows and columns, at least one of each."""
    is_tensor = isinstance(input_ids, torch.Tensor)
    if not is_tensor or input_ids.dim() != 2 or input_ids.numel() == 0:
        found = tuple(input_ids.shape) if is_tensor else type(input_ids).__name__
        raise ValueError(f"input_ids are {found}: give a tensor of ids, rows and columns")


def refuse_lost_ids(cache, input_ids, attention_mask):
    """Refuse ids that do not begin with what the memory has read, unless a mask as long as both
    says that they come after it."""
    past, columns = int(cache.get_seq_length()), input_ids.shape[1]
    is_new = attention_mask is not None and attention_mask.shape[1] == past + columns
    if past == 0 or is_new or goes_on_from(cache, input_ids, attention_mask):
        return
    raise ValueError(
        f"input_ids have {columns} columns and do not go on from the {past} columns that "
        f"the cache has read: with new ids alone call model.continue_from(cache, input_ids, ...); "
        f"otherwise give all ids, those that were read first, with zeros in attention_mask where "
        f"padding was"
    )


def goes_on_from(cache, input_ids, attention_mask):
    """Whether ids begin with those that a memory has read, as far back as it knows them."""
    past, recent = int(cache.get_seq_length()), getattr(cache.layers[0], "recent", None)
    if input_ids.shape[1] <= past:
        return False
    if recent is None or len(recent) != len(input_ids):
        return True  # refused elsewhere
    known = min(past, RECENT)
    recent, ids = recent[:, RECENT - known :], input_ids[:, past - known : past]
    padding = recent == NOT_AN_ID
    same = padding | (recent == ids) | (recent <= UNKNOWN_ID)
    if attention_mask is not None and attention_mask.shape[1] == input_ids.shape[1]:
        is_padding = attention_mask[:, past - known : past] == 0
        same = same & ((is_padding == padding) | (recent < UNKNOWN_ID))
    return bool(same.all())


def setting(model, how, name, args=()):
    """A setting of generate(): an argument, or of the generation config."""
    config = how.get("generation_config") or (args[1] if len(args) > 1 else None)
    value = how.get(name, getattr(config or model.generation_config, name, None))
    return 1 if value is None and name.startswith("num_") else value


def follow_ended_rows(model, args, kwargs):
    """Return the arguments of generate() with `EndedRows`, if rows may end one by one."""
    if "ended_rows" in kwargs or not ends_row_by_row(model, args, kwargs):
        return kwargs
    rows = EndedRows(model, args, kwargs)
    return kwargs | {"stopping_criteria": StoppingCriteriaList([rows]), "ended_rows": rows}


def is_assisted(model, args, kwargs):
    """Whether generate() has candidates proposed, which it takes back if they are wrong."""
    has_assistant = kwargs.get("assistant_model") is not None
    return has_assistant or bool(setting(model, kwargs, "prompt_lookup_num_tokens", args))


def ends_row_by_row(model, args, kwargs):
    """Whether rows of this call may end at different steps, each at its own column."""
    if is_assisted(model, args, kwargs) or len(args) > 2:
        return False
    if setting(model, kwargs, "num_beams", args) > 1:
        return False
    ends = ("eos_token_id", "stop_strings")
    return bool(kwargs.get("stopping_criteria")) or any(
        setting(model, kwargs, name, args) is not None for name in ends
    )
