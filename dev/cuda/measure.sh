#!/usr/bin/env bash
# The open figures of CUDA, on a machine that is bare; README.md says what it needs beside it. Not run on one yet.
#   KIT=folder OUT=folder dev/cuda/measure.sh [doctor] [packing] [table] [tests]
set -u
here=$(cd "$(dirname "$0")" && pwd); project=$(dirname "$(dirname "$here")"); cd "$project" || exit 2
wanted=" ${*:-doctor packing table tests} "; began=$SECONDS
say() { echo "[$((SECONDS - began))s] $*"; }
mkdir -p /tmp/site /tmp/w /tmp/kernels /tmp/sources "$OUT"
tar xJf "$KIT/mlx_cuda.tar.xz" -C /tmp/site & python3 "$here/random_checkpoint.py" write "$KIT/3b.json" /tmp/models &
for wheel in "$KIT"/wheels/*.whl; do python3 -m zipfile -e "$wheel" /tmp/site; done
wait
ln -sfn "$(python3 -c 'import nvidia; print(list(nvidia.__path__)[0])')" /tmp/site/nvidia
cat "$KIT"/kernels.* 2>/dev/null | tar xz -C /tmp/kernels 2>/dev/null
touch /tmp/before
export PYTHONPATH=$project:/tmp/site PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/tmp/cache OPENBLAS_NUM_THREADS=2
export NVRTC_CACHE=/tmp/kernels NVRTC_RECORD=/tmp/sources NVRTC_LOG=/tmp/w/compiled.log
export LD_PRELOAD=$KIT/nvrtc_cache.so MLX_PTX_CACHE_DIR=/dev/null/none
say "$(find /tmp/kernels -name '*.cubin' | wc -l) kernels"

declare -A processes
start() { # name, seconds, script and arguments: waits for its turn
    LIMIT=$2 python3 "$here/turn.py" "$1" "${@:3}" >"/tmp/w/$1.log" 2>&1 & processes[$1]=$!
}
turn() {
    touch "/tmp/go-$1"; wait "${processes[$1]}"; say "$1: status $?"; tail -n "${2:-14}" "/tmp/w/$1.log"
}
model=(--cache /tmp/models --shape llama-3.2-3b)
steps() { # name, tokens, others
    start "$1" 100 benchmarks/speed.py steps "${model[@]}" --tokens "$2" --seconds 15 --output "/tmp/w/$1" "${@:3}"
}

# Tests compile what they need, on the cores that wait; times are measured after them.
if [[ $wanted == *" tests "* ]]; then
    MLX_ENABLE_TF32=0 timeout 190 python3 -m pytest -n 12 -m 'not slow' --tb=line --session-timeout=170 -W default \
        -p no:cacheprovider -p no:benchmark tests >/tmp/w/tests.log 2>&1
    say "tests: $(tail -n 1 /tmp/w/tests.log)"; grep -E '^(FAILED|ERROR)' /tmp/w/tests.log | cut -c1-150 >"$OUT/failed.txt"
fi
[[ $wanted == *" doctor "* ]] && start doctor 300 -m mlx_edgelora.doctor --report "$OUT/doctor.json"
[[ $wanted == *" packing "* ]] && start packing 120 benchmarks/speed.py packing "${model[@]}" --blocks 28 \
    --weights 4bit --tokens 1024 --steps 12
if [[ $wanted == *" table "* ]]; then
    for run in 1 2 3; do
        steps "lm-$run" 1024 --steps 8 --plain-mlx
        steps "ours-$run" 1024 --steps 8 --budgets plenty 3.7 1.9 1.0 0.5 min
    done
    steps lm-4096 4096 --steps 4 --plain-mlx
    steps ours-4096 4096 --steps 4 --budgets plenty 3.7 1.9 1.0 0.5 min
fi
for name in doctor packing lm-1 ours-1 lm-4096 ours-4096 lm-2 ours-2 lm-3 ours-3; do
    [ -n "${processes[$name]:-}" ] && turn "$name"
done
cat /tmp/w/*/[0-9]*.md
say "$(wc -l </tmp/w/compiled.log) kernels were compiled"
(cd /tmp/kernels && find . -newer /tmp/before -type f | tar cz -T - | split -b 15m - "$OUT/kernels.")
tar cz -C /tmp/sources . >"$OUT/sources.tgz"
tar cz -C /tmp/w --exclude='*.safetensors' . >"$OUT/logs.tgz"
say end
