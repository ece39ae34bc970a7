"""Put a trained model on the Hub, after loading it back as its readers will.

    python training/publish.py runs/quickstart USER/melodi-quickstart --dry-run

The weights, their code, the tokenizer and the card are gathered in a new folder. A process that
cannot import this package loads it, and its logits must be those of the original: only then is
anything uploaded.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import parts.threads  # noqa: F401  # before torch

# isort: split

import load_back
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from record import RESULTS, of_record
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from melodi_hf.evaluation.cards import PLOT, write_card
from melodi_hf.evaluation.command_line import FAILURES, one_line, print_device, read_object
from melodi_hf.evaluation.loading import load_its_tokenizer, load_model

TOLERANCE = 1e-6  # of a logit
CARD = "README.md"
REPLACED = ["*.py", "*.safetensors", "*.safetensors.index.json"]  # if an earlier upload left them


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Put a trained model on the Hub.")
    parser.add_argument("model", type=Path, help="a folder that training/train.py left")
    parser.add_argument("repo_id", metavar="USER/NAME", help="its place on the Hub")
    parser.add_argument("--private", action="store_true", help="a repository that only you see")
    parser.add_argument("--dry-run", action="store_true", help="all but the upload")
    parser.add_argument("--tokenizer", help="if it is not in the model's folder")
    parser.add_argument("--license", default="apache-2.0", help="of the weights, for the card")
    return parser.parse_args(arguments)


def publish(options: argparse.Namespace) -> None:
    check_name(options.repo_id)
    check_folder(options.model)
    api = HfApi()
    if not options.dry_run:
        check_login(api)
    disable_progress_bar()  # those of loading and saving; the others stay
    model = load_model(str(options.model)).cpu()
    print_device(model.device, model.dtype)
    tokenizer = load_its_tokenizer(model, options.tokenizer or str(options.model))
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        gather(folder, model, tokenizer, options)
        for path in sorted(folder.iterdir()):
            print(f"{path.stat().st_size:>13,}  {path.name}")
        compare(load_back.read(model), read_without_package(folder))
        if options.dry_run:
            print("nothing was uploaded, as asked by --dry-run")
        else:
            upload(api, folder, options.repo_id, options.private)


def check_name(repo_id: str) -> None:
    """Refuse a name that the Hub would refuse."""
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"{repo_id} does not say whose model it is: give USER/{repo_id}")


def check_folder(folder: Path) -> None:
    """Refuse what cannot be a model, before anybody is asked who they are."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not the folder of a model, it has no config.json: "
            "name one that training/train.py left"
        )


def check_login(api: HfApi) -> None:
    """Refuse to begin what could not be uploaded in the end."""
    try:
        api.whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 401
        if status != 401:
            raise
        raise ValueError(
            "the Hub does not know who you are: log in by `hf auth login`, or set HF_TOKEN to a "
            "token that may write"
        ) from error


def gather(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: argparse.Namespace,
) -> None:
    """Write all that will be uploaded, and nothing else that lay beside the model."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    original, results = options.model, None
    if (original / RESULTS).is_file():
        results = of_record(read_object(original / RESULTS, "recipe", "continuation"))
        if (original / PLOT).is_file():
            shutil.copy(original / PLOT, folder)
    elif (original / CARD).is_file():
        shutil.copy(original / CARD, folder)
        return
    write_card(folder, results, repo_id=options.repo_id, license=options.license)


def read_without_package(folder: Path) -> torch.Tensor:
    """The logits of the folder's model in a process that cannot import this package."""
    print("loading it where melodi_hf cannot be imported")
    with tempfile.TemporaryDirectory() as work:
        logits = Path(work) / "logits.safetensors"
        threads = str(torch.get_num_threads())  # as many as here: sums keep their order
        ours = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": work, "OMP_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, load_back.__file__, str(folder), str(logits)],
            cwd=work,
            env=os.environ | ours,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:]
            raise ValueError(
                f"the folder does not load without this package, nothing was uploaded: {reason}"
            )
        return load_file(logits)["logits"]


def compare(original: torch.Tensor, loaded: torch.Tensor) -> None:
    """Refuse a copy that says something else than its original."""
    difference = (original - loaded).abs().max().item()
    rows, length, vocabulary = original.shape
    compared = f"{rows} x {length} x {vocabulary} logits"
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{compared} of the folder differ from the original's by up to {difference:.2e}, more "
            f"than {TOLERANCE:.0e}: nothing was uploaded"
        )
    print(f"{compared} compared, the largest difference is {difference:.2e}")


def upload(api: HfApi, folder: Path, repo_id: str, private: bool) -> None:
    """Make the repository if it is not there, and put everything into it at once."""
    url = api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise ValueError(
            f"{url} is there already and everybody can see it, nothing was uploaded: make it "
            "private, or leave --private out"
        )
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        delete_patterns=REPLACED,
        commit_message="Weights, code, tokenizer and card",
    )
    print(f"{url} holds the model")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        publish(options)
    except FAILURES as error:
        sys.exit(f"publish.py: {one_line(error)}")


if __name__ == "__main__":
    main()
