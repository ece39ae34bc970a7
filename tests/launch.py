"""Start a script in several processes, as its users do."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")


def launch(arguments, launcher=TORCHRUN):
    """Run it to its end; what it told on stderr, if it succeeded."""
    started = subprocess.Popen(
        [sys.executable, "-m", *launcher, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        _, told = started.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        started.terminate()  # which the launcher passes on to what it started
        raise
    assert started.returncode == 0, told[-3000:]
    return told
