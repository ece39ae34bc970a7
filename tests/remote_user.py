"""What a user who has transformers but not this package does with a saved model.

Run as a program by the tests: `python remote_user.py FOLDER NEW_FOLDER IDS` leaves what came of it
in NEW_FOLDER/seen.json, and copies of the model beside it.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom."
NEW_TOKENS = 20
SMOOTHING = 0.1
TRUST = {"trust_remote_code": True}


def generate(model, ids):
    return model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()


def refusal(auto_class, folder):
    """What is told to a user who does not trust the code."""
    try:
        auto_class.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        return str(error)
    return None


def write(generator):
    """What a pipeline writes behind a text."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_full_text": False}
    return generator(TEXT, **options)[0]["generated_text"]


def smoothed_loss(model, ids, folder):
    """The loss of the Trainer with label smoothing."""
    arguments = TrainingArguments(
        output_dir=folder, label_smoothing_factor=SMOOTHING, report_to="none", use_cpu=True
    )
    inputs = {"input_ids": ids, "labels": ids}
    return Trainer(model.eval(), arguments).compute_loss(model, inputs).item()


def copies(model, headless, tokenizer, folder):
    """Save again whatever may be saved, and load that."""
    for name, saved in {"whole": model, "headless": headless, "inner": model.model}.items():
        saved.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(folder / name)
        AutoModel.from_pretrained(folder / name, **TRUST)
        yield name, AutoModelForCausalLM.from_pretrained(folder / name, **TRUST)


@torch.no_grad()
def main(folder, new_folder, ids):
    new_folder, ids = Path(new_folder), torch.tensor(json.loads(ids))
    refused = {
        auto_class.__name__: refusal(auto_class, folder)
        for auto_class in (AutoConfig, AutoModel, AutoModelForCausalLM)
    }
    tokenizers = [AutoTokenizer.from_pretrained(folder, **how) for how in ({}, TRUST)]
    config = AutoConfig.from_pretrained(folder, **TRUST)
    headless = AutoModel.from_pretrained(folder, **TRUST)
    model = AutoModelForCausalLM.from_pretrained(folder, **TRUST)
    again = dict(copies(model, headless, tokenizers[0], new_folder))
    seen = {
        "refused": refused,
        "encoded": [tokenizer(TEXT).input_ids for tokenizer in tokenizers],
        "config": [config.model_type, config.memory_floats(), config.logit_scale],
        "classes": [type(each).__name__ for each in (config, headless, model)],
        "hidden": headless(ids).last_hidden_state.tolist(),
        "logits": model(ids).logits.tolist(),
        "generated": generate(model, ids),
        "written": write(pipeline("text-generation", model=folder, **TRUST)),
        "smoothed_loss": smoothed_loss(model, ids, new_folder),
        "again": {name: generate(copy, ids) for name, copy in again.items()},
        "code_of_copies": {name: type(copy).__module__ for name, copy in again.items()},
    }
    (new_folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    sys.modules["melodi_hf"] = None  # importing it raises
    torch.set_num_threads(1)  # as in the tests: sums keep their order
    arguments = sys.argv[1:]
    while arguments:
        main(*arguments[:3])
        arguments = arguments[3:]
