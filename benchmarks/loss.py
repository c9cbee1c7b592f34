"""What the losses cost and how near the approximate one comes to the exact one.

    python benchmarks/loss.py fidelity --head embedded
    python benchmarks/loss.py fidelity --head llama-3.2-3b --contexts 256 1024 4096 --plot out.png
    python benchmarks/loss.py head

`fidelity` compares `ApproximateCrossEntropy` with the exact loss: subset of the vocabulary,
peak above the inputs, time over that of the dense softmax and of the exact loss, loss bias and
gradient with respect to hidden states. `--head embedded` is the model inside the package on its
own data set. `--head llama-3.2-3b` has the shape of that head (128,256 x 3,072, 4-bit in groups
of 64) and made-up numbers, for no trained head could be downloaded: rows lie in clusters, hidden
states are mixtures of rows and noise (`synthetic`), so errors are those of that construction.
Labels come from a label vocabulary of at most 1,500 tokens. Neighbours are kept in `--cache`.

`head` measures the exact loss at that shape: peak against its bound, time against the two
dense products alone, and what leaving tokens out saves. It needs 2 GB of free memory.

Every figure is float32, with MLX's buffer cache off; a time is one run, given as a ratio only.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np

from mlx_edgelora.embedded import DATA_PATH, MODEL_PATH
from mlx_edgelora.layers.dequantize import dequantize
from mlx_edgelora.losses.approximate import ApproximateCrossEntropy, choose_subset
from mlx_edgelora.losses.exact import CrossEntropy
from mlx_edgelora.losses.head import MatrixHead, Tile
from mlx_edgelora.losses.neighbours import QUERIES, nearest, row_sum

MIB = 2**20
VOCABULARY, DIMS = 128256, 3072
CLUSTERS, DISTINCT = 2000, 1500
SPREAD = 2.2  # standard deviation of the logits that noise makes
TARGET = 2.5  # mean exact loss
NEIGHBOURS = {"embedded": [10, 100, 853], "llama-3.2-3b": [10, 100, 1000, 4000]}


class PackedHead(MatrixHead):
    """A quantized matrix in memory as a head."""

    enter = leave = adapter = None

    def __init__(self, packed: tuple[mx.array, ...], group_size: int, bits: int) -> None:
        self._arrays = dict(zip(("weight", "scales", "biases"), packed, strict=True))
        self._packing = {"group_size": group_size, "bits": bits}
        self.vocabulary, groups = packed[1].shape
        self.dims = groups * group_size

    def unpack(self, rows: dict[str, mx.array]) -> Tile:
        """Dequantize to float32."""
        return Tile(dequantize(**rows, **self._packing).astype(mx.float32))


@dataclass(frozen=True)
class Measured:
    """Result of a call, its peak above what was there before, in bytes, and its seconds."""

    result: tuple
    peak: int
    seconds: float


def measure(function: Callable[[], tuple]) -> Measured:
    """Call and evaluate once."""
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    result = function()
    mx.eval(result)
    return Measured(result, mx.get_peak_memory() - before, time.perf_counter() - start)


def run_loss(loss: CrossEntropy | ApproximateCrossEntropy, *inputs: object) -> Measured:
    """Loss and gradient of hidden states, tile by tile."""

    def call() -> tuple:
        (value, _), gradients = loss.value_and_grad(*inputs)
        return value, gradients.hidden

    return measure(call)


def run_dense(hidden: mx.array, head: PackedHead, labels: mx.array) -> Measured:
    """The same with the head unpacked and all logits in memory, by MLX's own autodiff."""

    def loss(x: mx.array) -> mx.array:
        weight = head.unpack(head.slice(0, head.vocabulary)).weight
        return nn.losses.cross_entropy(x @ weight.T, labels, reduction="mean")

    return measure(lambda: mx.value_and_grad(loss)(hidden))


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


def neighbour_table(head: PackedHead, tokens: np.ndarray, k: int, file: Path) -> np.ndarray:
    """The k nearest of each of some sorted tokens [m, k], kept in a file."""
    if file.exists():
        table = np.load(file)
        if table.shape == (len(tokens), k) and (table[:, 0] == tokens).all():
            return table
    parts = []
    for start in range(0, len(tokens), QUERIES):
        part = mx.array(tokens[start : start + QUERIES])
        parts.append(np.array(nearest(head, part, k)))
    table = np.concatenate(parts)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, table)
    return table


def compare(found: Measured, exact: Measured) -> dict[str, float]:
    """Loss bias, and cosine and norm of the gradient against the exact one."""
    (value, gradient), (true_value, truth) = found.result, exact.result
    norm, true_norm = mx.linalg.norm(gradient).item(), mx.linalg.norm(truth).item()
    return {
        "bias": value.item() - true_value.item(),
        "cosine": (gradient * truth).sum().item() / (norm * true_norm),
        "norm": norm / true_norm,
    }


COLUMNS = "tokens | loss | k | tail | subset | share | peak MiB | time / dense | time / exact"
COLUMNS += " | bias | gradient cosine | gradient norm"


def print_row(cells: list[object], found: Measured, dense: Measured, exact: Measured) -> dict:
    """Print one row and return its errors."""
    errors = compare(found, exact)
    cells = [*cells, f"{found.peak / MIB:.1f}", f"{found.seconds / dense.seconds:.2f}"]
    cells += [f"{found.seconds / exact.seconds:.2f}", f"{errors['bias']:+.4f}"]
    cells += [f"{errors['cosine']:.4f}", f"{errors['norm']:.4f}"]
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)
    return errors


def fidelity(args: argparse.Namespace) -> None:
    """Print the table of one head, and draw it."""
    make = embedded if args.head == "embedded" else synthetic
    head, hidden, labels, names = make(max(args.contexts))
    file = args.cache / f"neighbours-{args.head}.npy"
    table = neighbour_table(head, names, max(NEIGHBOURS[args.head]), file)
    total, whole = row_sum(head), head.vocabulary
    logits = hidden[:256] @ head.unpack(head.slice(0, whole)).weight.T
    print(
        f"{args.head}: {whole} x {head.dims}, standard deviation of the logits of a token ", end=""
    )
    print(f"{logits.std(axis=-1).mean().item():.2f}; {len(names)} possible labels\n")
    del logits
    print(f"| {COLUMNS} |\n|{'---|' * 12}", flush=True)
    points = []
    for count in args.contexts:
        inputs = (hidden[:count], head, labels[:count])
        mx.eval(inputs[0], inputs[2])
        distinct = np.unique(np.array(inputs[2]))
        run_loss(CrossEntropy(), hidden[:8], head, labels[:8])
        exact, dense = run_loss(CrossEntropy(), *inputs), run_dense(*inputs)
        loss = exact.result[0].item()
        for name, found in (("dense", dense), ("exact", exact)):
            label = f"{name}, {loss:.3f}"
            print_row([count, label, "", "", whole, "100.0 %"], found, dense, exact)
        for k in NEIGHBOURS[args.head]:

            def lookup(tokens: np.ndarray, k: int = k) -> np.ndarray:
                return table[np.searchsorted(names, tokens), :k]

            share = len(choose_subset(distinct, lookup)) / whole
            for tail in (False, True):
                approximate = ApproximateCrossEntropy(lookup, total=total if tail else None)
                found = run_loss(approximate, *inputs)
                cells = [count, "approximate", k, "yes" if tail else "no", round(share * whole)]
                errors = print_row([*cells, f"{share:.1%}"], found, dense, exact)
                points.append({"tokens": count, "tail": tail, "share": share} | errors)
    if args.plot:
        draw(points, args)


def draw(points: list[dict], args: argparse.Namespace) -> None:
    """Gradient cosine and loss bias against the subset's share of the vocabulary."""
    import matplotlib  # noqa: PLC0415 - an optional dependency

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker  # noqa: PLC0415

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for index, count in enumerate(args.contexts):
        for tail in (True, False):
            line = [p for p in points if (p["tokens"], p["tail"]) == (count, tail)]
            for axis, name in zip(axes, ("cosine", "bias"), strict=True):
                axis.plot(
                    [100 * p["share"] for p in line],
                    [p[name] for p in line],
                    color=f"C{index}",
                    linestyle="-" if tail else "--",
                    marker="o" if tail else "x",
                    label=f"{count} tokens, {'with' if tail else 'no'} tail",
                )
    titles = ("Gradient: cosine with the exact one", "Loss: approximate minus exact")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="subset, % of the vocabulary", xscale="log")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.grid(alpha=0.3, which="both")
    axes[1].axhline(0, color="black", linewidth=0.8)
    axes[0].legend(fontsize=8)
    kind = "the embedded model" if args.head == "embedded" else f"synthetic {args.head}"
    figure.suptitle(f"Approximate loss on the head of {kind}")
    figure.savefig(args.plot, dpi=110)


def batch(count: int, vocabulary: int) -> tuple[mx.array, mx.array]:
    """Hidden states and labels without any structure."""
    hidden = mx.random.normal((count, DIMS))
    labels = mx.random.randint(0, vocabulary, (count,))
    mx.eval(hidden, labels)
    return hidden, labels


def head_costs(args: argparse.Namespace) -> None:
    """Print peaks against the bound, times against two products, and what masking saves."""
    head, _ = clustered_head(np.random.RandomState(0))
    whole = head.vocabulary
    loss = CrossEntropy()
    print("\n| tokens | peak above inputs and outputs, MiB | bound, MiB | share of it |")
    print("|---|---|---|---|", flush=True)
    for count in args.contexts:
        hidden, labels = batch(count, whole)
        peak = (run_loss(loss, hidden, head, labels).peak - hidden.nbytes) / MIB
        bound = 24 + 3 * count * DIMS * 4 / MIB
        print(f"| {count} | {peak:.1f} | {bound:.1f} | {peak / bound:.2f} |", flush=True)
    masking(head, loss)
    against_products(head, loss)


def masking(head: PackedHead, loss: CrossEntropy, count: int = 4096) -> None:
    """Print what 30 % of the tokens cost, gathered first, over what all do."""
    hidden, labels = batch(count, head.vocabulary)
    every = run_loss(loss, hidden, head, labels)
    kept = mx.array(np.random.RandomState(0).choice(count, round(0.3 * count), replace=False))
    part = measure(lambda: run_loss(loss, hidden[kept], head, labels[kept]).result)
    print(f"\n| labelled of {count} | peak above inputs, MiB | time over that of all |")
    print(f"|---|---|---|\n| 100 % | {every.peak / MIB:.1f} | 1.00 |")
    ratio = part.seconds / every.seconds
    print(f"| 30 % | {part.peak / MIB:.1f} | {ratio:.2f} |", flush=True)


def against_products(head: PackedHead, loss: CrossEntropy, count: int = 1024) -> None:
    """Print the loss's time over x @ W.T and y @ W with a float32 W in memory."""
    weight = head.unpack(head.slice(0, head.vocabulary)).weight
    mx.eval(weight)
    hidden, labels = batch(count, head.vocabulary)

    def products() -> tuple:
        logits = hidden @ weight.T
        mx.eval(logits)
        return (logits @ weight,)

    ratios = []
    for _ in range(3):
        dense = measure(products).seconds
        ratios.append(run_loss(loss, hidden, head, labels).seconds / dense)
    cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"\n| {count} tokens: exact loss over the two products | | | median |\n|---|---|---|---|")
    print(f"| {cells} | {statistics.median(ratios):.2f} |", flush=True)


def main() -> None:
    """Run the sub-command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("fidelity", help="the approximate loss against the exact one")
    one.add_argument("--head", choices=NEIGHBOURS, default="embedded")
    one.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096])
    one.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "edgelora-loss"))
    one.add_argument("--plot", type=Path, help="write a PNG (needs matplotlib)")
    one.set_defaults(run=fidelity)
    two = commands.add_parser("head", help="what the exact loss costs on a large head")
    two.add_argument("--contexts", type=int, nargs="+", default=[1, 128, 1024, 4096, 16384])
    two.set_defaults(run=head_costs)
    args = parser.parse_args()
    mx.set_cache_limit(0)
    args.run(args)


if __name__ == "__main__":
    main()
