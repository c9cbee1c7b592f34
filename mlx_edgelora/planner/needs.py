"""Estimate the working memory of a phase by a formula of a few terms.

The number of arrays that autodiff keeps and that MLX's scheduler allocates ahead cannot be derived
from a model. Each term is a size times a coefficient that was fitted to measured phases on a CPU
(docs/planner.md). On other devices it is a guess until phases are measured
(`training/sampling.py`).
"""

from functools import lru_cache

from mlx_edgelora.engine.adapter_state import ASYNC_BYTES, LAZY_BYTES
from mlx_edgelora.engine.paged_adapters import PIECE_BYTES
from mlx_edgelora.layers.fused import BLOCK
from mlx_edgelora.layers.mlp import TOKENS, slice_features
from mlx_edgelora.losses.exact import tile_shape
from mlx_edgelora.planner.measured import Way
from mlx_edgelora.planner.sizes import BatchShape, ModelShape

FLOAT = 4
MIB = 2**20
# Of weights that are updated together: they, the gradient and two moments, the last three anew.
ARRAYS = 7

TERMS: dict[str, dict[str, float]] = {
    "load": {"embedded": 1.0, "one": 0.6},
    "forward": {
        "hidden": 6.8,
        "intermediate": 4.9,
        "slice": 2.9,
        "slice weights": 1.6,
        "one": 6.6,
    },
    "backward": {
        "hidden": 12.7,
        "intermediate": 11.5,
        "slice": 7.3,
        "slice weights": 1.7,
        "one": 6.9,
        "trained": 1.2,
        "scores": 1.0,
    },
    "tiles forward": {
        "hidden": 4.9,
        "intermediate": 5.4,
        "slice": 3.2,
        "slice weights": 1.7,
        "one": 5.9,
    },
    "tiles backward": {
        "hidden": 11.1,
        "intermediate": 13.1,
        "slice": 13.2,
        "slice weights": 1.7,
        "adapters": 2.4,
        "scores": 1.0,
    },
    "head": {"tile": 1.0, "labelled": 2.6, "read": 0.8},
    # The last block is computed for labelled tokens, the other kept blocks for all tokens. Fitted
    # with at most 0.8 for the tile: free, it is 3, as if tiles of any size took three times theirs.
    "tail": {
        "kept hidden": 2.7,
        "kept intermediate": 8.1,
        "kept routed": 2.5,
        "kept recurrent": 3.8,
        "last intermediate": 9.0,
        "last routed": 3.9,
        "attention": 9.6,
        "expanded": 16.1,
        "tile": 0.8,
        "one": 1.7,
        "trained": 1.2,
        "scores": 1.0,
    },
    "update": {"adapters": 3.0, "one": 1.0},
}

# A recurrent block in a tile: its MLP and its recurrence are not in memory at the same time.
RECURRENT_TERMS: dict[str, dict[str, float]] = {
    "forward": {"hidden": 4.9, "recurrent": 3.5, "states": 5.0, "one": 5.9},
    "backward": {"hidden": 11.1, "recurrent": 4.5, "states": 11.3, "one": 11.1},
}

# A block in a tile whose MLP is read by rows: what is before it and what is in it are not in memory
# at the same time.
ROW_TERMS: dict[str, list[dict[str, float]]] = {
    "tiles forward": [
        {"hidden": 4.9, "queries": 2.0, "one": 5.9},
        {"hidden": 3.0, "features": 1.0, "rows": 2.4, "one": 2.0},
    ],
    "tiles backward": [
        {"hidden": 7.0, "queries": 7.0, "adapters": 2.4, "scores": 1.0, "one": 10.0},
        {"sums": 1.0, "piece": 8.0, "rows": 1.8, "adapters": 1.2, "one": 2.0},
    ],
}

# Times that the matrices of a block are unpacked in a phase.
UNPACKED = {"forward": 1, "backward": 2, "tiles forward": 1, "tiles backward": 2, "tail": 2}


def need(
    kind: str, shape: ModelShape, way: Way, batch_shape: BatchShape, on_gpu: bool = False
) -> float:
    """Working memory of a phase in bytes.

    Args:
        kind: a key of `TERMS`; "tail" is the kept blocks and the head.
        shape: sizes of the model.
        way: settings of the phase, by kind. For a block (tile_tokens, mlp_bytes, kernel, resident,
            attention_block, mlp_weights, placement of inputs); for the head (loss_bytes, placement
            of the head); for a tail (kept blocks, loss_bytes, kernel, placement of the head,
            attention_block); for an update (placement of adapters,).
        batch_shape: sizes of the batch.
        on_gpu: whether MLX computes on a GPU. It frees nothing there before a command buffer is
            done, so that all unpacked matrices of a block can be in memory at once.
    """
    sizes = sizes_of(kind, shape, way, batch_shape, on_gpu)
    grouped = kind in UNPACKED and kind != "tail" and way[1] is not None
    total = float(max(way[1], shape.one_expert_bytes) if grouped and shape.expert_bytes else 0)
    if grouped and kind.endswith("backward"):  # gradients of experts are summed in place
        sizes = sizes | {"adapters": shape.adapter_bytes - shape.expert_adapter_bytes}
        total += shape.expert_adapter_bytes
    if kind in ROW_TERMS and way[5] == "rows":
        total += max(_sum(terms, sizes) for terms in ROW_TERMS[kind])
    else:
        total += _sum(TERMS[kind], sizes)
    if shape.state_bytes and kind in UNPACKED and kind != "tail":
        total = max(total, _recurrent(kind, shape, batch_shape, sizes))
    if kind.startswith("tiles") and way[6] == "memory":
        total += _in_store(shape, batch_shape, way[0])
    if on_gpu and shape.packed and kind in UNPACKED and way[2] == "dequantize":
        total += UNPACKED[kind] * shape.block_weights * shape.itemsize
    return total


def _sum(terms: dict[str, float], sizes: dict[str, float]) -> float:
    return sum(number * sizes.get(name, 0.0) for name, number in terms.items())


def _recurrent(
    kind: str, shape: ModelShape, batch_shape: BatchShape, sizes: dict[str, float]
) -> float:
    """Working memory of a recurrent block, less the keys and values that others have by tiles."""
    apart = kind.startswith("tiles ") and not shape.recurrent_attends
    phase = kind.removeprefix("tiles ")
    total = _sum(RECURRENT_TERMS[phase], sizes)
    entry = shape.itemsize + FLOAT * (phase == "backward")
    return total - apart * batch_shape.size * shape.keys * entry


def _in_store(shape: ModelShape, batch_shape: BatchShape, tile_tokens: int) -> float:
    """Bytes that a block by tiles has in the store, in memory, apart from inputs and gradients.

    The tiles of its output, less what is not copied of a tile, the states before each tile, and
    what tokens give to their experts and get of two (a guess).
    """
    spans = -(-batch_shape.tokens // max(1, tile_tokens // batch_shape.rows))
    hidden = batch_shape.size * shape.hidden * shape.itemsize
    found = hidden * max(0.0, 1 - 2 / spans) + spans * batch_shape.rows * shape.state_bytes
    return found + 3 * hidden * (shape.expert_bytes > 0)


@lru_cache(maxsize=4096)
def sizes_of(
    kind: str, shape: ModelShape, way: Way, batch_shape: BatchShape, on_gpu: bool = False
) -> dict[str, float]:
    """Sizes of the arrays of a phase in bytes, by the names of its terms."""
    sizes = {"one": float(MIB), "adapters": float(shape.adapter_bytes)}
    if shape.full:
        # Tiles are summed in float32; the gradient of a whole block is not.
        sizes["trained"] = float(shape.adapter_bytes)
        sizes["adapters"] *= FLOAT / shape.itemsize
    if kind == "head":
        loss_bytes, place = way
        rows, tile = _tile(loss_bytes, shape, batch_shape)
        labelled = batch_shape.labelled * shape.hidden
        read = rows * shape.hidden * shape.itemsize if place == "streamed" else 0
        return sizes | {"tile": tile, "labelled": labelled * FLOAT, "read": read}
    if kind == "update":
        paged = way == ("paged",)
        if shape.full:  # a piece at a time, or a block, which is evaluated before the next one
            piece = min(shape.adapter_bytes, PIECE_BYTES) if paged else shape.adapter_bytes
            least = piece * ARRAYS / TERMS["update"]["adapters"]
            return sizes | {"adapters": max(least, shape.adapter_bytes)}
        largest = max(shape.adapter_bytes, shape.outside_adapter_bytes)
        if not paged and largest < (ASYNC_BYTES if on_gpu else LAZY_BYTES):  # all at once
            largest = shape.trained_bytes(shape.blocks - shape.adapted, shape.blocks)
        return sizes | {"adapters": largest}
    every = batch_shape.size * shape.hidden * shape.itemsize
    if kind == "tail":
        above, size = way[0] - 1, batch_shape.size
        inner, routed = size * shape.intermediate, size * shape.routed
        last = batch_shape.labelled / size
        _, tile = _tile(way[1], shape, batch_shape)
        sizes["trained"] = way[0] * sizes.get("trained", 0.0)
        return sizes | {
            "kept hidden": above * every * FLOAT / shape.itemsize,
            "kept intermediate": above * inner * shape.itemsize,
            "kept routed": above * routed * shape.itemsize,
            "kept recurrent": above * size * shape.recurrent * FLOAT,
            "last intermediate": inner * last * shape.itemsize,
            "last routed": routed * last * shape.itemsize,
            "attention": size * (shape.queries + shape.keys) * shape.itemsize,
            "expanded": size * shape.expanded * shape.itemsize,
            "tile": tile,
            "scores": _scores(shape, batch_shape, batch_shape.tokens, way[4]),
        }
    if kind == "load":
        # Rows of the embedding as they are stored: in 4 bits with scales, or in 16 bits to be cast.
        entry = 0.6 if shape.head_packed or shape.itemsize == 2 else 2.0
        return sizes | {"embedded": batch_shape.size * shape.hidden * entry}
    tile_tokens, mlp_bytes, _, _, attention_block, mlp_weights, _ = way
    tokens = batch_shape.size
    if kind.startswith("tiles"):
        spans = -(-batch_shape.tokens // max(1, tile_tokens // batch_shape.rows))
        tokens = batch_shape.rows * -(-batch_shape.tokens // spans)
    entry = shape.itemsize
    sliced = mlp_bytes is not None and shape.gated
    sizes |= {
        "hidden": tokens * shape.hidden * entry,
        "intermediate": 0 if sliced else tokens * shape.intermediate * entry,
        "scores": _scores(shape, batch_shape, tokens // batch_shape.rows, attention_block),
        "queries": tokens * shape.queries * entry,
        "recurrent": tokens * shape.recurrent * FLOAT,
        "states": batch_shape.rows * shape.state_bytes,
    }
    if mlp_weights == "rows":
        step = slice_features(mlp_bytes, 2 * shape.hidden, tokens, shape.intermediate, 1)
        step = min(step, shape.intermediate)
        sizes |= {
            "features": tokens * shape.intermediate * entry,
            # Float32, whatever the activations are: gradients of the input and of the features.
            "sums": FLOAT * tokens * (4 * shape.hidden + 2 * shape.intermediate),
            "rows": FLOAT * 2 * shape.hidden * step,
            "piece": FLOAT * tokens * step,
        }
    elif sliced:
        group = 64 if shape.packed else 1
        chunk = min(TOKENS, tokens)
        features = slice_features(mlp_bytes, 3 * shape.hidden, chunk, shape.intermediate, group)
        features = min(features, shape.intermediate)
        sizes |= {
            "slice": FLOAT * chunk * features,
            "slice weights": FLOAT * 3 * shape.hidden * features,
        }
    return sizes


def _tile(loss_bytes: int, shape: ModelShape, batch_shape: BatchShape) -> tuple[int, int]:
    """Rows of a tile of the head; bytes of its hidden states, logits and part of the head."""
    rows, chunk = tile_shape(loss_bytes, shape.hidden, batch_shape.labelled, shape.vocabulary)
    return rows, FLOAT * (rows * shape.hidden + 3 * rows * chunk + chunk * shape.hidden)


def _scores(shape: ModelShape, batch_shape: BatchShape, queries: int, block: int | None) -> int:
    """Bytes of scores in MLX's gradient of attention on Metal, for `queries` queries of each row.

    `sdpa_vjp_blocked` in MLX 0.32.4 holds three blocks for each head. The number is not fitted.
    """
    most = BLOCK if block is None else block
    block_scores = min(most, queries) * min(most, batch_shape.tokens)
    return 3 * batch_shape.rows * shape.blocked_heads * block_scores * shape.itemsize
