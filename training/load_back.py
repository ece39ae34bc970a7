"""Load a model without this package, as a user of the Hub does, and compute logits.

    python training/load_back.py FOLDER LOGITS

writes the logits of fixed tokens to the file LOGITS. `publish.py` runs this script before an
upload.
"""

import argparse
import sys

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

WINDOWS = 3.5  # long enough to use every memory


@torch.no_grad()
def read(model: PreTrainedModel) -> torch.Tensor:
    """Compute the logits of two rows in two calls; the second uses the cache of the first."""
    length, vocabulary = int(WINDOWS * model.config.window_length), model.config.vocab_size
    ids = (torch.arange(2 * length) * 7919 % vocabulary).view(2, length)
    first = model(ids[:, : length // 2], use_cache=True)
    second = model(ids[:, length // 2 :], cache=first.cache)
    return torch.cat((first.logits, second.logits), dim=1).float()


def main(folder: str, logits: str) -> None:
    """Load the model of a folder and write its logits to the file `logits`."""
    sys.modules["melodi_hf"] = None  # type: ignore[assignment]  # makes importing it fail
    AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    save_file({"logits": read(model.eval())}, logits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Load a model without this package and compute logits."
    )
    parser.add_argument("folder", help="folder written by publish.py, or a name on the Hub")
    parser.add_argument("logits", help="file to write")
    try:
        main(**vars(parser.parse_args()))
    except (OSError, ValueError, SafetensorError) as error:
        sys.exit(f"load_back.py: {error}")
