"""The rows that all contenders train on; there are only a few, so that batches are repeated."""

import json
from pathlib import Path

import numpy as np

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.data import load_datasets
from mlx_edgelora.data.batches import iterate_batches
from mlx_edgelora.data.dataset import Dataset
from mlx_edgelora.data.sources import jsonl_source
from mlx_edgelora.embedded import DATA_PATH
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model.tokenizer import tokenizer_in
from mlx_edgelora.storage.files import make_folder

# Number of batches. They follow in random order, and repeated batches show changes of the loss.
BATCHES = 2


def synthetic_rows(
    tokenizer: object, count: int, context: int, labelled: float, words: list[str]
) -> list[dict]:
    """Make rows of random words, longer than the context, so that no row is padded.

    Args:
        tokenizer: tokenizer of the model; a word has at least one token.
        count: number of rows.
        context: number of tokens that the model sees.
        labelled: share of tokens with labels, as nearly as the tokenizer allows; with 1, rows are
            plain text.
        words: words to choose from.
    """
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        chosen = [words[index] for index in rng.integers(0, len(words), context + 2)]
        if labelled == 1:
            rows.append({"text": " ".join(chosen)})
            continue
        wanted = context + 1 - max(1, round(labelled * context))
        few = _prefix(tokenizer, chosen, wanted)
        rest = chosen[few:] + chosen[:few]
        rows.append({"prompt": " ".join(chosen[:few]), "completion": " ".join(rest)})
    return rows


def _prefix(tokenizer: object, words: list[str], wanted: int) -> int:
    """Largest number of words that make a prompt of at most `wanted` tokens; at least 1."""

    def tokens(count: int) -> int:
        message = [{"role": "user", "content": " ".join(words[:count])}]
        return len(tokenizer.apply_chat_template(message, add_generation_prompt=True))

    low, high = 1, len(words)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= wanted else (low, middle)
    return low


def words_for(model: Path) -> list[str]:
    """Words for a model: of its tokenizer if `add_tokenizer` made it, else of the embedded data."""
    config = model / "tokenizer_config.json"
    if config.exists() and json.loads(config.read_text()).get("synthetic"):
        names = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
        return [name for name in names if name != "</s>"]
    return [word for row in given_rows(DATA_PATH, 50) for word in row["prompt"].split()]


def given_rows(folder: Path, count: int) -> list[dict]:
    """The longest rows in a folder's train.jsonl, which decide the peak of a run.

    Raises:
        EdgeLoraError: the file is missing, is not JSONL, or has fewer than `count` rows.
    """
    file = folder / "train.jsonl"
    if not file.is_file():
        raise EdgeLoraError(
            f"--data: {folder} has no train.jsonl, expected a folder with one; name another folder"
        )
    rows = [row for _, row in jsonl_source(file).rows]
    if len(rows) < count:
        raise EdgeLoraError(
            f"--data: {file} has {len(rows)} rows, expected at least {count}, {BATCHES} batches; "
            "lower --batch or add rows"
        )
    return sorted(rows, key=lambda row: -len(json.dumps(row)))[:count]


def write_rows(folder: Path, rows: list[dict]) -> bool:
    """Write a data folder. Returns whether its rows have prompts that can be masked."""
    make_folder(folder)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text)
    return "text" not in rows[0]


def sort_rows(config: TrainConfig, tokenizer: object) -> None:
    """Sort the rows of a data folder by length.

    This package forms batches by length. mlx-lm is meant to do so as well, but takes rows in the
    order of the file (docs/differences-from-mlx-lm.md). With sorted rows, both form the same
    batches.

    Raises:
        EdgeLoraError: a row has no token to train on within the context.
    """
    rows = [row for _, row in jsonl_source(Path(config.data, "train.jsonl")).rows]
    dataset = load_datasets(config, tokenizer)[0]
    if len(dataset) != len(rows):
        raise EdgeLoraError(
            f"--data: {len(rows) - len(dataset)} of the {len(rows)} longest rows have no token to "
            f"train on within {config.max_seq_length}; take longer --contexts or other rows"
        )
    lengths = [min(len(dataset[i][0]), config.max_seq_length) for i in range(len(rows))]
    write_rows(Path(config.data), [rows[i] for i in np.argsort(lengths, kind="stable")])


def tokenizer_of(model: Path) -> object:
    """The tokenizer of a model folder."""
    config = json.loads((model / "config.json").read_bytes())
    return tokenizer_in(model, config.get("eos_token_id"))


def batches(
    config: TrainConfig, tokenizer: object, steps: int
) -> list[tuple[tuple[int, ...], int, int]]:
    """The batches of a run.

    Args:
        config: options of the run.
        tokenizer: tokenizer of the model.
        steps: number of steps.

    Returns:
        For each step the indices of the rows, the number of tokens that the model sees, and the
        number of tokens with labels.
    """
    dataset: Dataset = load_datasets(config, tokenizer)[0]
    order = iterate_batches(
        dataset, config.batch_size, config.max_seq_length, loop=True, seed=config.seed
    )
    found = []
    for _, batch in zip(range(steps), order, strict=False):
        found.append((batch.indices, batch.inputs().size, int(batch.mask.sum())))
    return found
