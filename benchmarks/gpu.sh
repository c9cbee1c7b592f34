#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, in six minutes: peaks and times beside mlx-lm at 1,024 and at 4,096 tokens, packed
# rows, the doctor's report, and as much of the test suite as there is time left for (all of it takes some minutes by
# itself: `SECONDS_IN_ALL=420 benchmarks/gpu.sh tests`). A part that fails, or for which no time is left, costs its own
# figures alone, and what was measured is there whenever the script is ended.
#
#   benchmarks/gpu.sh [kernels] [table] [long] [packing] [kinds] [doctor] [tests]
#
# Without a part, all but `kinds` (mixtures of experts). `kernels` compiles the slowest ones before anything is measured:
# MLX compiles a kernel at its first use, some for a minute. With none compiled the first run is short of time, and the
# second one, which finds those of the first, is not. These variables change it:
#
#   OUT             folder of logs, tables and the report (benchmark-gpu)
#   SECONDS_IN_ALL  when all must have ended (360)
#   RUNS            how many times the table is made (1)
#   MODELS          folder of the random models (the benchmark's own)
#   PYTHON          an interpreter that has everything; without it a virtual environment is made
#   CUDA            MLX's build in that environment (cuda12; or cuda13)
#   TESTS, WORKERS  which tests, in how many processes (tests, 14); ONLY names a file that lists tests
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
wanted=" ${*:-kernels table long packing doctor tests} "
limit=${SECONDS_IN_ALL:-360} out=${OUT:-benchmark-gpu}
mkdir -p "$out/logs" && out=$(cd "$out" && pwd) && logs=$out/logs go=$(mktemp -d) || exit 2
trap 'rm -rf "$go" "${environment:-$go}"; kill $(jobs -p) 2>/dev/null' EXIT

if [ -z "${PYTHON:-}" ]; then
    environment=$(mktemp -d)
    python3 -m venv "$environment" || exit 2
    PYTHON=$environment/bin/python
    "$PYTHON" -m pip install --quiet "mlx[${CUDA:-cuda12}]" '.[plot,test]' || exit 2
    limit=$((limit + SECONDS)) # installing is not measuring
fi
if ! "$PYTHON" -c 'import sys, mlx.core as mx; sys.exit(mx.default_device() != mx.gpu)'; then
    echo "error: MLX computes on the CPU here, expected its CUDA build; set CUDA or PYTHON" >&2
    exit 2
fi
export PYTHONPATH=$PWD:$PWD/dev/cuda${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 FAILURES=$logs/failures.txt

say() { echo "[${SECONDS}s] $*"; }
left() { echo $((limit - SECONDS)); }
has() { [[ $wanted == *" $1 "* ]]; }
worst=0
ended() { # name, status
    say "$1: status $2"
    [ "$2" -le "$worst" ] || worst=$2
}

# Every process imports at once, and computes when it is its turn.
declare -A processes
names=()
start() { # name, script and arguments
    local name=$1
    shift
    "$PYTHON" benchmarks/turn.py "$go/$name" "$@" >"$logs/$name.log" 2>&1 &
    processes[$name]=$!
    names+=("$name")
}
turn() { # name
    local seconds=$(($(left) - 8))
    [ "$seconds" -lt 100 ] || seconds=100
    if [ "$seconds" -lt 8 ]; then
        kill "${processes[$1]}"
        say "$1: no time left"
        worst=124
        return
    fi
    echo "$seconds" >"$go/$1"
    wait "${processes[$1]}"
    ended "$1" $?
    tail -n 14 "$logs/$1.log"
}

model=(--shape llama-3.2-3b)
if [ -n "${MODELS:-}" ]; then
    model+=(--cache "$MODELS")
fi
steps() { # name, tokens, others
    start "$1" benchmarks/speed.py steps "${model[@]}" --tokens "$2" --seconds 15 --output "$logs/$1" "${@:3}"
}

if has kernels; then
    kernel() {
        timeout 120 "$PYTHON" -c "import mlx.core as mx; w = mx.quantize(mx.ones((128, 128), mx.$1)); \
mx.eval(mx.quantized_matmul(mx.ones((64, 128), mx.$1), *w, transpose=$2))"
    }
    kernel bfloat16 True & kernel bfloat16 False & kernel float32 True &
    wait
    say "kernels"
fi
# Times before tests: nothing else may compute meanwhile.
if has table; then
    for run in $(seq "${RUNS:-1}"); do
        steps "lm-$run" 1024 --steps 8 --plain-mlx
        steps "ours-$run" 1024 --steps 8 --budgets plenty 3.7 1.9 1.0 0.5 min
    done
fi
if has long; then
    steps lm-4096 4096 --steps 4 --plain-mlx
    steps ours-4096 4096 --steps 4 --budgets 1.0 0.5 1.9 3.7 plenty min
fi
has packing && start packing benchmarks/speed.py packing "${model[@]}" --blocks 28 --weights 4bit --tokens 1024 \
    --budget 3.7 --steps 20 --seconds 42
has kinds && start kinds benchmarks/speed.py kinds "${model[@]:2}" --blocks 2 --tokens 512 \
    --shapes qwen3-moe-small deepseek-small --rounds 5
has doctor && start doctor -m mlx_edgelora.doctor --report "$out/doctor.json"
for name in "${names[@]}"; do turn "$name"; done
cat "$logs"/*/[0-9]*.md 2>/dev/null

if has tests && [ "$(left)" -lt 30 ]; then
    say "tests: no time left"
    worst=124
elif has tests; then
    # In a session of its own: processes of pytest outlive one that is ended. Float32 products are of TF32 otherwise.
    # shellcheck disable=SC2086
    MLX_ENABLE_TF32=0 setsid timeout "$(left)" "$PYTHON" -m pytest -vv -n "${WORKERS:-14}" \
        --dist worksteal -m 'not slow' --tb=short -W default -p guard -p no:cacheprovider -p no:benchmark \
        --durations=20 ${TESTS:-tests} >"$logs/tests.log" 2>&1 &
    session=$!
    wait $session
    ended tests $?
    pkill -KILL -s $session
    tail -n 1 "$logs/tests.log"
    grep -a '^====' "$FAILURES" 2>/dev/null
fi
say end
exit "$worst"
