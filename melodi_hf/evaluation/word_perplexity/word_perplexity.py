"""Perplexity per word of a corpus, as a metric of Hugging Face's `evaluate`.

    metric = evaluate.load(melodi_hf.evaluation.WORD_PERPLEXITY)  # the folder of this file
    metric.add_batch(nll=[5210.3, 8711.9], words=[1012, 1705])  # a number for each document
    metric.compute()  # {"word_perplexity": 168.02...}

The convention of PG-19 (Rae et al., 2020): the negative log-likelihoods of all tokens of all
documents, in nats, divided by the words of all documents, pieces between whitespace
(`len(text.split())`), whatever the tokens are; then the exponential. So models of different
tokenizers can be compared. It is not the mean of the documents' perplexities.

This file stands alone: `evaluate` copies it, and our package need not be installed.
"""

import math

import datasets
import evaluate

CITATION = """
@inproceedings{rae2020compressive,
  title = {Compressive Transformers for Long-Range Sequence Modelling},
  author = {Rae, Jack W. and Potapenko, Anna and Jayakumar, Siddhant M. and Hillier, Chloe and
            Lillicrap, Timothy P.},
  booktitle = {International Conference on Learning Representations},
  year = {2020}
}"""

INPUTS = """
Args:
    nll: for each document the sum over its tokens of -ln p(token), in nats.
    words: for each document its words, `len(text.split())`.
Returns:
    word_perplexity: exp(sum of nll / sum of words).
"""


class WordPerplexity(evaluate.Metric):
    """exp(total NLL / total words)."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Perplexity per word of a corpus, by the convention of PG-19.",
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"nll": datasets.Value("float64"), "words": datasets.Value("int64")}
            ),
        )

    def _compute(self, nll, words):
        total = sum(words)
        if total < 1 or min(words) < 0:
            raise ValueError(f"the documents have {total} words together: give 1 or more")
        return {"word_perplexity": math.exp(math.fsum(nll) / total)}
