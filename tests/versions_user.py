"""What one version of transformers makes of models that another one saved.

Run as a program by the tests, and by hand: `python tests/versions_user.py save FOLDER` saves all
systems with their code; it needs the package. `python tests/versions_user.py load FOLDER` writes,
as JSON, the version of transformers and the tokens that each saved model generates, with the cache
and without it, by the code that came with the model.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

IDS = torch.arange(1, 22)[None] * 7 % 61
NEW_TOKENS = 20


def save(folder):
    from tests.models import EACH, build

    for name in EACH:
        build(name).save_pretrained(folder / name)


def generated(model, use_cache):
    torch.manual_seed(0)  # sampled, since the most likely tokens of small models repeat themselves
    how = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "use_cache": use_cache}
    return model.generate(IDS, **how)[0, IDS.shape[1] :].tolist()


def load(folder):
    sys.modules["melodi_hf"] = None  # importing it raises
    seen = {}
    for path in sorted(folder.iterdir()):
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
        seen[path.name] = {str(cached): generated(model, cached) for cached in (True, False)}
    sys.stdout.write(json.dumps({"transformers": transformers.__version__, "tokens": seen}) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"save": save, "load": load}[sys.argv[1]](Path(sys.argv[2]))
