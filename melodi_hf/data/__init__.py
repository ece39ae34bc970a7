"""Text becomes documents (`text`), then ids (`tokens`), then rows of segments (`segments`).

Each file needs only those before it, in the order just given.
"""

from melodi_hf.data.segments import Segments
from melodi_hf.data.text import Document, read_documents, standard_library_documents
from melodi_hf.data.tokens import (
    EncodedDocument,
    convert_sentencepiece,
    encode_documents,
    load_tokenizer,
    train_tokenizer,
)

__all__ = [
    "Document",
    "EncodedDocument",
    "Segments",
    "convert_sentencepiece",
    "encode_documents",
    "load_tokenizer",
    "read_documents",
    "standard_library_documents",
    "train_tokenizer",
]
