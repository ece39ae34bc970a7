"""Data for training and evaluation, step by step.

Files are read as rows (`rows`), converted to documents (`text`), encoded to ids (`tokens`), cached
on disk (`prepared`) and split into segments (`segments`). Unreadable records are counted
(`report`).
"""

from melodi_hf.data.prepared import Prepared, prepare_documents
from melodi_hf.data.report import Report
from melodi_hf.data.segments import Segments
from melodi_hf.data.text import Document, Source, read_documents, standard_library_documents
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
    "Prepared",
    "Report",
    "Segments",
    "Source",
    "convert_sentencepiece",
    "encode_documents",
    "load_tokenizer",
    "prepare_documents",
    "read_documents",
    "standard_library_documents",
    "train_tokenizer",
]
