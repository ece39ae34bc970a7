"""Upload a trained model to the Hub, after checking that it loads without this package.

    python training/publish.py runs/quickstart USER/melodi-quickstart --dry-run

Weights, code, tokenizer and card are collected in a new folder. A process that cannot import this
package loads the folder. The upload starts only if its logits equal those of the original.
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
from record import RESULTS, without_local_details
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from melodi_hf.evaluation.cards import PLOT, write_card
from melodi_hf.evaluation.command_line import FAILURES, one_line, print_device, read_object
from melodi_hf.evaluation.loading import load_matching_tokenizer, load_model

TOLERANCE = 1e-6  # absolute difference of a logit
CARD = "README.md"
REPLACED_FILES = [
    "*.py",
    "*.safetensors",
    "*.safetensors.index.json",
]  # of an earlier upload


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Upload a trained model to the Hub.")
    parser.add_argument("model", type=Path, help="output folder of training/train.py")
    parser.add_argument("repo_id", metavar="USER/NAME", help="repository on the Hub")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--dry-run", action="store_true", help="do everything except the upload")
    parser.add_argument("--tokenizer", help="default: from the model's folder")
    parser.add_argument(
        "--license", default="apache-2.0", help="licence of the weights, for the card"
    )
    return parser.parse_args(arguments)


def publish(options: argparse.Namespace) -> None:
    check_name(options.repo_id)
    check_folder(options.model)
    api = HfApi()
    if not options.dry_run:
        check_login(api)
    disable_progress_bar()  # of loading and saving only
    model = load_model(str(options.model)).cpu()
    print_device(model.device, model.dtype)
    tokenizer = load_matching_tokenizer(model, options.tokenizer or str(options.model))
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
    """Check the name before the Hub does."""
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"{repo_id} has no owner: write USER/{repo_id}")


def check_folder(folder: Path) -> None:
    """Check that the folder holds a model."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not the folder of a model, it has no config.json: "
            "pass an output folder of training/train.py"
        )


def check_login(api: HfApi) -> None:
    """Check the login before the slow part."""
    try:
        api.whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 401
        if status != 401:
            raise
        raise ValueError(
            "not logged in to the Hub: run `hf auth login`, or set HF_TOKEN to a token with write "
            "access"
        ) from error


def gather(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: argparse.Namespace,
) -> None:
    """Write the files to upload into a new folder, and no other files of the run."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    original, results = options.model, None
    if (original / RESULTS).is_file():
        results = without_local_details(read_object(original / RESULTS, "recipe", "continuation"))
        if (original / PLOT).is_file():
            shutil.copy(original / PLOT, folder)
    elif (original / CARD).is_file():
        shutil.copy(original / CARD, folder)
        return
    write_card(folder, results, repo_id=options.repo_id, license=options.license)


def read_without_package(folder: Path) -> torch.Tensor:
    """Compute the logits of the folder's model in a process without this package."""
    print("loading the folder without melodi_hf")
    with tempfile.TemporaryDirectory() as work:
        logits = Path(work) / "logits.safetensors"
        threads = str(
            torch.get_num_threads()
        )  # same number as here, so that sums have the same order
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
    """Check that the copy gives the logits of the original."""
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
    """Create the repository if needed and upload all files in one commit."""
    url = api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise ValueError(
            f"{url} exists and is public, nothing was uploaded: make it private, or leave out "
            "--private"
        )
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        delete_patterns=REPLACED_FILES,
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
