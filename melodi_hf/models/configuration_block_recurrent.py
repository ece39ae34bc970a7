"""Configuration of the Block-Recurrent Transformer, a baseline of the MELODI paper."""

from .configuration_decoder import (
    DecoderConfig,
    require_at_least,
    require_existing_layers,
    require_one_of,
    validated,
)

CHOICES = {
    "gate": ("fixed", "lstm", "full"),
    "gate_configuration": ("skip", "single", "dual"),
}
GATE_MATRICES = {"fixed": 0, "full": 1, "lstm": 2}  # besides that of the new values


@validated
class BlockRecurrentConfig(DecoderConfig):
    """A sliding-window Transformer-XL in which some layers carry a state.

    The defaults are the best variant of the paper, fixed:skip, with 12 layers; with 24 layers its
    recurrent layers are (9, 19).
    """

    model_type = "block_recurrent"

    recurrent_layers: tuple[int, ...] | list[int] = (9,)  # indices, from 0
    num_state_vectors: int = 512  # per recurrent layer
    gate: str = "fixed"  # or "lstm", or "full", which only the released code has
    gate_configuration: str = "skip"  # or "single", "dual": number and position of the gates
    # True as released: the state attends to the last two windows; False, as in the paper: to one.
    state_reads_previous_window: bool = True

    @property
    def tokens_carried(self) -> int:
        """Number of tokens before a window whose keys and values a layer stores."""
        return self.window_length

    def validate_architecture(self):
        super().validate_architecture()
        require_at_least(self, 1, ("num_state_vectors",))
        require_one_of(self, CHOICES)
        require_existing_layers(self, "recurrent_layers", self.recurrent_layers)

    def keys_attended(self, slot, filled=None) -> int:
        states = len(self.recurrent_layers) * self.num_state_vectors
        return self.num_hidden_layers * self.window_length + states

    @property
    def state_weights(self) -> int:
        """Number of weights of attention from tokens to states: queries and output."""
        return len(self.recurrent_layers) * 2 * self.hidden_size * self.attention_size

    def body_products(self, num_tokens, filled=None) -> int:
        return super().body_products(num_tokens, filled) + num_tokens * self.state_weights

    def window_products(self, filled=None) -> tuple[int, int]:
        # Start: keys and values of the state. End: its queries, attention and update.
        windows = 2 if self.state_reads_previous_window else 1
        seen = self.num_state_vectors + windows * self.window_length
        projections = self.num_state_vectors * self.state_weights
        end = 2 * seen * self.attention_size + self._update_products()
        states = len(self.recurrent_layers) * self.num_state_vectors
        return projections, projections + states * end

    def _update_products(self):
        # Of one state vector, from the output of attention to the next state, with gates.
        hidden, found, width = self.hidden_size, 2 * self.attention_size, self.intermediate_size
        matrices = 1 + GATE_MATRICES[self.gate]
        return {
            "skip": found * hidden * matrices,
            "single": found * width + width * hidden * matrices,
            "dual": (found + width) * hidden * matrices + hidden * width,
        }[self.gate_configuration]

    def cached_states(self) -> tuple[int, int]:
        return 0, len(self.recurrent_layers) * self.num_state_vectors * self.hidden_size

    def decoding_bytes(self, slot, bytes_per_number) -> int:
        weights = self.state_weights * bytes_per_number
        return super().decoding_bytes(slot, bytes_per_number) + weights

    def memory_floats(self) -> int:
        """Count the floats per row: 2·N·W·d for the windows, and n·d for each recurrent layer.

        The defaults give 13.1M, as printed in arXiv 2410.03156v1: the state and twelve windows. The
        poster of that paper prints 12.1M, the state and eleven windows: presumably without keys and
        values of the recurrent layer, which the released code has.
        """
        windows = self.num_hidden_layers * self.tokens_carried * 2 * self.attention_size
        return windows + len(self.recurrent_layers) * self.num_state_vectors * self.hidden_size
