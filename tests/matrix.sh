#!/usr/bin/env bash
# Run the test suite on several versions of transformers and torch, each in a new environment.
#   bash tests/matrix.sh                       the supported versions
#   bash tests/matrix.sh newest                the newest releases, without constraints
#   bash tests/matrix.sh "5.17.0 2.9.1 0.17.0" -- -k generation    transformers, torch, torchao; pytest options
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

supported=("5.17.0 2.9.1 0.17.0" "5.23.0 2.13.0 0.18.0" "5.24.0 2.13.0 0.18.0")

rows=()
while [[ $# -gt 0 && $1 != -- ]]; do
    rows+=("$1")
    shift
done
[[ $# -gt 0 ]] && shift
[[ ${#rows[@]} -gt 0 ]] || rows=("${supported[@]}")

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# The pinned versions, except packages that depend on transformers and torch.
grep -vE '^(torch|torchao|transformers|huggingface-hub|hf-xet|peft|trl)==' constraints.txt >"$scratch/constraints.txt"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

status=0
for row in "${rows[@]}"; do
    environment=$scratch/${row// /_}
    "${PYTHON:-python3}" -m venv "$environment"
    echo "== $row"
    if [[ $row == newest ]]; then
        "$environment/bin/pip" install -q --upgrade -e ".[dev]"
        # The expected warning about an untested version.
        options=(-W "default:melodi_hf was tested with transformers up to:UserWarning")
    else
        read -r transformers torch torchao <<<"$row"
        "$environment/bin/pip" install -q -c "$scratch/constraints.txt" -e ".[dev]" \
            transformers=="$transformers" torch=="$torch" torchao=="$torchao"
        options=()
    fi
    "$environment/bin/python" -m pytest -q --no-header "${options[@]}" "$@" || status=1
    rm -rf "$environment"
done
exit "$status"
