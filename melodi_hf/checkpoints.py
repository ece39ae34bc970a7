"""Find complete checkpoints, so that a run killed at any time can resume.

A checkpoint is a folder of files from several processes, and a run may be killed between any two of
them. A manifest of all files is therefore written last, atomically, after all processes are done.
A checkpoint without a manifest, or with other files than those listed, is not used. Older
checkpoints are removed only afterwards.

    checkpoint-400/
        model.safetensors, optimizer.pt, memory_0.safetensors, memory_1.safetensors, ...
        whole.json    name, size and SHA-256 of each file; number of processes
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

MANIFEST = "whole.json"


def mark_complete(checkpoint: Path, num_processes: int) -> None:
    """Write the manifest of a checkpoint, after all its files are written."""
    listed = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        flush_to_disk(path)
        name = path.relative_to(checkpoint).as_posix()
        listed[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    unfinished = checkpoint / f"{MANIFEST}.unfinished"
    unfinished.write_text(
        json.dumps({"num_processes": num_processes, "files": listed}, indent=1) + "\n",
        encoding="utf-8",
    )
    flush_to_disk(unfinished)
    unfinished.replace(checkpoint / MANIFEST)


def last_complete_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest complete checkpoint, if any, and why newer ones are incomplete."""
    reasons: dict[Path, str] = {}
    for checkpoint in reversed(list_checkpoints(folder)):
        reason = incomplete_reason(checkpoint)
        if reason is None:
            return checkpoint, reasons
        reasons[checkpoint] = reason
    return None, reasons


def incomplete_reason(checkpoint: Path, contents: bool = True) -> str | None:
    """Return why a checkpoint is incomplete; None if it is complete.

    Args:
        contents: also compare the SHA-256 of every file.
    """
    if not (checkpoint / MANIFEST).is_file():
        return "it is incomplete (no manifest)"
    try:
        listed = read_manifest(checkpoint)["files"]
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, known in listed.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != known["bytes"]:
            return f"{name} has {size:,} bytes instead of {known['bytes']:,}"
        if contents and file_sha256(path) != known["sha256"]:
            return f"{name} has changed since it was written"
    return None


def check_num_processes(checkpoint: Path, num_processes: int) -> None:
    """Raise ValueError if the checkpoint was written by another number of processes."""
    before = read_manifest(checkpoint)["num_processes"]
    if before != num_processes:
        raise ValueError(
            f"{checkpoint} was written by {before} process(es), each with the memory of its rows; "
            f"it cannot be resumed by {num_processes}: start {before} in total, for example by "
            f"torchrun --nproc-per-node={before}, or start a new run in another folder"
        )


def remove_old_checkpoints(checkpoint: Path, limit: int | None, best: str | None = None) -> None:
    """Remove old checkpoints, except the newest `limit` up to this one, and the best one.

    Args:
        checkpoint: a complete checkpoint.
        limit: None or 0 removes none.
    """
    if not limit:
        return
    step = checkpoint_step(checkpoint)
    earlier = [path for path in list_checkpoints(checkpoint.parent) if checkpoint_step(path) < step]
    for path in earlier[: max(0, len(earlier) - (limit - 1))]:
        if best is None or path.name != Path(best).name:
            shutil.rmtree(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """List all checkpoint folders, complete or not, the oldest first."""
    named = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"\D+\d+", path.name)]
    return sorted((path for path in named if path.is_dir()), key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def flush_to_disk(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
