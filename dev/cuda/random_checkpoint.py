"""Write the benchmark's 28 blocks of Llama-3.2-3B's shape within seconds, as random bits.

    python random_checkpoint.py describe FILE      tensors and texts; needs mlx-edgelora
    python random_checkpoint.py write FILE CACHE   the checkpoint, for --cache; needs NumPy alone

`mlx_edgelora.benchmark.shapes` draws and packs weights instead, for which CUDA compiles kernels.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

SHAPE, BLOCKS = "llama-3.2-3b", 28
SIZES = {"U32": 4, "BF16": 2}


def describe(file: Path) -> None:
    """Write down names, shapes and dtypes of all tensors, and the other files of the folder."""
    import mlx.core as mx  # noqa: PLC0415 - not where the checkpoint is written
    from mlx.utils import tree_flatten  # noqa: PLC0415

    from mlx_edgelora.benchmark import shapes  # noqa: PLC0415

    model, config = shapes.random_model(SHAPE, BLOCKS, "4bit")
    kinds = {mx.uint32: "U32", mx.bfloat16: "BF16"}
    tensors = [(n, list(x.shape), kinds[x.dtype]) for n, x in tree_flatten(model.parameters())]
    folder = file.parent / f"{file.name}-texts"
    folder.mkdir()
    shapes.add_tokenizer(folder, shapes.SHAPES[SHAPE][-1])
    texts = {text.name: text.read_text() for text in folder.iterdir()}
    texts["config.json"] = json.dumps(config)
    file.write_text(json.dumps({"tensors": tensors, "texts": texts}))


def bfloat16(value: float, count: int) -> bytes:
    """A number, so many times."""
    bits = np.array([value], np.float32).view(np.uint32) >> 16
    return bits.astype(np.uint16).tobytes() * count


def write(file: Path, cache: Path) -> None:
    """Write the checkpoint: packed weights are random bits, between equal bounds."""
    known = json.loads(file.read_text())
    folder = cache / f"{SHAPE}-{BLOCKS}"
    folder.mkdir(parents=True)
    header, end = {}, 0
    for name, shape, kind in known["tensors"]:
        start, end = end, end + math.prod(shape) * SIZES[kind]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header | {"__metadata__": {"format": "mlx"}}).encode()
    text += b" " * (-len(text) % 8)
    bits, number = memoryview(np.random.RandomState(0).bytes(2**26)), 0
    with (folder / "model.safetensors").open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape, kind in known["tensors"]:
            left = math.prod(shape) * SIZES[kind]
            while kind == "U32" and left:
                start = number * 1048583 % 2**25 & ~3
                part = bits[start : min(start + left, len(bits))]
                out.write(part)
                left, number = left - len(part), number + 1
            if kind == "BF16":
                packed = header.get(name.rpartition(".")[0] + ".weight", {"shape": [1]})
                largest = (8 * packed["shape"][-1]) ** -0.5
                values = {"scales": 2 * largest / 15, "biases": -largest}
                out.write(bfloat16(values.get(name.rpartition(".")[2], 1.0), left // 2))
    for name, content in known["texts"].items():
        (folder / name).write_text(content)


if __name__ == "__main__":
    {"describe": describe, "write": write}[sys.argv[1]](*map(Path, sys.argv[2:]))
