"""`pipeline("text-generation")` gives what `generate()` gives, row by row."""

import pytest
import torch
from transformers import pipeline

from .models import FEW, WINDOW, build
from .text import tiny_tokenizer

TEXTS = ["be", "What is Written", "The quick brown fox jumps over the lazy dog, and then again "]
GREEDY = {"max_new_tokens": WINDOW + 2, "do_sample": False, "return_full_text": False}


def make_pipeline(name):
    return pipeline("text-generation", build(name), tokenizer=tiny_tokenizer(), device="cpu")


@pytest.mark.parametrize("name", FEW)
def test_batch_equals_single_texts(name):
    generator = make_pipeline(name)
    batch = [out[0]["generated_text"] for out in generator(TEXTS, batch_size=3, **GREEDY)]
    assert batch == [generator(text, **GREEDY)[0]["generated_text"] for text in TEXTS]
    assert len(set(batch)) == len(TEXTS), "each continues its own text"


@pytest.mark.parametrize("name", FEW)
def test_pipeline_equals_generate(name):
    generator, tokenizer = make_pipeline(name), tiny_tokenizer()
    ids = torch.tensor([tokenizer.encode(TEXTS[-1])])
    found = generator.model.generate(ids, max_new_tokens=WINDOW + 2, do_sample=False)
    wanted = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    assert generator(TEXTS[-1], **GREEDY)[0]["generated_text"] == wanted
