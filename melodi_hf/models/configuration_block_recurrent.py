"""Sizes of the Block-Recurrent Transformer that the MELODI paper compares itself with."""

from .configuration_decoder import DecoderConfig, require_at_least, validated

GATES = ("fixed", "lstm", "full")
GATE_CONFIGURATIONS = ("skip", "single", "dual")


@validated
class BlockRecurrentConfig(DecoderConfig):
    """A sliding-window Transformer-XL of which some layers carry a state. The defaults are the
    paper's best, fixed:skip, with 12 layers; with 24 its recurrent layers are (9, 19)."""

    model_type = "block_recurrent"

    recurrent_layers: tuple[int, ...] | list[int] = (9,)  # indices, from 0
    num_state_vectors: int = 512  # per recurrent layer
    gate: str = "fixed"  # or "lstm"; "full" is in the released code alone
    gate_configuration: str = "skip"  # or "single", "dual": how many gates, and around what
    # True as released: the state reads the window before the one that closes, too.
    state_reads_previous_window: bool = True

    @property
    def tokens_carried(self) -> int:
        """Tokens before a window whose keys and values a layer holds."""
        return self.window_length

    def validate_architecture(self):
        super().validate_architecture()
        require_at_least(self, 1, ("num_state_vectors",))
        for name, known in (("gate", GATES), ("gate_configuration", GATE_CONFIGURATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: it must be one of {', '.join(known)}"
                )
        layers = list(self.recurrent_layers)
        beyond = [i for i in layers if not 0 <= i < self.num_hidden_layers]
        if beyond:
            raise ValueError(
                f"recurrent_layers {beyond} do not exist: the model has {self.num_hidden_layers} "
                f"layers, 0 to {self.num_hidden_layers - 1}; name some of these, or () for none"
            )
        if len(set(layers)) < len(layers):
            raise ValueError(f"recurrent_layers {layers} names a layer twice: name each once")

    def memory_floats(self) -> int:
        """Floats per row: keys and values of one window in every layer, and the states, 2·N·W·d +
        n·d for each recurrent layer. With the defaults these are 13.1M, which arXiv 2410.03156v1
        prints, the state and twelve windows.

        The poster of that paper prints 12.1M, the state and eleven windows: presumably without keys
        and values of the recurrent layer, which the released code holds and reads.
        """
        per_token = 2 * self.num_attention_heads * self.head_dim
        windows = self.num_hidden_layers * self.tokens_carried * per_token
        return windows + len(self.recurrent_layers) * self.num_state_vectors * self.hidden_size
