"""Logits become numbers, numbers become tables: read these files in this order.

perplexity     whole documents through the memory, scored with it, with parts of it, and without
intervals      how sure a perplexity is, and a difference
variants       runs of several variants and seeds, compared
continuation   documents of any length, continued from what the memory holds
tables, plots  results as Markdown and as pictures
systems        what the systems are, side by side: one page
comparison     all systems on the same tokens: the tables of their runs
cards          the model card of a run
command_line   options, files, packages and the device, checked before any work
loading        models from folders and from the Hub

word_perplexity is a metric for Hugging Face's `evaluate`, in a folder that needs nothing of ours:
`evaluate.load(melodi_hf.evaluation.WORD_PERPLEXITY)`.
"""

from pathlib import Path

from melodi_hf.evaluation.continuation import continue_text, read_and_continue
from melodi_hf.evaluation.perplexity import evaluate_perplexity

WORD_PERPLEXITY = str(Path(__file__).with_name("word_perplexity"))  # for evaluate.load

__all__ = ["WORD_PERPLEXITY", "continue_text", "evaluate_perplexity", "read_and_continue"]
