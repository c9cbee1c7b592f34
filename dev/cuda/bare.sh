#!/usr/bin/env bash
# benchmarks/gpu.sh on a machine that is bare; README.md says what it needs in KIT. Its parts are the arguments.
#   KIT=folder OUT=folder SECONDS_IN_ALL=420 dev/cuda/bare.sh [table] [long] [packing] [kinds] [doctor] [tests]
set -u
here=$(cd "$(dirname "$0")" && pwd); project=$(dirname "$(dirname "$here")"); cd "$project" || exit 2
mkdir -p /tmp/site /tmp/results/logs /tmp/kernels /tmp/sources "$OUT"
tar xJf "$KIT/mlx_cuda.tar.xz" -C /tmp/site & python3 "$here/random_checkpoint.py" write "$KIT/3b.json" /tmp/models &
for wheel in "$KIT"/wheels/*.whl; do python3 -m zipfile -e "$wheel" /tmp/site; done
cat "$KIT"/kernels.* 2>/dev/null | tar xz -C /tmp/kernels 2>/dev/null
wait
ln -sfn "$(python3 -c 'import nvidia; print(list(nvidia.__path__)[0])')" /tmp/site/nvidia
info=/tmp/site/mlx_edgelora-0.1.0.dist-info # as if the package were installed
mkdir -p "$info"; printf 'Metadata-Version: 2.1\nName: mlx-edgelora\nVersion: 0.1.0\n' >"$info/METADATA"
printf '[console_scripts]\nmlx-edgelora = mlx_edgelora.__main__:main\n' >"$info/entry_points.txt"
touch /tmp/before
echo "[${SECONDS}s] $(find /tmp/kernels -name '*.cubin' | wc -l) kernels"

save() { tar cz -C /tmp/results --exclude='*.safetensors' . >"$OUT/results.tgz.part" && mv "$OUT/results.tgz.part" "$OUT/results.tgz"; }
while sleep 15; do save; done & # what was measured comes back even if this is ended
saving=$!
OUT=/tmp/results MODELS=/tmp/models PYTHON=python3 SECONDS_IN_ALL=$((${SECONDS_IN_ALL:-420} - SECONDS - 25)) \
    PYTHONPATH=/tmp/site XDG_CACHE_HOME=/tmp/cache OPENBLAS_NUM_THREADS=2 \
    NVRTC_CACHE=/tmp/kernels NVRTC_RECORD=/tmp/sources NVRTC_LOG=/tmp/results/compiled.log \
    LD_PRELOAD=$KIT/nvrtc_cache.so MLX_PTX_CACHE_DIR=/dev/null/none benchmarks/gpu.sh "${@:-table}"
status=$?
kill $saving; wait $saving 2>/dev/null; save
echo "[${SECONDS}s] $(wc -l </tmp/results/compiled.log) kernels were compiled"
# What was compiled here, and the sources of all; takes 20 s where it is much.
(cd /tmp/kernels && find . -newer /tmp/before -name '*.[ct]*' | tar cz -T - | split -b 15m - "$OUT/kernels.")
tar cz -C /tmp/sources . >"$OUT/sources.tgz"
echo "[${SECONDS}s] end"
exit $status
