"""Which checkpoints of a run are whole, so that a run stopped at any moment can go on.

A checkpoint is a folder of many files from several processes, and a run may be killed between any
two of them. So the list of all its files is written last, in one piece, when every process is done:
a checkpoint without its list, or whose files are not those listed, is never gone on from. Earlier
checkpoints are removed only after that.

    checkpoint-400/
        model.safetensors, optimizer.pt, memory_0.safetensors, memory_1.safetensors, ...
        whole.json    name, size and SHA-256 of each; how many processes wrote them
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

WHOLE = "whole.json"


def mark_whole(checkpoint: Path, num_processes: int) -> None:
    """Write the list of the checkpoint's files, which must all have been written."""
    listed = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        flush(path)
        name = path.relative_to(checkpoint).as_posix()
        listed[name] = {"bytes": path.stat().st_size, "sha256": fingerprint(path)}
    unfinished = checkpoint / f"{WHOLE}.unfinished"
    unfinished.write_text(
        json.dumps({"num_processes": num_processes, "files": listed}, indent=1) + "\n",
        encoding="utf-8",
    )
    flush(unfinished)
    unfinished.replace(checkpoint / WHOLE)


def last_whole_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that is whole, if any, and what is wrong with those newer than it."""
    flaws: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints(folder)):
        flaw = find_flaw(checkpoint)
        if flaw is None:
            return checkpoint, flaws
        flaws[checkpoint] = flaw
    return None, flaws


def find_flaw(checkpoint: Path, contents: bool = True) -> str | None:
    """What keeps a checkpoint from being whole.

    contents: whether to read all its files and compare their fingerprints, too.
    """
    if not (checkpoint / WHOLE).is_file():
        return "it was not written to its end"
    try:
        listed = read_list(checkpoint)["files"]
    except (OSError, ValueError) as error:
        return f"its {WHOLE} cannot be read ({error})"
    for name, known in listed.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != known["bytes"]:
            return f"{name} has {size:,} bytes, where {known['bytes']:,} were written"
        if contents and fingerprint(path) != known["sha256"]:
            return f"{name} has changed since it was written"
    return None


def refuse_other_processes(checkpoint: Path, num_processes: int) -> None:
    """Refuse to go on with another number of processes, each of which reads rows of its own."""
    before = read_list(checkpoint)["num_processes"]
    if before != num_processes:
        raise ValueError(
            f"{checkpoint} was written by {before} process(es), each with the memory of its own "
            f"rows, and cannot be gone on from by {num_processes}: start as many, by "
            f"torchrun --nproc-per-node={before} in all, or begin a run in another folder"
        )


def remove_earlier(checkpoint: Path, limit: int | None, best: str | None = None) -> None:
    """Keep `limit` checkpoints in all up to this one, which is whole, and the best one.

    limit: None or 0 removes none.
    """
    if not limit:
        return
    step = step_of(checkpoint)
    earlier = [path for path in checkpoints(checkpoint.parent) if step_of(path) < step]
    for path in earlier[: max(0, len(earlier) - (limit - 1))]:
        if best is None or path.name != Path(best).name:
            shutil.rmtree(path)


def checkpoints(folder: Path) -> list[Path]:
    """The folders of checkpoints, whole or not, the earliest first."""
    named = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"\D+\d+", path.name)]
    return sorted((path for path in named if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def read_list(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))


def fingerprint(path: Path) -> str:
    """SHA-256, without holding the file in memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Have what was written on the disk, and not only on its way there."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
