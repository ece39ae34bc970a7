"""What people do on a Hub, as programs that the tests run with its address in their environment.

`python hub_user.py author RUN OUTCOME` uploads and writes down what it was told; `python
hub_user.py reader NAME...` downloads and reads, without this package.
"""

import json
import os
import sys
from pathlib import Path

import load_back
import torch
from huggingface_hub import HfApi, snapshot_download
from transformers import AutoTokenizer

PUBLISHED, PUSHED, UNWRITTEN = "reader/published", "reader/pushed", "reader/unwritten"


def author(run, outcome):
    import publish  # imports melodi_hf, which the reader cannot

    from melodi_hf import MelodiForCausalLM

    told, read_back = {}, publish.read_without_package

    def attempt(what, *arguments, token=os.environ["HF_TOKEN"], read=read_back):
        publish.read_without_package, os.environ["HF_TOKEN"] = read, token
        try:
            publish.main([run, *arguments])
            told[what] = None
        except SystemExit as stop:
            told[what] = stop.code

    model = MelodiForCausalLM.from_pretrained(run).eval()
    logits = load_back.read(model)
    at_hand = {"read": lambda folder: logits}  # where only the Hub matters
    attempt("no token", UNWRITTEN, token="")
    attempt("wrong token", UNWRITTEN, token="hf_of_nobody")
    attempt("not mine", "other/published", **at_hand)
    attempt("wrong logits", UNWRITTEN, read=lambda folder: logits + 1e-5)
    attempt("no numbers", UNWRITTEN, read=lambda folder: logits * float("nan"))
    attempt("right", PUBLISHED, "--private")
    HfApi().upload_file(path_or_fileobj=b"1", path_in_repo="old.py", repo_id=PUBLISHED)
    attempt("once more", PUBLISHED, **at_hand)
    model.push_to_hub(PUSHED)
    AutoTokenizer.from_pretrained(run).push_to_hub(PUSHED)
    attempt("private", PUSHED, "--private", **at_hand)
    Path(outcome).write_text(json.dumps(told))


def reader(*names):
    for name in names:
        load_back.main(name, f"{name.replace('/', '_')}.safetensors")
        snapshot_download(name, local_dir=name)


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in the tests: sums keep their order
    {"author": author, "reader": reader}[sys.argv[1]](*sys.argv[2:])
