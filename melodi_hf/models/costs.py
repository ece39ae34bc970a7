"""What it costs: multiplications of matrix products, and bytes, from the configuration alone.

Only what must be done is counted: attention between pairs that see each other, a queue's filled
slots. One multiplication with its addition is two floating-point operations (FLOPs). Norms,
softmax and activations are left out, as is usual.
"""

from functools import singledispatch

from .compression import DILATIONS
from .configuration_block_recurrent import BlockRecurrentConfig
from .configuration_compressive_transformer import CompressiveTransformerConfig
from .configuration_elastic_memory import ElasticMemoryConfig
from .configuration_melodi import MelodiConfig
from .configuration_memorizing_transformer import MemorizingTransformerConfig
from .configuration_plain_transformer import PlainTransformerConfig
from .configuration_transformer_xl import TransformerXLConfig


def forward_flops(config, num_tokens, queue_filled=None, with_logits=True) -> int:
    """FLOPs to read one row of `num_tokens` tokens from the beginning of a window.

    queue_filled: filled slots of a long-term memory throughout; None: all of them.
    """
    products = body_products(config, num_tokens, queue_filled)
    if with_logits:
        products += num_tokens * config.hidden_size * config.vocab_size
    return 2 * products


def training_flops(config, num_tokens, queue_filled=None) -> int:
    """FLOPs of a training step on one row: backward costs twice what forward does."""
    return 3 * forward_flops(config, num_tokens, queue_filled)


@singledispatch
def body_products(config, num_tokens, queue_filled=None) -> int:
    """Multiplications of all layers for one row."""
    raise TypeError(f"nothing is known of the cost of a {type(config).__name__}")


@body_products.register
def _(config: MelodiConfig, num_tokens, queue_filled=None):
    windows, rest = divmod(num_tokens, config.window_length)
    queue = config.long_memory_length if queue_filled is None else queue_filled
    per_window = _melodi_window(config, config.window_length, config.num_summary_tokens, queue)
    partial = _melodi_window(config, rest, 0, queue) if rest else 0
    return windows * (per_window + _melodi_closing(config)) + partial


@body_products.register
def _(config: TransformerXLConfig, num_tokens, queue_filled=None):
    per_token = _projections(config) + 2 * _heads(config) * config.window_length
    return config.num_hidden_layers * num_tokens * per_token


@body_products.register
def _(config: PlainTransformerConfig, num_tokens, queue_filled=None):
    # A token sees what its context has read, W tokens at most.
    length = config.window_length
    contexts, rest = divmod(num_tokens, config.context_windows * length)
    pairs = contexts * _pairs_within(config.context_windows * length, length)
    pairs += _pairs_within(rest, length)
    products = num_tokens * _projections(config) + pairs * 2 * _heads(config)
    return config.num_hidden_layers * products


@body_products.register
def _(config: CompressiveTransformerConfig, num_tokens, queue_filled=None):
    # The long-term memory is the compressed one. A training step costs its auxiliary loss besides.
    length = config.window_length
    windows, rest = divmod(num_tokens, length)
    pairs = num_tokens * _compressive_slots(config, queue_filled)
    pairs += windows * _pairs_within(length, length) + _pairs_within(rest, length)
    products = num_tokens * _projections(config) + pairs * 2 * _heads(config)
    products += windows * _compressive_closing(config, queue_filled)
    return config.num_hidden_layers * products


@body_products.register
def _(config: BlockRecurrentConfig, num_tokens, queue_filled=None):
    heads, hidden, length = _heads(config), config.hidden_size, config.window_length
    vectors = config.num_state_vectors
    per_token = _projections(config) + 2 * heads * length
    towards_state = 2 * hidden * heads + 2 * vectors * heads  # Q, the wider output; attention
    closed, rest = divmod(num_tokens, length)
    opened = closed + (rest > 0)
    state = opened * vectors * 2 * hidden * heads  # K and V
    seen = vectors + length * (2 if config.state_reads_previous_window else 1)
    state += closed * vectors * (2 * hidden * heads + seen * 2 * heads + _update(config))
    recurrent = len(config.recurrent_layers) * (num_tokens * towards_state + state)
    return config.num_hidden_layers * num_tokens * per_token + recurrent


def _update(config):
    # Of one state vector, from what attention found to the next state, gates included.
    hidden, found, width = config.hidden_size, 2 * _heads(config), config.intermediate_size
    gates = {"fixed": 0, "full": 1, "lstm": 2}[config.gate]
    projection = found * hidden * (1 + gates)
    network = width * hidden * (1 + gates)  # behind its first matrix
    return {
        "skip": projection,
        "single": found * width + network,
        "dual": projection + hidden * width + network,
    }[config.gate_configuration]


@body_products.register
def _(config: ElasticMemoryConfig, num_tokens, queue_filled=None):
    # Banks are left out: they are made once for all layers and documents.
    length, order, heads = config.window_length, config.memory_order, _heads(config)
    samples = config.num_memory_samples if queue_filled is None else queue_filled
    blocks, rest = divmod(num_tokens, length)
    begun = blocks + (rest > 0)
    local = blocks * _pairs_within(length, length) + _pairs_within(rest, length)
    sliding = num_tokens * length if config.tokens_carried else local
    recall = begun * 2 * heads * order * config.num_memory_samples
    take_in = blocks * 2 * heads * (order * order + order * length)
    with_memory = (local + num_tokens * samples) * 2 * heads + recall + take_in
    remembering = len(config.layers_with_memory)
    products = (config.num_hidden_layers - remembering) * sliding * 2 * heads
    products += config.num_hidden_layers * num_tokens * _projections(config)
    return products + remembering * with_memory


@body_products.register
def _(config: MemorizingTransformerConfig, num_tokens, queue_filled=None):
    per_token = _projections(config) + 2 * _heads(config) * config.window_length
    layers = config.num_hidden_layers * num_tokens * per_token
    entries = config.memory_length if queue_filled is None else queue_filled
    # Every entry is scored; the values are read of those that are attended to.
    read = min(entries, config.num_retrieved) if config.retrieval == "top_k" else entries
    far = num_tokens * _heads(config) * (entries + read)
    if config.placement == "in_stack":
        return layers + far
    segments, rest = divmod(num_tokens, config.segment_windows * config.window_length)
    length = config.segment_windows * config.window_length
    pairs = segments * _pairs_within(length, length) + _pairs_within(rest, length)
    return layers + far + num_tokens * _projections(config) + pairs * 2 * _heads(config)


def _pairs_within(tokens, furthest):
    # Pairs of tokens, one strictly before the other, at most `furthest` apart.
    beginning = min(tokens, furthest)
    return beginning * (beginning - 1) // 2 + (tokens - beginning) * furthest


@singledispatch
def closing_flops(config, queue_filled=None) -> int:
    """FLOPs that closing a window adds to those of the token that fills it."""
    raise TypeError(f"nothing is known of closing a window of a {type(config).__name__}")


@closing_flops.register
def _(config: MelodiConfig, queue_filled=None):
    # The summary tokens go through all layers, then what stays of the window is mixed.
    queue = config.long_memory_length if queue_filled is None else queue_filled
    length, summaries = config.window_length, config.num_summary_tokens
    tokens = _melodi_window(config, length, 0, queue)
    summaries = _melodi_window(config, length, summaries, queue) - tokens
    return 2 * (summaries + _melodi_closing(config))


def _melodi_window(config, tokens, summaries, queue):
    # All layers over `tokens` of a window and the summary tokens behind them.
    heads, short = _heads(config), config.num_short_memory_tokens
    rows = tokens + summaries
    pairs = rows * short + rows * (rows - 1) // 2  # every row sees memory and all rows before it
    layer = rows * _projections(config) + short * 2 * config.hidden_size * heads + pairs * 2 * heads
    cross = len(config.long_memory_layers) * rows * queue * 2 * heads
    return config.num_hidden_layers * layer + cross


def _melodi_closing(config):
    # What stays of a full window: the mixers, and the keys and values of what is pushed.
    rows, hidden = config.window_length + config.num_summary_tokens, config.hidden_size
    mixed = (config.num_short_memory_tokens + config.num_summary_tokens) * rows * hidden
    if not config.mix_tokens or config.num_short_memory_tokens == 0:
        mixed = 0
    pushed = config.num_long_memory_tokens
    push = pushed * rows * hidden + pushed * 2 * hidden * _heads(config)
    return config.num_hidden_layers * mixed + len(config.long_memory_layers) * push


def _compressive_slots(config, queue_filled=None):
    # That a token attends to besides those of its window.
    compressed = config.slots_carried if queue_filled is None else queue_filled
    return config.tokens_carried + compressed


def _compressive_closing(config, queue_filled):
    # One layer: the compression, and keys and values of what enters both memories.
    length, hidden = config.window_length, config.hidden_size
    recall = (length + config.slots_compressed) * 2 * hidden * _heads(config)
    if config.compression == "most_used":  # the window's queries once more, and their weights
        pairs = length * _compressive_slots(config, queue_filled) + _pairs_within(length, length)
        return recall + (length * hidden + pairs) * _heads(config)
    matrices = {"conv": 1, "dilated_conv": 1 + 3 * len(DILATIONS)}.get(config.compression, 0)
    return recall + matrices * length * hidden * hidden


def _heads(config):
    return config.num_attention_heads * config.head_dim


def _projections(config):  # of one row through one layer
    return config.hidden_size * (4 * _heads(config) + 2 * config.intermediate_size)


def weight_bytes(config, bytes_per_number) -> int:
    """Bytes of the weights that one token needs: matrices of all layers and the head."""
    side = getattr(config, "placement", None) == "side"
    layers = (config.num_hidden_layers + side) * _projections(config)
    return (layers + config.hidden_size * config.vocab_size) * bytes_per_number


@singledispatch
def held_bytes(config, bytes_per_number) -> int:
    """Bytes per row that a cache holds during generation, whatever the length of the document."""
    return config.memory_floats() * bytes_per_number


@held_bytes.register(PlainTransformerConfig)
@held_bytes.register(TransformerXLConfig)
def _(config, bytes_per_number):
    tokens = config.tokens_carried + config.window_length  # and the open window
    return config.num_hidden_layers * tokens * 2 * _heads(config) * bytes_per_number


@held_bytes.register
def _(config: BlockRecurrentConfig, bytes_per_number):
    tokens = config.tokens_carried + config.window_length  # and the open window
    windows = config.num_hidden_layers * tokens * 2 * _heads(config) * bytes_per_number
    state = config.hidden_size * max(4, bytes_per_number)  # in float32 at least
    state += 2 * _heads(config) * bytes_per_number  # its keys and values
    return windows + len(config.recurrent_layers) * config.num_state_vectors * state


@held_bytes.register
def _(config: MelodiConfig, bytes_per_number):
    short, window = config.num_short_memory_tokens, config.window_length
    layer = short * config.hidden_size + 2 * (short + window) * _heads(config)
    layer += window * config.hidden_size
    queues = len(config.long_memory_layers) * config.long_memory_length * 2 * _heads(config)
    return (config.num_hidden_layers * layer + queues) * bytes_per_number


@held_bytes.register
def _(config: ElasticMemoryConfig, bytes_per_number):
    remembering = len(config.layers_with_memory)
    slots = remembering * config.num_memory_samples
    slots += (config.num_hidden_layers - remembering) * config.tokens_carried
    slots += config.num_hidden_layers * config.window_length
    exact = max(4, bytes_per_number)  # coefficients are kept in float32
    return (
        2 * _heads(config) * (slots * bytes_per_number + remembering * config.memory_order * exact)
    )


@held_bytes.register
def _(config: MemorizingTransformerConfig, bytes_per_number):
    tokens = config.num_hidden_layers * 2 * config.window_length + config.memory_slots
    if config.placement == "side":
        tokens += config.window_length  # the open window of the side layer
    return tokens * 2 * _heads(config) * bytes_per_number


@singledispatch
def decoding_bytes(config, slot, bytes_per_number) -> int:
    """Bytes that must be read to decode one token of one row, `slot` tokens into its window."""
    return weight_bytes(config, bytes_per_number) + config.memory_floats() * bytes_per_number


@decoding_bytes.register
def _(config: PlainTransformerConfig, slot, bytes_per_number):
    seen = max(slot, config.tokens_carried)  # of a context that is long enough
    read = config.num_hidden_layers * seen * 2 * _heads(config)
    return weight_bytes(config, bytes_per_number) + read * bytes_per_number


@decoding_bytes.register
def _(config: BlockRecurrentConfig, slot, bytes_per_number):
    heads, hidden, recurrent = _heads(config), config.hidden_size, len(config.recurrent_layers)
    read = config.num_hidden_layers * config.tokens_carried * 2 * heads
    read += recurrent * config.num_state_vectors * 2 * heads  # the state's keys and values
    read += recurrent * 2 * hidden * heads  # the matrices with which tokens read them
    return weight_bytes(config, bytes_per_number) + read * bytes_per_number


@decoding_bytes.register
def _(config: MelodiConfig, slot, bytes_per_number):
    keys_values = 2 * (config.num_short_memory_tokens + slot) * _heads(config)
    queue = len(config.long_memory_layers) * config.long_memory_length * 2 * _heads(config)
    read = config.num_hidden_layers * keys_values + queue
    return weight_bytes(config, bytes_per_number) + read * bytes_per_number


@held_bytes.register
def _(config: CompressiveTransformerConfig, bytes_per_number):
    window, states = config.window_length, config.tokens_carried
    layer = (states + window) * config.hidden_size
    layer += 2 * (_compressive_slots(config) + window) * _heads(config)
    return config.num_hidden_layers * layer * bytes_per_number


@decoding_bytes.register
def _(config: CompressiveTransformerConfig, slot, bytes_per_number):
    seen = _compressive_slots(config) + slot
    read = config.num_hidden_layers * seen * 2 * _heads(config)
    return weight_bytes(config, bytes_per_number) + read * bytes_per_number


@decoding_bytes.register
def _(config: ElasticMemoryConfig, slot, bytes_per_number):
    remembering = len(config.layers_with_memory)  # of whose coefficients no token reads one
    seen = remembering * (config.num_memory_samples + slot)
    seen += (config.num_hidden_layers - remembering) * max(slot, config.tokens_carried)
    return weight_bytes(config, bytes_per_number) + seen * 2 * _heads(config) * bytes_per_number
