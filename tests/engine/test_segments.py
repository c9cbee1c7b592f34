"""One contract for every kind of segment: the gradients of plain MLX, on every architecture."""

from contextlib import closing

import pytest
from architectures import CONFIGS, EACH_KIND
from backends import skipped_without_a_kernel
from harness import (
    assert_same_gradients,
    engine,
    plain,
    plain_value_and_grad,
    random_batch,
    resolution,
    save,
)

SEGMENTS = {
    "whole": {},
    "tiles of 5 tokens": {"tile_tokens": 10},  # of each of two rows; the last tile has 2
    "1 kept block": {"kept_blocks": 1},
    "all blocks kept": {"kept_blocks": 3},
    "tail of 1 block": {"kept_blocks": 1, "head": "resident"},
    "tail of all blocks": {"kept_blocks": 3, "head": "resident"},
}
CONSISTS = {
    "whole": lambda kinds: kinds == ["WholeBlock"] * 3,
    "tiles of 5 tokens": lambda kinds: len(kinds) == 3 and "TiledBlock" in kinds,
    "1 kept block": lambda kinds: kinds == ["WholeBlock", "WholeBlock", "KeptBlock"],
    "all blocks kept": lambda kinds: kinds == ["KeptBlock"] * 3,
    "tail of 1 block": lambda kinds: kinds == ["WholeBlock", "WholeBlock", "Tail"],
    "tail of all blocks": lambda kinds: kinds == ["Tail"],
}
# Whether the weights are packed, and which share of the tokens is labelled.
KINDS = {"4bit, some labelled": (True, 0.4), "float, all labelled": (False, 2.0)}


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    """A model, a batch of odd shape, and loss and gradients of plain MLX."""
    name, kind = request.param
    quantized, share = KINDS[kind]
    folder, batch = tmp_path_factory.mktemp(name), random_batch(2, 17, share=share)
    assert batch.mask.all() == (share > 1)
    reference = plain(save(folder, name, quantized))
    with skipped_without_a_kernel():
        loss, gradients = plain_value_and_grad(reference, batch)
    return folder, batch, loss, gradients, resolution(reference, batch)


def kinds_of_segments(ours, monkeypatch):
    """What the passes from now on are made of, filled as they begin."""
    begun, found = ours.walk._new_pass, []

    def watched(*args):
        state = begun(*args)
        parts = [*state.segments, state.tail]
        found.append([type(part).__name__ for part in parts if part is not None])
        return state

    monkeypatch.setattr(ours.walk, "_new_pass", watched)
    return found


# Every architecture meets every segment, and both of them every kind.
CASES = [
    pytest.param((name, kind), segment, marks=() if name in EACH_KIND else pytest.mark.slow)
    for number, name in enumerate(CONFIGS)
    for turn, kind in enumerate(KINDS)
    for place, segment in enumerate(SEGMENTS)
    if (number + place + turn) % 2 == 0
]


@pytest.mark.parametrize(("case", "segment"), CASES, indirect=["case"], ids=str)
def test_gradients_equal_plain_mlx(case, segment, monkeypatch):
    folder, batch, expected_loss, expected, moves = case
    with closing(engine(folder, **SEGMENTS[segment])) as ours:
        kinds = kinds_of_segments(ours, monkeypatch)
        (loss, count), got = ours.value_and_grad(batch)
        alone, _ = ours.loss(batch)
    # Which blocks of an architecture are tiled is tested in `test_tiled.py`; here, that one is.
    assert CONSISTS[segment](kinds[0]), kinds[0]
    assert count == batch.mask.sum()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert alone.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(got, expected, resolution=moves)
