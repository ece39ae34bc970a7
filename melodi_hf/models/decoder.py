"""The models that all architectures share: embeddings, layers, norm; head and loss.

Memories have two forms with one content. During generation a transformers `Cache` holds them
(`cache` or, by its older name, `past_key_values`). In training, `memory` is the detached value that
the call on the previous segment returned; `reset_memory` marks rows that begin a new document.

A layer reads all windows of the call before the next layer starts, so that hooks, FSDP, gradient
checkpointing and device maps find one call per layer.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_map import AttentionMap, Columns
from .cache import fetch_memory, shared_state, store_memory
from .configuration_decoder import DecoderConfig
from .generation import CompiledSteps, MemoryGenerationMixin
from .layer import MemoryLayer
from .loss import (
    causal_lm_loss,
    is_plain_head,
    keep_columns,
    loss_without_logits,
    per_target,
    put_back,
    scored_columns,
    shift_targets,
    take,
    visible_targets,
)
from .modules import RelativePosition, RMSNorm, Temperature
from .validation import (
    CACHE_NAME,
    check_finite_weights,
    check_forget,
    check_inputs,
    check_keywords,
    check_labels,
    check_memory,
    check_no_empty_rows,
    check_not_packed,
    check_reset_memory,
    check_token_ids,
    choose_cache,
    column_mask,
    give_both_cache_names,
)
from .windows import Progress, plan_windows


class Memory(NamedTuple):
    """What the model carries from one call to the next: a NamedTuple per layer, and how far each
    row has read. A value: it is never written in place."""

    layers: tuple[Any, ...]
    progress: Progress


@give_both_cache_names
@dataclass
class DecoderOutput(BaseModelOutputWithPast):
    """transformers' output, the memory, and the auxiliary loss (a sum over tokens)."""

    memory: Memory | None = None
    aux_loss: Tensor | None = None


@give_both_cache_names
@dataclass
class CausalLMOutput(CausalLMOutputWithPast):
    """transformers' output, the memory, and the auxiliary loss (divided as the loss is)."""

    memory: Memory | None = None
    aux_loss: Tensor | None = None


class HiddenStates(nn.Module):
    """Its inputs and outputs are what transformers records as hidden states."""

    def forward(self, before, after):
        return after


class DecoderPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving."""

    config_class = DecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _is_stateful = False  # tokens can be removed (`crop`), so assisted decoding is exact
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["cache", "past_key_values", "memory"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": HiddenStates,
        "attentions": OutputRecorder(AttentionMap, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module):
        """As measured on the released code: matrices truncated normal with variance 1/fan_in,
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
            "nn.DataParallel is not supported: it separates rows from their memory; start one "
            "process for each GPU by torchrun --nproc-per-node=N, or show it one GPU by "
            "CUDA_VISIBLE_DEVICES=0"
        )

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers; weights that are not finite are refused by name, and those in a
        pickle (pytorch_model.bin) are read only if `use_safetensors=False` asks for it."""
        loaded = super().from_pretrained(*args, **{"use_safetensors": True} | kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        check_finite_weights(model.named_parameters(), args[0] if args else "the checkpoint")
        return loaded

    def post_init(self):
        """As in transformers; without the names of layers that this model does not have, which FSDP
        would refuse."""
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
            # `transformers serve` finds the code of a checkpoint under this name only.
            "AutoModelForDecision": f"modeling_{system}.{name}ForCausalLM",
        }
        return super().save_pretrained(*args, **kwargs)


class DecoderModel(DecoderPreTrainedModel):
    """Token embeddings, the layers and the final norm.

    Subclasses make their layers, and call `post_init` once all parameters are there.
    """

    plan_windows = staticmethod(plan_windows)  # a compiler of whole programs has its own loop

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([self.make_layer(config, i) for i in layers])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.hidden_states, self.attention_map = HiddenStates(), AttentionMap()
        self.gradient_checkpointing = False

    def make_layer(self, config, layer_idx) -> MemoryLayer:
        """Make one layer."""
        raise NotImplementedError

    def first_summaries(self, x, num_closing):
        """Summary tokens of the first layer, N U D, for `num_closing` windows."""
        return x.new_empty(num_closing, 0, x.shape[2])

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
        """Read a call, see `DecoderForCausalLM`; last_hidden_state is B T D."""
        check_keywords(kwargs)
        cache = choose_cache(cache, past_key_values)
        x = self.embed(input_ids, inputs_embeds)
        if cache is None and use_cache and memory is None and not return_memory:
            cache = DynamicCache(config=self.config)
        before = self._memory_before(x, cache, memory, reset_memory)
        mask = self._column_mask(attention_mask, x, cache, kwargs)
        may_write = not (return_memory or torch.is_grad_enabled())
        plan = self._plan(before.progress, x.shape[1], mask, cache, may_write)
        columns = None
        if kwargs.get("output_attentions", self.config.output_attentions):
            columns = Columns(before.progress, mask, cache, plan)
        x, loss, layers, records = self.read_layers(x, before, plan, cache, columns, kwargs)
        if mask is not None:
            x = fill_padding_with_last_hidden(x, mask, cache)
        after = Memory(layers, plan.progress)
        if cache is not None:
            store_memory(cache, after, plan, records, x, input_ids, mask)
        return DecoderOutput(
            # Dropout before the head is here, for losses made of the hidden states (TRL's).
            last_hidden_state=self.dropout(self.norm(x)),
            memory=detach(after) if return_memory else None,
            aux_loss=loss,
            **{CACHE_NAME: cache},
        )

    def _plan(self, progress, num_columns, mask, cache, may_write):
        in_place, length = cache is not None and may_write, self.config.window_length
        plan = self.plan_windows(progress, num_columns, mask, length, in_place)
        plan.rebuilds_context = cache is None
        plan.records = cache is not None and cache.layers[0].record_past
        # Here, not in a layer: reentrant checkpointing runs layers without gradients first.
        plan.trains = self.training and torch.is_grad_enabled()
        return plan

    def read_layers(self, x, before, plan, cache, columns, kwargs):
        """Read the call layer by layer.

        Args:
            x: B T D, embeddings.
            before: the memory before the call.
            columns: `Columns`, if attention maps are asked for.

        Returns:
            B T D, the auxiliary loss, the memories, and what each layer returned of each step.
        """
        plan.return_weights = columns is not None
        plan.records = plan.records or plan.return_weights
        record_hidden = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        offload = cache is not None and cache.offloading  # memories lie on the CPU
        given, x, losses, after, records = x, plan.pack(x), [], [], []
        summaries = self.first_summaries(x, plan.num_closing)
        for layer, memory in zip(self.layers, before.layers, strict=True):
            held = (tensor.to(x.device) for tensor in memory) if offload else memory
            x, summaries, loss, record, *new = layer(x, summaries, *held, plan=plan)
            losses += [] if loss is None else [loss]
            after.append(type(memory)(*(t.to("cpu") for t in new) if offload else new))
            records.append(record)
            if columns is not None:
                attention = cast(MemoryLayer, layer).self_attn
                self.attention_map(columns, record, attention.num_slots, attention.token_slots)
            if record_hidden:
                given = self.hidden_states(given, plan.unpack(x))
        return plan.unpack(x), sum(losses) if losses else None, tuple(after), records

    def embed(self, input_ids, inputs_embeds):
        """Embed ids, or check embeddings: -> B T D."""
        if input_ids is not None:
            check_token_ids(input_ids, self.config.vocab_size)
        check_inputs(input_ids, inputs_embeds, self.config.hidden_size)
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def _memory_before(self, x, cache, memory, reset_memory):
        if cache is not None and memory is not None:
            raise ValueError(
                "cache (past_key_values) and memory are both given: they hold the same thing, the "
                "cache for generation and memory for training; pass one of them "
                "(MelodiCache.from_memory and to_memory convert them)"
            )
        if cache is not None:
            before = Memory(*fetch_memory(cache, self.layers, x))
        elif memory is not None:
            check_memory(memory, self.layers, x.shape[0])
            before = memory
        else:
            before = self.empty_memory(x.shape[0], x.device, x.dtype)
        if reset_memory is None:
            return before
        check_reset_memory(reset_memory, x.shape[0])
        return reset_rows(before, reset_memory)

    def _column_mask(self, attention_mask, x, cache, kwargs):
        past = 0 if cache is None else cache.get_seq_length()
        mask = column_mask(attention_mask, x, past)
        check_not_packed(mask, **kwargs)
        if cache is not None and mask is not None and not shared_state(cache).has_last_hidden:
            check_no_empty_rows(mask)
        return mask

    # Memories.

    def _layers(self):
        return cast("list[MemoryLayer]", list(self.layers))

    def empty_memory(self, batch_size, device=None, dtype=None) -> Memory:
        """Make the memory before the first token of `batch_size` documents, for training."""
        weight = self.embed_tokens.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        empty = tuple(layer.empty_memory(batch_size, device, dtype) for layer in self._layers())
        return Memory(empty, Progress(torch.zeros(batch_size, dtype=torch.long, device=device), 0))

    @torch.no_grad()
    def to_generation(self, memory: Memory) -> Memory:
        """Convert a memory of training to the form that the layers of a cache hold."""
        rows = len(memory.progress.tokens_read) if hasattr(memory, "progress") else 0
        check_memory(memory, self.layers, rows)
        if rows == 0:
            raise ValueError("the memory has 0 rows: pass one of at least 1 row")
        pairs = zip(self._layers(), memory.layers, strict=True)
        layers = tuple(layer.to_generation(held) for layer, held in pairs)
        return copy_memory(Memory(layers, memory.progress._replace(is_mid_window=False)))

    def to_training(self, memories, progress: Progress) -> Memory:
        """Convert what the layers of a cache hold to a memory of training."""
        pairs = zip(self._layers(), memories, strict=True)
        layers = tuple(layer.to_training(held, progress.offset) for layer, held in pairs)
        return copy_memory(Memory(layers, progress._replace(is_mid_window=False)))

    @torch.no_grad()
    def metrics(self, memory: Memory) -> dict[str, Tensor]:
        """Compute numbers about a memory that a call returned, `name/layer` -> a scalar, the mean
        over rows, on its device."""
        windows_read = memory.progress.tokens_read // self.config.window_length
        return {
            f"{name}/{i}": value
            for i, (layer, held) in enumerate(zip(self._layers(), memory.layers, strict=True))
            for name, value in layer.metrics(held, windows_read).items()
        }

    def windows_kept(self) -> dict[str, float]:
        """Kind of memory, "short" and "long" -> how many windows of the past it holds, `math.inf`
        for a summary of the whole past; only the kinds that the model has."""
        kept: dict[str, float] = {}
        for layer in self._layers():
            for kind, windows in layer.windows_in_memory().items():
                kept[kind] = max(windows, kept.get(kind, 0))
        return kept

    def forget(self, memory: Memory, **windows: int) -> Memory:
        """Keep of each kind of memory what the newest so many windows left.

        `forget(memory, short=0, long=4)`; the memory must end with a window. What is dropped is
        empty, and hidden if the configuration hides empty slots.

        Raises `ValueError` for a kind that the model does not have, for any number but 0 of a
        summary of the whole past, and within a window.
        """
        check_forget(memory, windows, self.windows_kept())
        pairs = zip(self._layers(), memory.layers, strict=True)
        layers = tuple(layer.forget(held, windows) for layer, held in pairs)
        read = memory.progress.tokens_read // self.config.window_length
        forgotten = dict(memory.progress.forgotten)
        for kind, count in windows.items():
            before = forgotten.get(kind, torch.zeros_like(read))
            forgotten[kind] = torch.maximum(before, read - count)
        return Memory(layers, memory.progress._replace(forgotten=forgotten))


class DecoderForCausalLM(DecoderPreTrainedModel, MemoryGenerationMixin):
    """A language model; its head is the embedding table, scaled by `config.logit_scale`.

    Arguments of a call:
        input_ids, inputs_embeds: B T or B T D, one of them.
        attention_mask: B T or B past+T, zero at padding.
        cache, past_key_values: two names of one argument, the cache of generation; outputs give it
            under both.
        memory, return_memory: what the call before returned, and whether this one returns it.
        reset_memory: B booleans, true in rows that begin a new document.
        labels: B T, the ids themselves, shifted by the model; or shift_labels: B T, the target of
            each position. -100 is left out. (shift_labels is among `kwargs`, as in transformers:
            the Trainer takes each parameter of this name for a label that all data must have.)
        logits_to_keep: as in transformers; the loss is then that of these columns, too.
        skip_logits: where there are labels, compute the loss alone, in a fraction of the memory.

    Raises `ValueError` for ids outside the vocabulary, labels of another shape, masks that are not
    B T, packed rows, and the memory of another model or batch size; `TypeError` for unknown
    keywords.
    """

    model_class: type[DecoderModel]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()

    def init_continuous_batching(self, *args, **kwargs):
        """Refuse it before any work is done."""
        raise ValueError(
            "continuous batching (generate_batch, transformers serve --continuous-batching) keeps "
            "the keys and values of every token, which a memory does not have: call generate() on "
            "a padded batch, or serve without that option"
        )

    def get_compiled_call(self, compile_config):
        """As in transformers, for one generate(); tokens at the ends of a window run eagerly."""
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
        """Compute logits of the next token and the loss; training adds `aux_loss`."""
        cache = choose_cache(cache, past_key_values)
        shift_labels = kwargs.pop("shift_labels", None)
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        check_labels(inputs, labels, shift_labels, self.config.vocab_size)
        memories = {"memory": memory, "reset_memory": reset_memory, "return_memory": return_memory}
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **memories,
            **kwargs,
        )
        targets = shift_targets(labels, shift_labels)
        if targets is not None and cache is None:
            targets, num_items = visible_targets(targets, attention_mask, **kwargs)
            kwargs["num_items_in_batch"] = num_items
        scored = labels, targets, attention_mask, logits_to_keep
        loss, logits = self.score_columns(outputs.last_hidden_state, *scored, skip_logits, **kwargs)
        aux_loss = per_target(outputs.aux_loss, targets, **kwargs)
        if self.training and loss is not None and aux_loss is not None:
            loss = loss + aux_loss.to(loss)
        given = {"memory": outputs.memory, "aux_loss": aux_loss, CACHE_NAME: outputs.cache}
        recorded = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return CausalLMOutput(loss=loss, logits=logits, **recorded, **given)

    def score_columns(
        self, hidden, labels, targets, mask, logits_to_keep=0, skip_logits=False, **kwargs
    ):
        """As `score`, of the columns to keep; logits of padding are not made, but zero."""
        columns = None
        if isinstance(logits_to_keep, int) and logits_to_keep == 0:
            columns = scored_columns(mask, hidden, targets)
        kept, kept_targets = (keep_columns(x, logits_to_keep) for x in (hidden, targets))
        given = take(kept, columns), labels, take(kept_targets, columns)
        loss, logits = self.score(*given, skip_logits, **kwargs)
        return loss, put_back(logits, columns)

    def score(self, hidden, labels, targets, skip_logits=False, **kwargs):
        """Compute the loss, None without targets (B T), and logits, B T V or None if skipped."""
        hidden = hidden * self.config.logit_scale
        can_skip = is_plain_head(self.lm_head) and not torch.compiler.is_compiling()
        if skip_logits and targets is not None and can_skip:
            return loss_without_logits(hidden, self.lm_head.weight, targets, **kwargs), None
        logits, loss = self.lm_head(hidden), None
        if targets is not None:
            given = {"logits": logits, "labels": labels, "shift_labels": targets}
            loss = self.loss_function(**given, vocab_size=self.config.vocab_size, **kwargs)
        return loss, logits


def register_auto_classes(model, language_model):
    """Register the classes of a system with transformers.

    What is saved then carries its code along, and the Trainer's label smoothing shifts the labels,
    as it does for language models known by name.
    """
    model.config_class.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
    language_model.register_for_auto_class("AutoModelForCausalLM")
    system = model.config_class.model_type
    MODEL_MAPPING_NAMES[system] = model.__name__
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[system] = language_model.__name__


def fill_padding_with_last_hidden(x, mask, cache):
    """Give padding the hidden state of the last token before it.

    So the last column of each row predicts its next token. x: B T D; mask: B T.
    """
    columns = torch.arange(mask.shape[1], device=mask.device).masked_fill(~mask, -1)
    last = columns.cummax(dim=1).values[..., None]  # B T 1, -1 before the first token
    before = torch.zeros_like(x[:, :1]) if cache is None else shared_state(cache).output[:, -1:]
    found = x.gather(1, last.clamp(min=0).expand_as(x))
    return torch.where(last < 0, before.to(x.dtype), found)


def detach(memory):
    """Truncate backpropagation; what is carried keeps nothing else alive."""

    def cut(leaf):
        return leaf.detach().contiguous() if isinstance(leaf, Tensor) else leaf

    return tree_map(cut, memory)


def copy_memory(memory):
    """Copy a memory without its graph, into tensors of its own."""

    def copy(leaf):
        is_tensor = isinstance(leaf, Tensor)
        return leaf.detach().clone(memory_format=torch.contiguous_format) if is_tensor else leaf

    return tree_map(copy, memory)


def reset_rows(memory, rows):
    """Start new documents in the rows of a mask (B,): an empty memory is zeros."""

    def reset(tensor):
        return tensor.masked_fill(rows.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1)), 0)

    layers = tuple(type(held)(*map(reset, held)) for held in memory.layers)
    return Memory(layers, memory.progress.reset_rows(rows))


def init_truncated_(weight, std):
    """Draw from a normal distribution cut at two deviations, rescaled to the deviation `std`."""
    drawn = std / 0.87962566103423978  # the deviation of a unit normal cut at ±2
    init.trunc_normal_(weight, std=drawn, a=-2 * drawn, b=2 * drawn)
