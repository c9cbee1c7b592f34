#!/usr/bin/env bash
# The open figures of CUDA, on a machine that is bare; README.md says what it needs beside it.
#   KIT=folder OUT=folder SECONDS_IN_ALL=420 dev/cuda/measure.sh [doctor] [packing] [kinds] [table] [long] [tests]
set -u
here=$(cd "$(dirname "$0")" && pwd); project=$(dirname "$(dirname "$here")"); cd "$project" || exit 2
wanted=" ${*:-doctor packing kinds table long tests} "; until=${SECONDS_IN_ALL:-420}
say() { echo "[${SECONDS}s] $*"; }
left() { echo $((until - SECONDS)); }
has() { [[ $wanted == *" $1 "* ]]; }
mkdir -p /tmp/site /tmp/logs /tmp/kernels /tmp/sources "$OUT"
tar xJf "$KIT/mlx_cuda.tar.xz" -C /tmp/site & python3 "$here/random_checkpoint.py" write "$KIT/3b.json" /tmp/models &
for wheel in "$KIT"/wheels/*.whl; do python3 -m zipfile -e "$wheel" /tmp/site; done
cat "$KIT"/kernels.* 2>/dev/null | tar xz -C /tmp/kernels 2>/dev/null
wait
ln -sfn "$(python3 -c 'import nvidia; print(list(nvidia.__path__)[0])')" /tmp/site/nvidia
info=/tmp/site/mlx_edgelora-0.1.0.dist-info # as if the package were installed
mkdir -p "$info"; printf 'Metadata-Version: 2.1\nName: mlx-edgelora\nVersion: 0.1.0\n' >"$info/METADATA"
printf '[console_scripts]\nmlx-edgelora = mlx_edgelora.__main__:main\n' >"$info/entry_points.txt"
touch /tmp/before
export PYTHONPATH=$project:/tmp/site:$here PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/tmp/cache OPENBLAS_NUM_THREADS=2
export NVRTC_CACHE=/tmp/kernels NVRTC_RECORD=/tmp/sources NVRTC_LOG=/tmp/logs/compiled.log FAILURES=/tmp/logs/failures.txt
export LD_PRELOAD=$KIT/nvrtc_cache.so MLX_PTX_CACHE_DIR=/dev/null/none
say "$(find /tmp/kernels -name '*.cubin' | wc -l) kernels"

declare -A processes
start() { # name, script and arguments: waits for its turn
    python3 "$here/turn.py" "$@" >"/tmp/logs/$1.log" 2>&1 & processes[$1]=$!
}
turn() { # name, seconds
    [ -n "${processes[$1]:-}" ] || return 0
    local seconds=$(($(left) - 12)); [ "$seconds" -lt "$2" ] || seconds=$2
    if [ "$seconds" -lt 8 ]; then kill "${processes[$1]}"; say "$1: no time left"; return 0; fi
    echo "$seconds" >"/tmp/go-$1"; wait "${processes[$1]}"; say "$1: status $?"; tail -n 14 "/tmp/logs/$1.log"
    save_logs
}
save_logs() { tar cz -C /tmp/logs --exclude='*.safetensors' . >"$OUT/logs.tgz"; }
save_kernels() { # what was compiled here, and the sources of all; takes 20 s where it is much
    (cd /tmp/kernels && find . -newer /tmp/before -name '*.[ct]*' | tar cz -T - | split -b 15m - "$OUT/kernels.")
    tar cz -C /tmp/sources . >"$OUT/sources.tgz"
}
model=(--cache /tmp/models --shape llama-3.2-3b)
packing=(benchmarks/speed.py packing "${model[@]}" --blocks 28 --weights 4bit --tokens 1024
    --budget 3.7)
kinds=(benchmarks/speed.py kinds --cache /tmp/models --blocks 2 --tokens 512
    --shapes qwen3-moe-small deepseek-small)
steps() { # name, tokens, others
    start "$1" benchmarks/speed.py steps "${model[@]}" --tokens "$2" --seconds 15 --output "/tmp/logs/$1" "${@:3}"
}

# Times first: nothing else may compute meanwhile.
has doctor && start doctor -m mlx_edgelora.doctor --report "$OUT/doctor.json"
has packing && start packing "${packing[@]}" --steps 20 --seconds 42
has kinds && start kinds "${kinds[@]}" --rounds 5
if has table; then
    for run in 1 2 3; do
        steps "lm-$run" 1024 --steps 8 --plain-mlx
        steps "ours-$run" 1024 --steps 8 --budgets plenty 3.7 1.9 1.0 0.5 min
    done
fi
if has long; then
    steps lm-4096 4096 --steps 4 --plain-mlx
    steps ours-4096 4096 --steps 4 --budgets 1.0 0.5 1.9 3.7 plenty min
fi
for name in doctor packing kinds lm-1 ours-1 lm-4096 ours-4096 lm-2 ours-2 lm-3 ours-3; do turn "$name" 100; done
cat /tmp/logs/*/[0-9]*.md

if has tests; then
    for script in "$KIT"/extra-*.py; do # probes of one's own, beside the tests
        [ -f "$script" ] && timeout 150 python3 "$script" >"/tmp/logs/$(basename "$script").log" 2>&1 &
    done
    limit=$(($(left) - 30)); [ "$limit" -lt "${TEST_SECONDS:-200}" ] || limit=${TEST_SECONDS:-200}
    # In a session of its own: processes of pytest outlive one that is ended.
    # shellcheck disable=SC2086
    setsid timeout "$limit" python3 -m pytest -vv -n "${WORKERS:-14}" --dist worksteal -m 'not slow' --tb=short \
        -W default -p guard -p no:cacheprovider -p no:benchmark --durations=20 ${TESTS:-tests} >/tmp/logs/tests.log 2>&1 &
    session=$!; wait $session; pkill -KILL -s $session
    say "tests: $(tail -n 1 /tmp/logs/tests.log)"
    grep -a '^====' /tmp/logs/failures.txt >"$OUT/failed.txt"
fi
save_logs
say "$(wc -l </tmp/logs/compiled.log) kernels were compiled"
save_kernels
say end
