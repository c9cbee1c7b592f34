"""Two vocabulary heads with hidden states and labels, for the benchmarks of the losses.

`embedded` is the head of the model inside the package, on its own data set. `synthetic` has the
shape of that of Llama-3.2-3B (128,256 x 3,072, 4-bit in groups of 64) and made-up numbers.
"""

import json

import mlx.core as mx
import mlx_lm
import numpy as np

from mlx_edgelora.embedded import DATA_PATH, MODEL_PATH
from mlx_edgelora.layers.dequantize import dequantize
from mlx_edgelora.losses.exact import CrossEntropy
from mlx_edgelora.losses.head import MatrixHead, Tile

VOCABULARY, DIMS = 128256, 3072
CLUSTERS, DISTINCT = 2000, 1500
SPREAD = 2.2  # standard deviation of the logits that noise makes
TARGET = 2.5  # mean exact loss


class PackedHead(MatrixHead):
    """A quantized matrix in memory as a head."""

    final_norm = logits_transform = adapter = None

    def __init__(self, packed: tuple[mx.array, ...], group_size: int, bits: int) -> None:
        self._arrays = dict(zip(("weight", "scales", "biases"), packed, strict=True))
        self._packing = {"group_size": group_size, "bits": bits}
        self.vocabulary, groups = packed[1].shape
        self.dims = groups * group_size

    def unpack(self, rows: dict[str, mx.array]) -> Tile:
        """Dequantize to float32."""
        return Tile(dequantize(**rows, **self._packing).astype(mx.float32))


def clustered_head(random: np.random.RandomState) -> tuple[PackedHead, np.ndarray]:
    """Rows of norm 1, 0.8 of a cluster's centre and 0.6 of noise; and the cluster of each.

    Cluster sizes follow Zipf-Mandelbrot, 1 / (rank + 20), and clusters are scattered over the
    vocabulary. Cosine similarity is 0.64 inside a cluster and about 0 between clusters.
    """
    share = 1 / (np.arange(CLUSTERS) + 20)
    cluster = random.choice(CLUSTERS, VOCABULARY, p=share / share.sum())
    centres, pieces = mx.random.normal((CLUSTERS, DIMS)), []
    for start in range(0, VOCABULARY, 8192):
        ids = mx.array(cluster[start : start + 8192])
        rows = 0.8 * centres[ids] + 0.6 * mx.random.normal((ids.size, DIMS))
        pieces.append(mx.quantize(rows / DIMS**0.5, 64, 4))
        mx.eval(pieces)
    packed = tuple(mx.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    mx.eval(packed)
    return PackedHead(packed, 64, 4), cluster


def synthetic(tokens: int) -> tuple[PackedHead, mx.array, mx.array, np.ndarray]:
    """The clustered head, hidden states, labels and the label vocabulary.

    A hidden state is a_1 of the label's row (a_1 normal with standard deviation 3), 0 to 8 of
    another row of the label's cluster, 0 to 8 of the row of a token drawn as labels are, and
    noise that gives logits a standard deviation of 2.2. The mean of a_1 is sought so that the
    exact loss of the first 256 tokens is 2.5. Labels are drawn from a Zipf-Mandelbrot
    distribution, 1 / (rank + 2), over 1,500 tokens taken at random.
    """
    random = np.random.RandomState(0)
    mx.random.seed(0)
    head, cluster = clustered_head(random)
    names = random.choice(VOCABULARY, DISTINCT, replace=False)
    share = 1 / (np.arange(DISTINCT) + 2)
    labels, others = random.choice(names, (2, tokens), p=share / share.sum())
    members = [np.flatnonzero(cluster == c) for c in range(CLUSTERS)]
    related = np.array([random.choice(members[cluster[label]]) for label in labels])
    weights = random.uniform(0, 8, (2, tokens, 1)).astype(np.float32)
    strength = random.normal(0, 3, (tokens, 1)).astype(np.float32)
    own, near, far = (head.unpack(head.take(mx.array(x))).weight for x in (labels, related, others))
    hidden = SPREAD * mx.random.normal((tokens, DIMS)) + mx.array(strength) * own
    hidden = hidden + mx.array(weights[0]) * near + mx.array(weights[1]) * far
    wanted, low, high = mx.array(labels), 4.0, 28.0
    mx.eval(hidden, own, wanted)
    for _ in range(7):
        middle = (low + high) / 2
        some = (hidden + middle * own)[:256]
        above = CrossEntropy().value(some, head, wanted[:256])[0].item() > TARGET
        low, high = (middle, high) if above else (low, middle)
    hidden = hidden + (low + high) / 2 * own
    mx.eval(hidden)
    return head, hidden, wanted, np.unique(names)


def embedded(tokens: int) -> tuple[PackedHead, mx.array, mx.array, np.ndarray]:
    """The embedded model's head, its last hidden states on its data set, and labels."""
    model, tokenizer = mlx_lm.load(str(MODEL_PATH))
    states, labels, count = [], [], 0
    with (DATA_PATH / "train.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            if count >= tokens:
                break
            row = json.loads(line)
            roles = {"user": row["prompt"], "assistant": row["completion"]}
            messages = [{"role": role, "content": text} for role, text in roles.items()]
            ids = mx.array(tokenizer.apply_chat_template(messages))
            states.append(model.model(ids[None, :-1])[0].astype(mx.float32))
            labels.append(ids[1:])
            count += ids.size - 1
            mx.eval(states[-1])
    hidden, wanted = mx.concatenate(states)[:tokens], mx.concatenate(labels)[:tokens]
    packed = model.model.embed_tokens
    head = PackedHead((packed.weight, packed.scales, packed.biases), packed.group_size, packed.bits)
    mx.eval(hidden, wanted)
    return head, hidden, wanted, np.unique(np.array(wanted))
