#!/usr/bin/env bash
# Run the TPU tests on a CPU. Creates a virtual environment with torch_xla in the given folder, if it
# does not exist (7.7 GB, some minutes).
#   bash tests/tpu/run.sh VENV [pytest options]        PYTHON=python3.12 bash tests/tpu/run.sh VENV
set -euo pipefail
if [[ $# -lt 1 ]]; then
    echo "usage: bash tests/tpu/run.sh VENV [pytest options]" >&2
    exit 2
fi
venv=$(realpath -m "$1")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ ! -e $venv/complete ]]; then
    "${PYTHON:-python3.11}" -m venv "$venv"
    # The pinned versions, except torch, which must match torch_xla.
    grep -vE '^(torch|torchao)==' constraints.txt >"$venv/constraints.txt"
    "$venv/bin/pip" install -q -c "$venv/constraints.txt" \
        torch==2.9.0 torch_xla==2.9.0 absl-py numpy pyyaml requests pytest pytest-xdist -e ".[train]"
    touch "$venv/complete"
fi

export PJRT_DEVICE=CPU HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
# Compilation takes nearly all the time, so optimise little.
export XLA_FLAGS="${XLA_FLAGS:---xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true}"
"$venv/bin/python" -m pytest -n 0 tests/tpu "$@"
