#!/usr/bin/env bash
# Measure on a GPU that is lent for minutes, on a machine without a network:
#
#     benchmarks/lease.sh prepare SOURCE        here: tokens of SOURCE and the vocabulary, into lease-data/
#     OUT=DIR benchmarks/lease.sh run [...]     there, in a copy with lease-data/; figures go to DIR
#
# SOURCE is as for prepare_datasets.py; 28 million tokens take 56 MB. Options of `gpu.py lease` may follow `run`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=python3
[ ! -x .venv/bin/python ] || python=.venv/bin/python
case "${1:-}" in
    prepare)
        mkdir -p lease-data/vocabulary
        TIKTOKEN_CACHE_DIR=${TIKTOKEN_CACHE_DIR:-lease-data/vocabulary} \
            "$python" prepare_datasets.py "$2" lease-data/datasets/local/text --tokenizer gpt2 --validation-fraction 0.03
        [ -z "${TIKTOKEN_CACHE_DIR:-}" ] || cp "$TIKTOKEN_CACHE_DIR"/* lease-data/vocabulary/
        git rev-parse HEAD >lease-data/commit
        du -sh lease-data
        ;;
    run)
        MEASURED_COMMIT=$(cat lease-data/commit) TIKTOKEN_CACHE_DIR=lease-data/vocabulary \
            "$python" benchmarks/gpu.py lease --datasets-dir lease-data/datasets --out "$OUT" "${@:2}"
        ;;
    *)
        sed -n '2,7p' "$0" >&2
        exit 2
        ;;
esac
