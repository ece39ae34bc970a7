"""Logits become numbers, numbers become tables: read these files in this order.

perplexity     whole documents through the memory, scored with it, with parts of it, and without
intervals      how sure a perplexity is, and a difference
variants       runs of several variants and seeds, compared
continuation   documents of any length, continued from what the memory holds
tables, plots  results as Markdown and as pictures
systems        what the systems are, side by side: one page
comparison     all systems on the same tokens: the tables of their runs
cards          the model card of a run
loading        models from folders and from the Hub

word_perplexity is a metric for Hugging Face's `evaluate`, in a folder that needs nothing of ours.
"""

from melodi_hf.evaluation.continuation import continue_text, read_and_continue
from melodi_hf.evaluation.perplexity import evaluate_perplexity

__all__ = ["continue_text", "evaluate_perplexity", "read_and_continue"]
