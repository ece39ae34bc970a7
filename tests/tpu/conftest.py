"""Collected where torch_xla is installed (see run.sh), and nowhere else."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("torch_xla") else ["test_*.py"]
