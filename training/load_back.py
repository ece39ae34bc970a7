"""Load a model as somebody does who has transformers but not this package, and read with it.

    python training/load_back.py FOLDER LOGITS

writes the logits of some fixed tokens to the file LOGITS. `publish.py` runs this on what it is
about to upload.
"""

import argparse
import sys

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

WINDOWS = 3.5  # long enough to read from every memory


@torch.no_grad()
def read(model: PreTrainedModel) -> torch.Tensor:
    """The logits of two rows, read in two calls, the second with the memory of the first."""
    length, vocabulary = int(WINDOWS * model.config.window_length), model.config.vocab_size
    ids = (torch.arange(2 * length) * 7919 % vocabulary).view(2, length)
    first = model(ids[:, : length // 2], use_cache=True)
    second = model(ids[:, length // 2 :], cache=first.cache)
    return torch.cat((first.logits, second.logits), dim=1).float()


def main(folder: str, logits: str) -> None:
    """Read with the model of a folder; its logits go to the file `logits`."""
    sys.modules["melodi_hf"] = None  # type: ignore[assignment]  # importing it raises
    AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    save_file({"logits": read(model.eval())}, logits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Load a model without this package, and read.")
    parser.add_argument("folder", help="a folder that publish.py gathered, or a name on the Hub")
    parser.add_argument("logits", help="the file to write")
    try:
        main(**vars(parser.parse_args()))
    except (OSError, ValueError, SafetensorError) as error:
        sys.exit(f"load_back.py: {error}")
