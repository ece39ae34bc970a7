"""A metric for Hugging Face's `evaluate`: perplexity per word of a corpus.

    metric = evaluate.load(melodi_hf.evaluation.WORD_PERPLEXITY)  # the folder of this file
    metric.add_batch(nll=[5210.3, 8711.9], words=[1012, 1705])  # one number per document
    metric.compute()  # {"word_perplexity": 168.02...}

The definition of PG-19 (Rae et al., 2020): exp of the total negative log-likelihood of all
documents (in nats) divided by their total number of words (`len(text.split())`). It does not depend
on the tokenizer. It is not the mean of the documents' perplexities.

`evaluate` copies this file, so it must not import melodi_hf.
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
    nll: for each document, the sum of -ln p(token) over its tokens, in nats.
    words: for each document, the number of words, `len(text.split())`.
Returns:
    word_perplexity: exp(sum of nll / sum of words).
"""


class WordPerplexity(evaluate.Metric):
    """exp(total NLL / total words)."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Perplexity per word of a corpus, as defined by PG-19.",
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"nll": datasets.Value("float64"), "words": datasets.Value("int64")}
            ),
        )

    def _compute(self, nll, words):
        total = sum(words)
        if total < 1 or min(words) < 0:
            raise ValueError(f"the documents have {total} words in total: pass at least 1")
        return {"word_perplexity": math.exp(math.fsum(nll) / total)}
