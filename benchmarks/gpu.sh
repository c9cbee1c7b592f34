#!/usr/bin/env bash
# The benchmark on a machine with an NVIDIA GPU: a virtual environment with MLX's CUDA build, the
# suite, and its tables, JSON and pictures in a folder.
#
#   benchmarks/gpu.sh [FOLDER]        the folder is $OUT, or benchmark-gpu, if it is not named
#
# CUDA=cuda13 picks another build (`pip install mlx[cuda13]`). PYTHON names an interpreter that has
# everything installed already, and nothing is installed then. It goes on where one part fails, and
# ends with the worst exit status.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:-${OUT:-benchmark-gpu}}
mkdir -p "$out"
out=$(cd "$out" && pwd)

if [ -z "${PYTHON:-}" ]; then
    environment=$(mktemp -d)
    trap 'rm -rf "$environment"' EXIT
    python3 -m venv "$environment" || exit 2
    PYTHON=$environment/bin/python
    "$PYTHON" -m pip install --quiet "mlx[${CUDA:-cuda12}]" '.[plot]' || exit 2
fi

if ! "$PYTHON" -c 'import sys, mlx.core as mx; sys.exit(mx.default_device() != mx.gpu)'; then
    echo "error: MLX computes on the CPU here, expected its CUDA build; set CUDA or PYTHON" >&2
    exit 2
fi

worst=0
suite() {
    local name=$1
    shift
    echo "+ $name: $*"
    "$PYTHON" -m mlx_edgelora.benchmark "$@" --output "$out/$name" 2>"$out/$name.log"
    local status=$?
    [ "$status" -le "$worst" ] || worst=$status
}

suite embedded
suite llama-3.2-3b --shape llama-3.2-3b --contexts 512 1024 2048 4096
suite qwen2.5-3b --shape qwen2.5-3b --contexts 512 1024 2048 4096
suite float32 --shape llama-3.2-3b --blocks 4 --weights float32 --contexts 512 1024
suite ladder --shape llama-3.2-3b --ladder
exit "$worst"
