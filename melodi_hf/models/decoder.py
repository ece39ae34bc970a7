"""The skeleton of all systems: embed, read window by window, norm, logits, loss.

A memory architecture is a layer with one function and one value:

    layer(x, *memory, plan=plan) -> (x, *memory)        x: B T D; memory: the fields of a NamedTuple
    layer.memory_shapes()                               their shapes before the first token

and the decoder carries the memories. They have two forms with one content. During generation a
transformers `Cache` holds them (`cache` or, by its older name, `past_key_values`). In training,
`memory` is the detached value that the previous segment returned; `reset_memory` marks rows that
begin a new document.

The schedule is layer by layer: a layer reads all windows of the call before the next layer starts,
so that hooks, FSDP, checkpointing and device maps find one call per layer. `config.schedule =
"wavefront"` asks for windows to be read diagonal by diagonal instead (`wavefront`).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import Temperature
from .attention_map import AttentionMap, Columns
from .cache import fetch_memory, store_memory
from .configuration_decoder import DecoderConfig
from .generation import CompiledSteps
from .loss import (
    causal_lm_loss,
    count_visible,
    hide_blind,
    is_plain_head,
    keep_columns,
    loss_without_logits,
    per_target,
    put_back,
    scored_columns,
    shifted,
    take,
)
from .norm import RMSNorm
from .position import RelativePosition
from .ragged import make_plan
from .refusals import (
    real_columns,
    refuse_bad_labels,
    refuse_bad_reset,
    refuse_empty_rows,
    refuse_foreign_memory,
    refuse_infinite_weights,
    refuse_packed_rows,
    refuse_unforgettable,
    refuse_unknown_ids,
)
from .versions import CACHE_NAME, check_keywords, choose_cache, give_both_cache_names
from .wavefront import read_diagonally, reads_diagonally
from .windows import Progress, widened


class Memory(NamedTuple):
    """What the model carries from one call to the next: a NamedTuple per layer, and how far each
    row has read. A value: never written in place."""

    layers: tuple[NamedTuple, ...]
    progress: Progress


@give_both_cache_names
@dataclass
class DecoderOutput(BaseModelOutputWithPast):
    """transformers' output, the memory, and what the layers want to be trained on besides."""

    memory: Memory | None = None
    aux_loss: Tensor | None = None


@give_both_cache_names
@dataclass
class CausalLMOutput(CausalLMOutputWithPast):
    """transformers' output, the memory, and what the layers want to be trained on besides."""

    memory: Memory | None = None
    aux_loss: Tensor | None = None


class FeedForward(nn.Module):
    """Two matrices with an activation between."""

    def __init__(self, config):
        super().__init__()
        width, bias = config.intermediate_size, config.mlp_bias
        self.up_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.activation(self.up_proj(x)))


class DecoderLayer(GradientCheckpointingLayer):
    """One layer of a memory architecture. Checkpointing needs tensors as arguments, one by one."""

    window_axis: ClassVar[dict[str, int]] = {}  # of the fields that grow with the open window
    # Of these, the fields that have all their slots as soon as a window is open.
    filled_at_once: ClassVar[tuple[str, ...]] = ()
    # The fields that training cannot do without and generation can.
    needed_in_training: ClassVar[tuple[str, ...]] = ()
    changed_by_closing: ClassVar[tuple[str, ...]] = ()  # the fields that a new window finds changed
    kinds: ClassVar[dict[str, tuple[str, ...]]] = {}  # "short" and "long" -> their fields
    # The kinds that sum up the whole past, in which no window can be told from another.
    summaries_of_the_past: ClassVar[tuple[str, ...]] = ()
    kept_in_float32: ClassVar[tuple[str, ...]] = ()  # the fields that bfloat16 would spoil
    # Layers whose class sets `stacks` can be read side by side (`wavefront`): the classes of their
    # modules, besides those that `side_by_side` knows. A subclass may stand among them if it names
    # the methods that it has for itself, (*tensors, memory, chunk) -> the last of the tensors, new,
    # or the memory; the parameters and modules and the fields that only these look at.
    stacks: ClassVar[tuple[type, ...]]
    own_steps: ClassVar[tuple[str, ...]] = ()
    own_parts: ClassVar[tuple[str, ...]] = ()
    own_fields: ClassVar[tuple[str, ...]] = ()

    config: DecoderConfig
    memory_type: ClassVar[type]  # the NamedTuple
    attention_map: AttentionMap

    def memory_shapes(self, for_generation=False) -> dict[str, tuple[int, ...]]:
        """The shape of each field before the first token, without rows.

        For generation the open window has all its slots; in training it has those that are read.
        """
        raise NotImplementedError

    def slots_per_window(self) -> dict[str, int]:
        """Slots that a window leaves in each kind of memory, 0 if there is none of the kind. Kinds
        that are summaries of the past have no entry."""
        raise NotImplementedError

    def windows_kept(self) -> dict[str, float]:
        """How many windows back each kind of memory reaches that this layer has; a summary of the
        past reaches back to its beginning, `math.inf`."""
        per_window, shapes = self.slots_per_window(), self.memory_shapes()
        slots = {kind: max(shapes[name][-2] for name in self.kinds[kind]) for kind in per_window}
        kept: dict[str, float] = dict.fromkeys(self.summaries_of_the_past, math.inf)
        return kept | {kind: -(-slots[kind] // n) for kind, n in per_window.items() if n}

    def forget(self, memory, windows: dict[str, int]):
        """`memory` with what the newest so many windows left in each kind, and zeros before it."""
        per_window = self.slots_per_window()
        cut = {
            name: keep_newest(getattr(memory, name), count * per_window.get(kind, 0))
            for kind, count in windows.items()
            for name in self.kinds.get(kind, ())
        }
        return memory._replace(**cut)

    def position_bias(self, chunk):
        """H T J or B H T J, for the queries of a chunk."""
        raise NotImplementedError

    def read(self, chunk, bias, memory, *parts):
        """One cell: a chunk of one window through this layer -> what comes of it, the memory."""
        raise NotImplementedError

    def open(self, memory):
        """The memory before the first window of a call."""
        return memory

    def shut(self, memory, given):
        """The memory after the last window of a call, which was `given` this one."""
        return memory

    def read_chunks(self, plan, memory, *parts):
        """All cells of a call, one after the other. parts: each a list of one tensor per chunk."""
        bias, pieces = PositionBiases(self.position_bias), []
        for chunk, *part in zip(plan.chunks, *parts, strict=True):
            piece, memory = chunk.run(self.read, self.changed_by_closing, bias, memory, *part)
            pieces.append(piece)
        return pieces, memory

    def empty_memory(self, batch_size, device, dtype, for_generation=False):
        """The memory before the first token."""
        shapes = self.memory_shapes(for_generation)
        empty = self.memory_type(
            **{
                name: torch.zeros(batch_size, *shape, device=device, dtype=dtype)
                for name, shape in shapes.items()
            }
        )
        return self.in_type(empty, dtype)

    def in_type(self, memory, dtype):
        """The memory in another precision, but for what is kept in float32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)
        return type(memory)(
            **{
                name: tensor.to(wide if name in self.kept_in_float32 else dtype)
                for name, tensor in memory._asdict().items()
            }
        )

    def to_generation(self, memory):
        """Convert a memory from the form that training carries to the one that a cache holds.

        Fields that generation can do without are kept, so that `to_training` finds them.
        """
        shapes = self.memory_shapes(for_generation=True)
        held = {name: getattr(memory, name) for name in self.window_axis}
        return memory._replace(**{n: widened(t, (len(t), *shapes[n])) for n, t in held.items()})

    def to_training(self, memory, fill):
        """Convert a memory from the form that a cache holds to the one that training carries.

        fill: tokens of the open window, None if the rows differ: then all its slots are kept.
        """
        closed, whole = self.memory_shapes(), self.memory_shapes(for_generation=True)
        for name in self.needed_in_training:
            if getattr(memory, name).shape[1:] != closed[name]:
                raise ValueError(
                    f"the cache holds the long-term memory as keys and values, and training needs "
                    f"its hidden states ({name!r}), which do not follow from them: read the text "
                    f"with model(input_ids, memory=memory, return_memory=True), or into a cache "
                    f"that keeps both, MelodiCache.from_memory(model.get_decoder().empty_memory("
                    f"{len(memory[0])}), model)"
                )
        if fill is None:
            return memory
        kept = {}
        for name, axis in self.window_axis.items():
            unread = 0 if name in self.filled_at_once else self.config.window_length - fill
            size = whole[name][axis - 1] - unread if fill else closed[name][axis - 1]
            kept[name] = getattr(memory, name).narrow(axis, 0, size)
        return memory._replace(**kept)

    def figures(self, memory, windows_read) -> dict[str, Tensor]:
        """Numbers that tell how this layer uses its memory, each a mean over rows.

        memory: as training carries it; windows_read: B, closed windows of each document.
        """
        return {}


class PositionBiases:
    """Those of one layer in one call: chunks of equal patterns share one."""

    def __init__(self, make):
        self.make, self.known = make, {}

    def __call__(self, chunk):
        if chunk.pattern not in self.known:
            self.known[chunk.pattern] = self.make(chunk)
        return self.known[chunk.pattern]


class DecoderPreTrainedModel(PreTrainedModel):
    """Initialisation and the promises towards transformers."""

    config_class = DecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _is_stateful = False  # a memory takes tokens back (`crop`), so assisted decoding is exact
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["cache", "past_key_values", "memory"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module):
        """As measured on the released code: every kernel truncated normal with variance 1/fan_in,
        embeddings normal, biases zero, gains one; by default temperatures are one, too."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init_truncated_(module.weight, module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initial_embedding_std)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, RelativePosition):
            init.normal_(module.weight, std=module.num_buckets**-0.5)
        elif isinstance(module, Temperature):
            init.constant_(module.weight, self.config.initial_temperature)

    def _replicate_for_data_parallel(self):
        raise ValueError(
            "nn.DataParallel would tear rows from their memories: start one process for each GPU "
            "by torchrun --nproc-per-node=N, or show it one GPU by CUDA_VISIBLE_DEVICES=0"
        )

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers; weights that are not finite are refused by name, and those in a
        pickle (pytorch_model.bin) are read only if `use_safetensors=False` asks for it."""
        loaded = super().from_pretrained(*args, **{"use_safetensors": True} | kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        refuse_infinite_weights(model.named_parameters(), args[0] if args else "the checkpoint")
        return loaded

    def post_init(self):
        """As in transformers; FSDP refuses the names of layers that this model does not have."""
        super().post_init()
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = present.intersection(self._no_split_modules or ())

    def save_pretrained(self, *args, **kwargs):
        """As in transformers; each Auto class finds its code, whichever class is saved."""
        system, name = self.config.model_type, type(self.config).__name__.removesuffix("Config")
        self.config.auto_map = {
            "AutoConfig": f"configuration_{system}.{name}Config",
            "AutoModel": f"modeling_{system}.{name}Model",
            "AutoModelForCausalLM": f"modeling_{system}.{name}ForCausalLM",
            # No decision model: `transformers serve` finds the code of others under this name only.
            "AutoModelForDecision": f"modeling_{system}.{name}ForCausalLM",
        }
        return super().save_pretrained(*args, **kwargs)


class DecoderModel(DecoderPreTrainedModel):
    """Token embeddings, the layers and the final norm. Subclasses make their layers, and call
    `post_init` once all parameters are there: what is made later is never initialised."""

    make_plan = staticmethod(make_plan)  # a compiler of whole programs wants loops of its own

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([self.make_layer(config, i) for i in layers])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False

    def make_layer(self, config, layer_idx) -> DecoderLayer:
        raise NotImplementedError

    def empty_memory(self, batch_size, device=None, dtype=None) -> Memory:
        """The memory before the first token of `batch_size` documents, as training carries it."""
        weight = self.embed_tokens.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        layers = cast("list[DecoderLayer]", list(self.layers))
        empty = tuple(layer.empty_memory(batch_size, device, dtype) for layer in layers)
        return Memory(empty, Progress(torch.zeros(batch_size, dtype=torch.long, device=device), 0))

    @torch.no_grad()
    def to_generation(self, memory: Memory) -> Memory:
        """Convert the memory that training carries to what the layers of a cache hold."""
        rows = len(memory.progress.tokens_read) if hasattr(memory, "progress") else 0
        refuse_foreign_memory(memory, self.layers, rows)
        if rows == 0:
            raise ValueError("the memory has 0 rows: pass one of at least 1 row")
        pairs = zip(cast("list[DecoderLayer]", list(self.layers)), memory.layers, strict=True)
        layers = tuple(layer.to_generation(held) for layer, held in pairs)
        return copied(Memory(layers, memory.progress._replace(within=False)))

    def to_training(self, memories, progress: Progress) -> Memory:
        """Convert what the layers of a cache hold to the memory that training carries."""
        pairs = zip(cast("list[DecoderLayer]", list(self.layers)), memories, strict=True)
        layers = tuple(layer.to_training(held, progress.fill) for layer, held in pairs)
        return copied(Memory(layers, progress._replace(within=False)))

    @torch.no_grad()
    def figures(self, memory: Memory) -> dict[str, Tensor]:
        """What the layers tell of the memory that a call returned, under `name/layer`: numbers
        without axes, means over rows, left on their device."""
        windows_read = memory.progress.tokens_read // self.config.window_length
        told = {}
        for i, (layer, held) in enumerate(zip(self.layers, memory.layers, strict=True)):
            for name, figure in cast(DecoderLayer, layer).figures(held, windows_read).items():
                told[f"{name}/{i}"] = figure
        return told

    def windows_kept(self) -> dict[str, float]:
        """The kinds of memory that the model has, "short" and "long" -> how many windows of the
        past each holds; a short-term memory is what the last window left, and one that sums up the
        whole past holds `math.inf`."""
        kept: dict[str, float] = {}
        for layer in cast("list[DecoderLayer]", list(self.layers)):
            for kind, windows in layer.windows_kept().items():
                kept[kind] = max(windows, kept.get(kind, 0))
        return kept

    def forget(self, memory: Memory, **windows: int) -> Memory:
        """`memory`, taken between two windows, of which each kind named holds what the newest so
        many windows left: `forget(memory, short=0, long=4)`. What was taken out is empty, and
        hidden if the configuration hides empty slots.

        Raises `ValueError` for a kind that the model does not have, for any number but 0 of a
        memory that sums up the whole past, and amid a window.
        """
        layers = cast("list[DecoderLayer]", list(self.layers))
        refuse_unforgettable(memory, windows, self.windows_kept())
        cut = tuple(
            layer.forget(held, windows) for layer, held in zip(layers, memory.layers, strict=True)
        )
        read = memory.progress.tokens_read // self.config.window_length
        forgotten = dict(memory.progress.forgotten)
        for kind, count in windows.items():
            before = forgotten.get(kind, torch.zeros_like(read))
            forgotten[kind] = torch.maximum(before, read - count)
        return Memory(cut, memory.progress._replace(forgotten=forgotten))

    def streams(self, x, plan):
        """What flows from layer to layer: the tokens, and whatever a system lets ride with them."""
        return (x,)

    def auxiliary_loss(self, *riding) -> Tensor | None:
        """What is to be made small besides the loss of the next token, from what rode with the
        tokens through all layers: a sum over tokens, of which a language model takes the mean with
        that of the loss. None if there is nothing."""
        return None

    def read_by_layers(self, x, memories, plan, columns=None, offload=False):
        """x: B T D -> what flows out of the last layer, and the memories after this call.

        columns: where to lay out what tokens attend to, if that is asked for; offload: the
        memories wait on the CPU, and come to the device of x one at a time.
        """
        streams, after = self.streams(x, plan), []
        for layer, memory in zip(self.layers, memories, strict=True):
            held = (tensor.to(x.device) for tensor in memory) if offload else memory
            outputs = layer(*streams, *held, plan=plan)
            if columns is not None:
                cast(DecoderLayer, layer).attention_map(columns, plan.chunks)
            streams, new = outputs[: len(streams)], outputs[len(streams) :]
            after.append(type(memory)(*(t.to("cpu") for t in new) if offload else new))
        return streams, tuple(after)

    @merge_with_config_defaults
    @capture_outputs
    def forward(  # noqa: PLR0913 (generate() and Trainer prescribe the names)
        self,
        input_ids=None,
        attention_mask=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        memory=None,
        reset_memory=None,
        return_memory=False,
        past_key_values=None,
        **kwargs,
    ) -> DecoderOutput:
        # input_ids: B T; attention_mask: B T or B past+T, zero at padding; reset_memory: B;
        # past_key_values: another name of cache
        check_keywords(kwargs)
        cache = choose_cache(cache, past_key_values)
        x = self.embed(input_ids, inputs_embeds)
        if cache is None and use_cache and memory is None and not return_memory:
            cache = DynamicCache(config=self.config)
        before = self._memory_before(x, cache, memory, reset_memory)
        mask = real_columns(attention_mask, x, cache)
        refuse_packed_rows(mask, **kwargs)
        plan = self._plan(before.progress, x, mask, None if return_memory else cache)
        if cache is not None and mask is not None and not cache.layers[0].knows_output:
            refuse_empty_rows(mask)
        if cache is not None and cache.layers[0].record_past:
            plan.record()
        columns = None
        if kwargs.get("output_attentions", self.config.output_attentions):
            window_length = self.config.window_length
            columns = Columns(before.progress, x.shape[1], mask, cache, window_length)
            plan.keep_weights()
        offload = cache is not None and cache.offloading
        watched = offload or kwargs.get("output_hidden_states", self.config.output_hidden_states)
        if columns is None and not watched and reads_diagonally(self, plan):
            (x, *riding), layers = read_diagonally(self, x, before.layers, plan)
        else:
            (x, *riding), layers = self.read_by_layers(x, before.layers, plan, columns, offload)
        after = Memory(layers, plan.progress)
        if mask is not None:
            x = carry_forward(x, mask, cache)
        if cache is not None:
            store_memory(cache, after, plan, x, input_ids, mask)
        return DecoderOutput(
            # Dropout before the head belongs here: losses that are made from the hidden states and
            # the weights of the head, as TRL's are, would miss it in the language model.
            last_hidden_state=self.dropout(self.norm(x)),
            memory=detach(after) if return_memory else None,
            aux_loss=self.auxiliary_loss(*riding),
            **{CACHE_NAME: cache},
        )

    def _plan(self, progress, x, mask, cache):
        in_place = cache is not None and not torch.is_grad_enabled()
        window_length = self.config.window_length
        plan = self.make_plan(progress, x.shape[1], mask, window_length, in_place)
        plan.leave_out(progress.forgotten)
        return plan

    def embed(self, input_ids, inputs_embeds):
        """B T -> B T D; either the ids or their embeddings are given."""
        given = inputs_embeds if input_ids is None else input_ids
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, not both and not neither")
        if inputs_embeds is None:
            refuse_unknown_ids(input_ids, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"the input has shape {tuple(given.shape)}: input_ids are rows and columns, "
                f"inputs_embeds rows, columns and {self.config.hidden_size} channels"
            )
        if inputs_embeds.shape[0] == 0:
            raise ValueError("the batch has 0 rows: give at least 1")
        if inputs_embeds.shape[1] == 0:
            raise ValueError("the call has 0 tokens: give at least 1 per row")
        return inputs_embeds

    def _memory_before(self, x, cache, memory, reset_memory):
        if cache is not None and memory is not None:
            raise ValueError(
                "cache (past_key_values) and memory are both given: they hold the same thing, the "
                "cache for generation and memory for training; pass one of them "
                "(MelodiCache.from_memory and to_memory convert them)"
            )
        if cache is not None:
            held = fetch_memory(cache, self.layers, x)
            before = Memory(*held)
        elif memory is not None:
            refuse_foreign_memory(memory, self.layers, x.shape[0])
            before = memory
        else:
            before = self.empty_memory(x.shape[0], x.device, x.dtype)
        if reset_memory is None:
            return before
        refuse_bad_reset(reset_memory, x.shape[0])
        return restart(before, reset_memory, self.empty_memory(x.shape[0], x.device, x.dtype))


class DecoderForCausalLM(DecoderPreTrainedModel):
    """A language model; its head is the embedding table, scaled by `config.logit_scale`."""

    model_class: type[DecoderModel]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()

    def init_continuous_batching(self, *args, **kwargs):
        """Refused before any work is done."""
        raise ValueError(
            "continuous batching (generate_batch, transformers serve --continuous-batching) keeps "
            "the keys and values of every token, which a memory does not have: call generate() on "
            "a padded batch, or serve without that option"
        )

    def get_compiled_call(self, compile_config):
        """As in transformers, for one generate(); tokens that begin a window or close one are read
        eagerly."""
        return CompiledSteps(self, super().get_compiled_call(compile_config))

    @can_return_tuple
    def forward(  # noqa: PLR0913 (generate() and Trainer prescribe the names)
        self,
        input_ids=None,
        attention_mask=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        memory=None,
        reset_memory=None,
        return_memory=False,
        skip_logits=False,
        past_key_values=None,
        **kwargs,
    ) -> CausalLMOutput:
        """Logits of the next token, and the loss; training adds `aux_loss` if there is any.

        labels: B T, the ids themselves (the model shifts them); shift_labels: B T, the target of
        each position, as data whose targets cross segment borders has it; -100 is left out. The
        second is in `kwargs`, as in transformers: the Trainer takes each parameter that is called
        so for a label that all data must have.
        memory, reset_memory (B,), return_memory: see the module.
        logits_to_keep: as in transformers; the loss is then that of these columns, too.
        skip_logits: where there are labels, the loss alone, in a fraction of the memory.
        cache, past_key_values: two names of one argument, the cache of generation; outputs give it
        under both.

        Raises `ValueError` for ids outside the vocabulary, labels of another shape, masks that are
        not B T, packed rows, and the memory of another model or batch size; `TypeError` for unknown
        keywords.
        """
        cache = choose_cache(cache, past_key_values)
        shift_labels = kwargs.pop("shift_labels", None)
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        refuse_bad_labels(inputs, labels, shift_labels, self.config.vocab_size)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            memory=memory,
            reset_memory=reset_memory,
            return_memory=return_memory,
            **kwargs,
        )
        targets = shifted(labels, shift_labels)
        if targets is not None and cache is None:
            visible = hide_blind(targets, attention_mask)
            num_items = kwargs.get("num_items_in_batch")  # counted without the mask
            kwargs["num_items_in_batch"] = count_visible(num_items, targets, visible)
            targets = visible
        hidden, columns = outputs.last_hidden_state, None
        if isinstance(logits_to_keep, int) and logits_to_keep == 0:
            columns = scored_columns(attention_mask, hidden, targets)
        kept, kept_targets = (keep_columns(x, logits_to_keep) for x in (hidden, targets))
        scored = take(kept, columns), labels, take(kept_targets, columns)
        loss, logits = self.score(*scored, skip_logits, **kwargs)
        aux_loss = per_target(outputs.aux_loss, targets, **kwargs)
        if self.training and loss is not None and aux_loss is not None:
            loss = loss + aux_loss.to(loss)
        return CausalLMOutput(
            loss=loss,
            logits=None if logits is None else put_back(logits, columns),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            memory=outputs.memory,
            aux_loss=aux_loss,
            **{CACHE_NAME: outputs.cache},
        )

    def score(self, hidden, labels, targets, skip_logits=False, **kwargs):
        """hidden: B T D -> the loss, None without targets (B T), and logits, B T V; these may be
        skipped where nothing but the loss wants to see the head at work."""
        hidden = hidden * self.config.logit_scale
        can_skip = is_plain_head(self.lm_head) and not torch.compiler.is_compiling()
        if skip_logits and targets is not None and can_skip:
            return loss_without_logits(hidden, self.lm_head.weight, targets, **kwargs), None
        logits = self.lm_head(hidden)
        if targets is None:
            return None, logits
        vocab_size = self.config.vocab_size
        given = {"logits": logits, "labels": labels, "shift_labels": targets}
        return self.loss_function(**given, vocab_size=vocab_size, **kwargs), logits


def make_known(model, language_model):
    """Tell transformers the classes of a system. What is saved then carries its code along, and the
    Trainer's label smoothing shifts the labels, as it does for language models known by name."""
    model.config_class.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
    language_model.register_for_auto_class("AutoModelForCausalLM")
    system = model.config_class.model_type
    MODEL_MAPPING_NAMES[system] = model.__name__
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[system] = language_model.__name__


def carry_forward(x, mask, cache):
    """Give padding what the row's last token before it has: so the last column of a row says what
    comes next, wherever its padding lies. x: B T D; mask: B T."""
    columns = torch.arange(mask.shape[1], device=mask.device).masked_fill(~mask, -1)
    last = columns.cummax(dim=1).values[..., None]  # B T 1, -1 before the first token
    before = torch.zeros_like(x[:, :1]) if cache is None else cache.layers[0].output[:, -1:]
    found = x.gather(1, last.clamp(min=0).expand_as(x))
    return torch.where(last < 0, before.to(x.dtype), found)


def keep_newest(tensor, slots):
    """Zeros in all but the last `slots` of ... M K."""
    gone = tensor.shape[-2] - min(slots, tensor.shape[-2])
    return torch.cat((torch.zeros_like(tensor[..., :gone, :]), tensor[..., gone:, :]), dim=-2)


def detach(memory):
    """Truncated backpropagation, in one place; what is carried keeps nothing else alive."""

    def cut(leaf):
        return leaf.detach().contiguous() if isinstance(leaf, torch.Tensor) else leaf

    return tree_map(cut, memory)


def copied(memory):
    """`memory` without its graph and in tensors of its own."""

    def copy(leaf):
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().clone(memory_format=torch.contiguous_format)

    return tree_map(copy, memory)


def restart(memory, rows, empty):
    """`memory` with the `rows` of a mask (B,) as they are before the first token."""

    def choose(old, new):
        return torch.where(rows.to(old.device).view(-1, *[1] * (old.dim() - 1)), fit(new, old), old)

    def fit(new, old):  # an empty window has width 0, and so has its row in one that is not empty
        return new if new.shape == old.shape else old.new_zeros(())

    layers = tuple(
        type(held)(*(choose(old, new) for old, new in zip(held, fresh, strict=True)))
        for held, fresh in zip(memory.layers, empty.layers, strict=True)
    )
    return Memory(layers, memory.progress.restart(rows))


def init_truncated_(weight, std):
    """Normal, cut at two deviations and rescaled so that `std` is what comes out."""
    drawn = std / 0.87962566103423978  # the deviation of a unit normal cut at ±2
    init.trunc_normal_(weight, std=drawn, a=-2 * drawn, b=2 * drawn)
