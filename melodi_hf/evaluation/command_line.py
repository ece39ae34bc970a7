"""What every command line checks before it does any work: numbers, files, packages, the device.

The functions that take a `text` are types for `argparse`, which names the option in its error.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HTTPError
from transformers.utils import is_torch_xla_available

# What a wrong input, a missing package or an unreachable Hub raises.
FAILURES = (OSError, ValueError, ImportError, HTTPError, argparse.ArgumentTypeError)
NO_GPU = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that name none
MAX_SEED = 2**32 - 1  # NumPy's


def one_line(error: BaseException) -> str:
    """Write an error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


# Numbers


def whole_number(text: str, lowest: int, highest: float = math.inf) -> int:
    """Read an int between two bounds, both included."""
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not lowest <= value <= highest:
        allowed = f"{lowest} or more" if highest == math.inf else f"from {lowest} to {highest}"
        raise argparse.ArgumentTypeError(f"{text!r} is given: give a whole number, {allowed}")
    return value


def positive_int(text: str) -> int:
    """Read an int of 1 or more."""
    return whole_number(text, 1)


def non_negative_int(text: str) -> int:
    """Read an int of 0 or more."""
    return whole_number(text, 0)


def seed_number(text: str) -> int:
    """Read a seed that Python, NumPy and torch accept."""
    return whole_number(text, 0, MAX_SEED)


def positive_float(text: str, highest: float = math.inf) -> float:
    """Read a finite float greater than 0 and no greater than `highest`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value <= highest and value < math.inf):
        allowed = "greater than 0" + (f", at most {highest:g}" if highest < math.inf else "")
        raise argparse.ArgumentTypeError(f"{text!r} is given: give a number {allowed}")
    return value


def probability(text: str) -> float:
    """Read a float greater than 0 and at most 1."""
    return positive_float(text, 1.0)


# Files


def output_file(text: str) -> Path:
    """Check that a file can be written: its folder exists or can be made, and takes a new file."""
    path = Path(text)
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise argparse.ArgumentTypeError(f"{path} is {kind}: name a file")
    return _writable(path, path.parent, "name another file")


def output_folder(text: str) -> Path:
    """Check that files can be written to a folder, which exists or can be made."""
    path = Path(text)
    return _writable(path, path, "choose another folder by --output DIR")


def _writable(path: Path, folder: Path, remedy: str) -> Path:
    """Try it in the nearest folder that exists; nothing is left behind."""
    try:
        nearest = next(each for each in (folder, *folder.parents) if each.exists())
        tempfile.NamedTemporaryFile(dir=nearest, prefix=path.name).close()
    except OSError as error:
        message = f"{path} cannot be written to ({error.strerror}): {remedy}"
        raise argparse.ArgumentTypeError(message) from error
    return path


def read_text(path: str | Path) -> str:
    """Read a file of UTF-8 text; errors name the file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from error


def read_json(path: str | Path) -> Any:
    """Read a file of JSON; errors name the file."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): name a file of JSON") from error


def read_object(path: str | Path, *keys: str) -> dict[str, Any]:
    """Read a JSON object that must have some keys; errors name the file and what it lacks."""
    found = read_json(path)
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    if missing:
        raise ValueError(
            f"{path} holds no {', '.join(missing)}: name a file of results that training/train.py, "
            "training/evaluate.py or a benchmark wrote"
        )
    return found


# Packages and the device


def require_packages(extra: str, *names: str) -> None:
    """Raise ImportError for packages that are not installed, with the extra that installs them."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{', '.join(missing)} not installed: run pip install -e '.[{extra}]' in the clone"
        )


def device_name(text: str) -> str:
    """Check that torch knows a device and that this machine has it."""
    try:
        kind = torch.device(text).type
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is given: give cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text!r} is given, but torch finds no GPU: give cpu")
    return text


def choose_device() -> torch.device:
    """Choose the GPU if there is one, else the CPU.

    Raises ValueError if GPUs are asked for, as accelerate does by `gpu_ids`, and there is none.
    """
    asked = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    available = torch.accelerator.is_available() or is_torch_xla_available()
    if asked not in NO_GPU and not available:
        raise ValueError(
            f"GPU {asked} is asked for (by CUDA_VISIBLE_DEVICES, or by gpu_ids in a file for "
            "accelerate launch), but torch finds none: to use the CPU, unset the variable and take "
            "no configuration/accelerate/gpu_*.yaml; to use a GPU, install its driver and a torch "
            "for CUDA"
        )
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def print_device(
    device: torch.device | str, dtype: torch.dtype | str, threads: int | None = None
) -> None:
    """Print to the standard error where the work is done, such as
    "device: cpu (AMD EPYC, 2 threads), float32"."""
    if os.environ.get("RANK", "0") != "0":  # of several processes one is enough
        return
    kind = torch.device(device).type
    if kind == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, {torch.cuda.device_count()} visible"
    elif kind == "cpu":
        name = f"{processor()}, {threads or torch.get_num_threads()} threads"
    else:
        name = kind
    sys.stderr.write(f"device: {kind} ({name}), {str(dtype).removeprefix('torch.')}\n")


def processor() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
