"""Evaluation, tables, plots and model cards.

perplexity     perplexity of whole documents with all, part or none of the memory
intervals      bootstrap intervals of perplexities and differences
variants       comparison of runs with several variants and seeds
continuation   generation after a document of any length
tables, plots  results as Markdown and as figures
systems        the page that describes all systems
comparison     tables of all systems on the same tokens
cards          model cards
command_line   checks of options, files, packages and the device
loading        models from folders and the Hub

word_perplexity is a metric for Hugging Face's `evaluate` that does not import this package:
`evaluate.load(melodi_hf.evaluation.WORD_PERPLEXITY)`.
"""

from pathlib import Path

from melodi_hf.evaluation.continuation import continue_text, read_and_continue
from melodi_hf.evaluation.perplexity import evaluate_perplexity

WORD_PERPLEXITY = str(Path(__file__).with_name("word_perplexity"))  # for evaluate.load

__all__ = ["WORD_PERPLEXITY", "continue_text", "evaluate_perplexity", "read_and_continue"]
