"""Checks of command-line options: numbers, files, packages, the device.

Functions with an argument `text` are types for `argparse`, which names the option in errors.
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

# Errors of invalid input, missing packages and an unreachable Hub.
FAILURES = (OSError, ValueError, ImportError, HTTPError, argparse.ArgumentTypeError)
HIDDEN_GPU_VALUES = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES without a GPU
MAX_SEED = 2**32 - 1  # NumPy's


def one_line(error: BaseException) -> str:
    """Format an error as one line."""
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
        raise argparse.ArgumentTypeError(f"got {text!r}: pass an integer, {allowed}")
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
        raise argparse.ArgumentTypeError(f"got {text!r}: pass a number {allowed}")
    return value


def probability(text: str) -> float:
    """Read a float greater than 0 and at most 1."""
    return positive_float(text, 1.0)


# Files


def output_file(text: str) -> Path:
    """Check that a file can be written, in a folder that exists or can be created."""
    path = Path(text)
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise argparse.ArgumentTypeError(f"{path} is {kind}: pass the path of a file")
    return _writable(path, path.parent, "choose another file")


def output_folder(text: str) -> Path:
    """Check that files can be written to a folder that exists or can be created."""
    path = Path(text)
    return _writable(path, path, "choose another folder by --output DIR")


def _writable(path: Path, folder: Path, remedy: str) -> Path:
    """Test by a temporary file in the nearest existing folder."""
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
        raise ValueError(f"{path} is not JSON ({error}): pass a JSON file") from error


def read_object(path: str | Path, *keys: str) -> dict[str, Any]:
    """Read a JSON object with required keys; errors name the file and the missing keys."""
    found = read_json(path)
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}: pass a file of results of training/train.py, "
            "training/evaluate.py or a benchmark"
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
    """Check that torch and this machine have a device."""
    try:
        kind = torch.device(text).type
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"got {text!r}: pass cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"got {text!r}, but torch finds no GPU: pass cpu")
    return text


def choose_device() -> torch.device:
    """Choose the GPU if there is one, else the CPU.

    Raises ValueError if a GPU is requested, as accelerate does by `gpu_ids`, and there is none.
    """
    asked = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    available = torch.accelerator.is_available() or is_torch_xla_available()
    if asked not in HIDDEN_GPU_VALUES and not available:
        raise ValueError(
            f"GPU {asked} is requested (by CUDA_VISIBLE_DEVICES, or by gpu_ids in a file for "
            "accelerate launch), but torch finds none: to use the CPU, unset the variable and use "
            "no configuration/accelerate/gpu_*.yaml; to use a GPU, install its driver and torch "
            "for CUDA"
        )
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def print_device(
    device: torch.device | str, dtype: torch.dtype | str, threads: int | None = None
) -> None:
    """Print the device to standard error: "device: cpu (AMD EPYC, 2 threads), float32"."""
    if os.environ.get("RANK", "0") != "0":  # rank 0 only
        return
    kind = torch.device(device).type
    if kind == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, {torch.cuda.device_count()} visible"
    elif kind == "cpu":
        name = f"{processor_name()}, {threads or torch.get_num_threads()} threads"
    else:
        name = kind
    sys.stderr.write(f"device: {kind} ({name}), {str(dtype).removeprefix('torch.')}\n")


def processor_name() -> str:
    """Return the name of the processor, if the system has it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
