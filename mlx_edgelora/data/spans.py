"""Labelled spans: the tokens of a row to train on, as int32 [k, 2] of (start, stop).

A token is the label of the token before it, so the first token of a row is in no span.
"""

from collections.abc import Sequence

import numpy as np

# Labelled tokens: the position of the first one, with all tokens after it, or spans.
Labelled = int | Sequence[Sequence[int]] | np.ndarray


def spans_of(labelled: Labelled, length: int) -> np.ndarray:
    """The labelled spans of a row: int32 [k, 2], in order, disjoint and not empty.

    Args:
        labelled: position of the first token to train on (0 for all tokens), or (start, stop)
            pairs.
        length: tokens of the row; spans are cut there.
    """
    if np.ndim(labelled) == 0:
        labelled = [(labelled, length)]
    spans = np.asarray(labelled, np.int32).reshape(-1, 2)
    spans = np.clip(spans, 1, max(length, 1))
    spans = spans[spans[:, 0] < spans[:, 1]]
    if len(spans) > 1:
        return _apart(spans)
    return spans


def count_labels(spans: np.ndarray) -> int:
    """The number of tokens in disjoint spans."""
    return int((spans[:, 1] - spans[:, 0]).sum())


def label_mask(spans: Sequence[np.ndarray], width: int) -> np.ndarray:
    """The mask of the labels of a batch to train on.

    Args:
        spans: labelled spans of each row, int32 [k, 2].
        width: T + 1, tokens of a row with padding.

    Returns:
        bool [B, T]; label t is token t + 1.
    """
    mask = np.zeros((len(spans), width), bool)
    for row, own in zip(mask, spans, strict=True):
        for start, stop in own:
            row[start:stop] = True
    return mask[:, 1:]


def _apart(spans: np.ndarray) -> np.ndarray:
    """Sort spans, and join those that touch or overlap."""
    joined: list[list[int]] = []
    for start, stop in sorted(spans.tolist()):
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], stop)
        else:
            joined.append([start, stop])
    return np.array(joined, np.int32)
