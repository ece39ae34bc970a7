#!/usr/bin/env bash
# Everything that concerns TPUs, on a processor: builds a virtual environment with torch_xla in the
# folder that is given (7.7 GB, some minutes; used as it is if it is there) and runs the tests.
#   bash tests/tpu/run.sh VENV [options of pytest]        PYTHON=python3.12 bash tests/tpu/run.sh VENV
set -euo pipefail
if [[ $# -lt 1 ]]; then
    echo "usage: bash tests/tpu/run.sh VENV [options of pytest]" >&2
    exit 2
fi
venv=$(realpath -m "$1")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ ! -e $venv/complete ]]; then
    "${PYTHON:-python3.11}" -m venv "$venv"
    # The versions of all results but that of torch, which has to be torch_xla's.
    grep -vE '^(torch|torchao)==' constraints.txt >"$venv/constraints.txt"
    "$venv/bin/pip" install -q -c "$venv/constraints.txt" \
        torch==2.9.0 torch_xla==2.9.0 absl-py numpy pyyaml requests pytest pytest-xdist -e ".[train]"
    touch "$venv/complete"
fi

export PJRT_DEVICE=CPU HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
# Nearly all the time goes into compiling; what is compiled here runs for a moment only.
export XLA_FLAGS="${XLA_FLAGS:---xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true}"
"$venv/bin/python" -m pytest -n 0 tests/tpu "$@"
