"""MELODI and the memory transformers it is compared with, as Hugging Face models.

Importing the package registers every model with the Auto classes of transformers.
"""

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .models.cache import MelodiCache
from .models.configuration_block_recurrent import BlockRecurrentConfig
from .models.configuration_compressive_transformer import CompressiveTransformerConfig
from .models.configuration_elastic_memory import ElasticMemoryConfig
from .models.configuration_melodi import MelodiConfig
from .models.configuration_memorizing_transformer import MemorizingTransformerConfig
from .models.configuration_plain_transformer import PlainTransformerConfig
from .models.configuration_transformer_xl import TransformerXLConfig
from .models.meliad import from_meliad
from .models.modeling_block_recurrent import BlockRecurrentForCausalLM, BlockRecurrentModel
from .models.modeling_compressive_transformer import (
    CompressiveTransformerForCausalLM,
    CompressiveTransformerModel,
)
from .models.modeling_elastic_memory import ElasticMemoryForCausalLM, ElasticMemoryModel
from .models.modeling_melodi import MelodiForCausalLM, MelodiModel
from .models.modeling_memorizing_transformer import (
    MemorizingTransformerForCausalLM,
    MemorizingTransformerModel,
)
from .models.modeling_plain_transformer import PlainTransformerForCausalLM, PlainTransformerModel
from .models.modeling_transformer_xl import TransformerXLForCausalLM, TransformerXLModel
from .models.validation import warn_if_untested

__version__ = "0.1.0"

__all__ = [
    "BlockRecurrentConfig",
    "BlockRecurrentForCausalLM",
    "BlockRecurrentModel",
    "CompressiveTransformerConfig",
    "CompressiveTransformerForCausalLM",
    "CompressiveTransformerModel",
    "ElasticMemoryConfig",
    "ElasticMemoryForCausalLM",
    "ElasticMemoryModel",
    "MelodiCache",
    "MelodiConfig",
    "MelodiForCausalLM",
    "MelodiModel",
    "MemorizingTransformerConfig",
    "MemorizingTransformerForCausalLM",
    "MemorizingTransformerModel",
    "PlainTransformerConfig",
    "PlainTransformerForCausalLM",
    "PlainTransformerModel",
    "TransformerXLConfig",
    "TransformerXLForCausalLM",
    "TransformerXLModel",
    "from_meliad",
]

warn_if_untested(transformers.__version__)

for config, model, language_model in (
    (MelodiConfig, MelodiModel, MelodiForCausalLM),
    (TransformerXLConfig, TransformerXLModel, TransformerXLForCausalLM),
    (PlainTransformerConfig, PlainTransformerModel, PlainTransformerForCausalLM),
    (BlockRecurrentConfig, BlockRecurrentModel, BlockRecurrentForCausalLM),
    (
        CompressiveTransformerConfig,
        CompressiveTransformerModel,
        CompressiveTransformerForCausalLM,
    ),
    (ElasticMemoryConfig, ElasticMemoryModel, ElasticMemoryForCausalLM),
    (
        MemorizingTransformerConfig,
        MemorizingTransformerModel,
        MemorizingTransformerForCausalLM,
    ),
):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(config, language_model, exist_ok=True)
