#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, in eleven minutes at most: the table of peaks and times, at 1024 tokens
# and at 4096, packed rows, and the test suite, each with a time limit of its own; logs and tables in a folder.
#
#   benchmarks/gpu.sh [FOLDER]        the folder is $OUT, or benchmark-gpu, if it is not named
#
# CUDA=cuda13 picks another build (`pip install mlx[cuda13]`). PYTHON names an interpreter that has
# everything installed already, and nothing is installed then. FULL=1 runs the whole benchmark
# afterwards, for an hour. It goes on where one part fails, and ends with the worst exit status.
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
part() {
    local name=$1 seconds=$2
    shift 2
    echo "+ $name, at most $seconds s: $*"
    timeout "$seconds" "$@" >"$out/$name.log" 2>&1
    local status=$?
    echo "  status $status: $(tail -n 1 "$out/$name.log")"
    [ "$status" -le "$worst" ] || worst=$status
}

# MLX compiles a kernel at its first use, some for a minute: these three at once, and then the others.
kernel() {
    part "kernel-$1" 120 "$PYTHON" -c "import mlx.core as mx; w = mx.quantize(mx.ones((128, 128), mx.$2)); \
mx.eval(mx.quantized_matmul(mx.ones((64, 128), mx.$2), *w, transpose=$3))"
}
kernel forward bfloat16 True &
kernel backward bfloat16 False &
kernel forward-float32 float32 True &
wait

steps() {
    part "$1-$2" "$3" "$PYTHON" benchmarks/speed.py steps --tokens "$2" --output "$out/steps" "${@:4}"
}

steps mlx-lm 1024 60 --steps 8 --seconds 30 --plain-mlx
steps ours 1024 120 --steps 8 --seconds 30
steps mlx-lm 4096 60 --steps 4 --seconds 30 --plain-mlx
steps ours 4096 90 --steps 4 --seconds 30 --budgets plenty 3.7 1.9 1.0
part packing 90 "$PYTHON" benchmarks/speed.py packing --shape llama-3.2-3b --blocks 28 --weights 4bit --budget 3.7 \
    --steps 20 --seconds 42
export MLX_ENABLE_TF32=0
part tests 95 "$PYTHON" -m pytest -q -n 7 -p no:cacheprovider --tb=line -W default \
    tests/layers tests/losses tests/engine tests/blocks

if [ -n "${FULL:-}" ]; then
    for shape in llama-3.2-3b qwen2.5-3b; do
        part "$shape" 1800 "$PYTHON" -m mlx_edgelora.benchmark --shape "$shape" \
            --contexts 512 1024 2048 4096 --output "$out/$shape"
    done
fi
exit "$worst"
