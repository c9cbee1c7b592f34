"""Load and tokenize the training, validation and test sets of a run."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.data.conversation import RowError
from mlx_edgelora.data.dataset import Dataset, Row
from mlx_edgelora.data.encode import ANSWERS, EVERYTHING, LAST_ANSWER, Encoder, rows_of
from mlx_edgelora.data.findings import Findings
from mlx_edgelora.data.preferences import preference_set
from mlx_edgelora.data.sets import Part, find_sets
from mlx_edgelora.errors import EdgeLoraError


def load_datasets(
    config: TrainConfig, tokenizer: Any, notify: Callable[[str], None] | None = None
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """The training, validation and test sets that a run needs, tokenized and checked.

    Args:
        config: options of the run; see `find_sets` for those of the data.
        tokenizer: a tokenizer of `mlx_lm.load`.
        notify: called with a line about the source and kind of rows, and with a line if there is
            no validation set.

    Returns:
        Three data sets, or None for a set that the run does not need and for a validation set
        that does not exist. Callers should print `dataset.report.warning()` of each.

    Raises:
        EdgeLoraError: a data set is missing, cannot be read, contains an invalid row (named by
            file and line) or has no usable row.
    """
    *sets, about = find_sets(config)
    for line in about:
        if notify is not None:
            notify(line)
    train, valid, test = (_build(parts, config, tokenizer) if parts else None for parts in sets)
    return train, valid, test


def _build(parts: Sequence[Part], config: TrainConfig, tokenizer: Any) -> Dataset:
    name = " + ".join(part.name for part in parts)
    encode, findings = _encoder(config, tokenizer), Findings()
    if config.compares_answers:
        dataset = preference_set(parts, config.loss, encode, config.max_seq_length, findings)
    else:
        rows = (row for part in parts for row in _encode(part, encode, findings))
        dataset = Dataset(rows, config.max_seq_length, name, findings)
    if not config.allow_lost_content:
        findings.refuse_lost(name)
    return dataset


def _encoder(config: TrainConfig, tokenizer: Any) -> Encoder:
    if config.compares_answers:
        return Encoder(tokenizer, ANSWERS, f"--loss {config.loss}")
    if config.train_on is not None:
        return Encoder(tokenizer, config.train_on, f"--train-on {config.train_on}")
    return Encoder(tokenizer, LAST_ANSWER if config.mask_prompt else EVERYTHING, "mask_prompt")


def _encode(part: Part, encode: Encoder, findings: Findings) -> Iterator[Row]:
    """Tokenize rows one by one, so that only one is in memory as text."""
    for number, row in part.rows():
        try:
            encoded = encode(row)
        except RowError as error:
            raise EdgeLoraError(f"{part.source.row_name} {number}: {error}") from error
        place = f"{part.source.row_name} {number}"
        findings.add(place, encoded.having, encoded.findings)
        for tokens, spans in rows_of(encoded):
            yield Row(part.source.row_name, number, tokens, spans)
