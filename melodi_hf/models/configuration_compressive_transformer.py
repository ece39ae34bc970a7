"""Sizes of a Compressive Transformer; those of its memories default to the paper's for PG-19."""

from .configuration_decoder import DecoderConfig, require_at_least, validated

LEARNED = ("conv", "dilated_conv")
COMPRESSIONS = ("max_pool", "mean_pool", *LEARNED, "most_used")
LOSSES = ("attention", "autoencoding", "none")
POSITIONS = ("slot", "scaled")


@validated
class CompressiveTransformerConfig(DecoderConfig):
    """Every layer carries `memory_length` tokens and, of those before them, one slot for each
    `compression_rate` tokens, `compressed_memory_length` slots in all (arXiv 1911.05507).

    A compression that is learned has a loss of its own, or with "none" learns from the loss of the
    next token through the compressed memory (the paper's inferior row "BPTT"); the others have
    nothing to learn. Trainers that make their loss of the logits alone (TRL's, or transformers'
    with label smoothing) leave a compression with a loss of its own as it is. Clipping by the norm
    of all gradients couples the two losses, though each trains parameters of its own: a large
    gradient of one makes steps on the other smaller.
    """

    model_type = "compressive_transformer"

    memory_length: int | None = None  # tokens, whole windows; None: one window
    compressed_memory_length: int | None = None  # slots; None: as many as a window has tokens
    compression_rate: int = 2  # tokens that become one slot
    compression: str = "conv"  # or max_pool, mean_pool, dilated_conv, most_used
    compression_loss: str = "attention"  # or autoencoding, none
    compressed_position: str = "slot"  # a slot counts as one token; scaled: as those it stands for
    mask_empty_memory: bool = True

    @property
    def tokens_carried(self) -> int:
        """Tokens before a window that a layer holds uncompressed."""
        return self.window_length if self.memory_length is None else self.memory_length

    @property
    def slots_carried(self) -> int:
        """Slots of the compressed memory of a layer."""
        held = self.compressed_memory_length
        return self.window_length if held is None else held

    @property
    def slots_compressed(self) -> int:
        """Slots that a window leaves in the compressed memory."""
        return self.window_length // self.compression_rate

    @property
    def learns_through_memory(self) -> bool:
        """Whether the loss of the next token is what trains the compression."""
        return self.compression in LEARNED and self.compression_loss == "none"

    def validate_architecture(self):
        super().validate_architecture()
        require_at_least(self, 1, ("compression_rate",))
        self._validate_choices()
        window, held, rate = self.window_length, self.tokens_carried, self.compression_rate
        if window % rate:
            raise ValueError(
                f"window_length is {window} and compression_rate {rate}: a window must be a whole "
                f"number of slots, so that the first is a multiple of the second"
            )
        if held < window or held % window:
            raise ValueError(
                f"memory_length is {held} and window_length {window}: the memory holds whole "
                f"windows, one or more; leave it None for one"
            )
        if self.slots_carried < self.slots_compressed:
            raise ValueError(
                f"compressed_memory_length is {self.slots_carried}, but each window "
                f"leaves window_length / compression_rate = {self.slots_compressed} slots: it must "
                f"hold at least these; for no compressed memory take a Transformer-XL"
            )

    def _validate_choices(self):
        for name, known in (
            ("compression", COMPRESSIONS),
            ("compression_loss", LOSSES),
            ("compressed_position", POSITIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: it must be one of {', '.join(known)}"
                )
        if self.compression not in LEARNED and self.compression_loss != "none":
            raise ValueError(
                f"compression is {self.compression!r} and compression_loss "
                f"{self.compression_loss!r}: it has nothing to learn; set compression_loss='none', "
                f"or one of {', '.join(LEARNED)}"
            )

    def memory_floats(self) -> int:
        """Floats per row: the hidden states of both memories, N·(n_m + n_cm)·d. The tables of
        MELODI count keys and values where memory is attended to, which would be twice as many."""
        slots = self.tokens_carried + self.slots_carried
        return self.num_hidden_layers * slots * self.hidden_size
