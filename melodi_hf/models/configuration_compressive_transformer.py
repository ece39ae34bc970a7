"""Configuration of a Compressive Transformer; memories default to the paper's for PG-19."""

from .configuration_decoder import (
    DecoderConfig,
    require,
    require_at_least,
    require_one_of,
    validated,
)

LEARNED = ("conv", "dilated_conv")
CHOICES = {
    "compression": ("max_pool", "mean_pool", *LEARNED, "most_used"),
    "compression_loss": ("attention", "autoencoding", "none"),
    "compressed_position": ("slot", "scaled"),
}
DILATIONS = (1, 2)  # of the convolutions of "dilated_conv" before the last, with kernels of 3


@validated
class CompressiveTransformerConfig(DecoderConfig):
    """A Transformer-XL that compresses old memories (arXiv 1911.05507).

    Every layer carries `memory_length` tokens and, for those before them, one slot for each
    `compression_rate` tokens, `compressed_memory_length` slots in total.

    A learned compression has an auxiliary loss, or with "none" learns from the next-token loss
    through the compressed memory (the row "BPTT" of the paper, which is worse); the others have no
    parameters. Trainers that compute their loss from the logits (TRL, or transformers with label
    smoothing) do not train a compression with an auxiliary loss. Clipping by the norm of all
    gradients couples the two losses, although they train different parameters: a large gradient of
    one reduces the steps of the other.
    """

    model_type = "compressive_transformer"

    memory_length: int | None = None  # tokens, whole windows; None: one window
    compressed_memory_length: int | None = None  # slots; None: window_length
    compression_rate: int = 2  # tokens that become one slot
    compression: str = "conv"  # or max_pool, mean_pool, dilated_conv, most_used
    compression_loss: str = "attention"  # or autoencoding, none
    compressed_position: str = "slot"  # a slot counts as one token; scaled: as compression_rate
    mask_empty_memory: bool = True

    @property
    def tokens_carried(self) -> int:
        """Number of uncompressed tokens before a window that a layer stores."""
        return self.window_length if self.memory_length is None else self.memory_length

    @property
    def slots_carried(self) -> int:
        """Number of slots of the compressed memory of a layer."""
        slots = self.compressed_memory_length
        return self.window_length if slots is None else slots

    @property
    def slots_compressed(self) -> int:
        """Number of slots that a window becomes in the compressed memory."""
        return self.window_length // self.compression_rate

    @property
    def learns_through_memory(self) -> bool:
        """Whether the next-token loss trains the compression."""
        return self.compression in LEARNED and self.compression_loss == "none"

    def validate_architecture(self):
        super().validate_architecture()
        require_at_least(self, 1, ("compression_rate",))
        require_one_of(self, CHOICES)
        learned, loss = self.compression in LEARNED, self.compression_loss
        require(
            learned or loss == "none",
            f"compression is {self.compression!r} and compression_loss {loss!r}: it has nothing "
            f"to learn; set compression_loss='none', or one of {', '.join(LEARNED)}",
        )
        window, length, rate = self.window_length, self.tokens_carried, self.compression_rate
        require(
            window % rate == 0,
            f"window_length is {window} and compression_rate {rate}: a window must be a whole "
            f"number of slots, so that the first is a multiple of the second",
        )
        require(
            length >= window and length % window == 0,
            f"memory_length is {length} and window_length {window}: the memory holds whole "
            f"windows, one or more; leave it None for one",
        )
        require(
            self.slots_carried >= self.slots_compressed,
            f"compressed_memory_length is {self.slots_carried}, but each window leaves "
            f"window_length / compression_rate = {self.slots_compressed} slots: it must hold at "
            f"least these; for no compressed memory take a Transformer-XL",
        )

    # The long-term memory is the compressed one. Costs do not include the auxiliary loss.

    def keys_attended(self, slot, filled=None) -> int:
        compressed = self.slots_carried if filled is None else filled
        return self.num_hidden_layers * (self.tokens_carried + compressed + slot)

    def window_products(self, filled=None) -> tuple[int, int]:
        # Keys and values of the states that enter both memories, and the compression.
        length, hidden = self.window_length, self.hidden_size
        recall = (length + self.slots_compressed) * 2 * hidden * self.attention_size
        taps = {"conv": 1, "dilated_conv": 1 + 3 * len(DILATIONS)}.get(self.compression, 0)
        end = self.num_hidden_layers * (recall + taps * length * hidden * hidden)
        # most_used: the queries of the window again, and their weights.
        queries = self.num_hidden_layers * length * hidden
        ranking = (queries + self.pairs_attended(length, filled)) * self.attention_size
        return 0, end + (self.compression == "most_used") * ranking

    def cached_states(self) -> tuple[int, int]:
        tokens = self.tokens_carried + self.window_length
        return self.num_hidden_layers * tokens * self.hidden_size, 0

    def memory_floats(self) -> int:
        """Count the floats per row, the hidden states of both memories: N·(n_m + n_cm)·d.

        The tables of MELODI count keys and values, which are twice as many.
        """
        slots = self.tokens_carried + self.slots_carried
        return self.num_hidden_layers * slots * self.hidden_size
