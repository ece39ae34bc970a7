"""What differs between the supported versions of transformers, 5.17 to 5.24, in one place.

up to 5.23   calls and outputs name the cache `past_key_values`: `CACHE_NAME`,
             `give_both_cache_names`
from 5.24    they name it `cache`; the old name is deprecated (in generate() and models until 6.0,
             in functions of the library until 5.40): `CACHE_NAME`
all          some keywords are passed to every model that accepts any: `HARMLESS_KEYWORDS`

Our own functions accept both names on all versions, without a warning. Inside the models the name
is `cache`.
"""

import re
import warnings

from torch import Tensor
from transformers import __version__
from transformers.modeling_outputs import BaseModelOutputWithPast

NEWEST_TESTED = (5, 24)  # the newest minor version of transformers that the test suite passed on

# The installed library's name of the cache: an argument of its functions, a field of its outputs.
CACHE_NAME = (
    "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
)

# Keywords that are accepted by forward() though its signature does not name them. All others raise,
# so that an argument that transformers renames is not ignored.
HARMLESS_KEYWORDS = {
    "position_ids": "generate() numbers the columns; we count tokens, and refuse restarts",
    "logits_to_keep": "TRL passes it to the base model, too, which has no logits",
    "tokenizer": "generate() passes it to every step; it is for stop strings and token healing",
    "token_type_ids": "tokenizers of no particular class return it; there is one type of token",
    "output_attentions": "read from the keywords by the model and by `capture_outputs`",
    "output_hidden_states": "read from the keywords by the model and by `capture_outputs`",
    "output_router_logits": "TRL and generate() pass it to every model; there are no experts",
    "num_items_in_batch": "the Trainer passes it to the loss",
    "ignore_index": "goes to the loss, as in the library's own loss functions",
    "is_causal": "integrations set it for every model; False is refused",
    "return_dict": "the decorators of forward() take it out; a subclass may come without them",
    "cu_seq_lens_q": "marks packed rows, which are refused",
    "cu_seq_lens_k": "comes with `cu_seq_lens_q`",
    "max_length_q": "comes with `cu_seq_lens_q`",
    "max_length_k": "comes with `cu_seq_lens_q`",
    "seq_idx": "marks packed rows, which are refused",
}


def warn_if_untested(version):
    """Warn of a version of transformers that is newer than the newest one tested."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and tuple(map(int, found.groups())) > NEWEST_TESTED:
        newest = ".".join(map(str, NEWEST_TESTED))
        warnings.warn(
            f"melodi_hf was tested with transformers up to {newest}, and this is {version}: if "
            f"something fails, install transformers=={newest}.*",
            stacklevel=3,
        )


def choose_cache(cache, past_key_values):
    """Return the cache that was passed under one of its two names, or None.

    Raises `ValueError` if both are passed and differ.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError(
            "cache and past_key_values are both given: they are two names of the same argument; "
            "pass one of them"
        )
    return past_key_values if cache is None else cache


def rename_cache(kwargs):
    """Return `kwargs` with the cache, if it is there, under the installed library's name for it."""
    names = ("cache", "past_key_values")
    rest = {name: value for name, value in kwargs.items() if name not in names}
    if len(rest) == len(kwargs):
        return rest
    return rest | {CACHE_NAME: choose_cache(*(kwargs.get(name) for name in names))}


def give_both_cache_names(output_class):
    """Let a class of outputs give its cache under both names; from 5.24 on the library does."""
    if CACHE_NAME == "past_key_values":
        get = output_class.__getitem__
        output_class.cache = property(lambda self: self.past_key_values)
        output_class.__getitem__ = lambda self, key: get(
            self, CACHE_NAME if key == "cache" else key
        )
    return output_class


def check_keywords(kwargs):
    """Raise `TypeError` for a keyword of forward() that nothing would read."""
    unknown = kwargs.keys() - HARMLESS_KEYWORDS.keys()
    if unknown:
        raise TypeError(
            f"forward() got an unknown keyword: {', '.join(sorted(unknown))}. Pass the arguments "
            f"that its signature names (the cache is `cache` or `past_key_values`). If "
            f"transformers {__version__} passed it, install a version up to "
            f"{'.'.join(map(str, NEWEST_TESTED))}, which this library was tested with"
        )
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal is False: these models are causal; leave it out")


def check_cache_has_grown(cache, is_first):
    """Raise `RuntimeError` if a step of generate() did not write to its cache.

    cache: that of this step, or None; is_first: whether this is surely the first step. How many
    columns the cache has read is noted on it (generate() clears the note) for the next step.
    """
    if cache is None:
        columns, before = None, None
    else:
        columns, before = cache.get_seq_length(), getattr(cache, "columns_at_last_step", None)
        if isinstance(columns, Tensor) and columns.device.type != "cpu" and cache.is_initialized:
            return  # to read the number, the host would wait for the device
        cache.columns_at_last_step = columns = int(columns)
    if (cache is None and not is_first) or (before is not None and columns <= before):
        found = "no cache" if cache is None else f"a cache that still holds {columns} columns"
        raise RuntimeError(
            f"generate() of transformers {__version__} continues with {found} after a step: the "
            f"next tokens would ignore those before them. Install transformers up to "
            f"{'.'.join(map(str, NEWEST_TESTED))}, or pass use_cache=False"
        )
