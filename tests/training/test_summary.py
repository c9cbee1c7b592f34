"""The header of a run."""

from dataclasses import replace
from pathlib import Path

import pytest

from mlx_edgelora.config import config_from_cli
from mlx_edgelora.config.yaml_file import read_yaml
from mlx_edgelora.embedded import DEFAULT_CONFIG
from mlx_edgelora.model.tokenizer import load_tokenizer_of
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.training import opening, summary


@pytest.fixture(scope="module")
def embedded():
    config = opening.with_embedded(config_from_cli([], preset=read_yaml(DEFAULT_CONFIG)))
    lazy = opening.adapted_model(config)
    sets = opening.read_sets(config, load_tokenizer_of(lazy), lazy.vocabulary, lambda line: None)
    return config, lazy, sets


def test_facts_of_the_embedded_run(embedded):
    assert summary.lines(summary.facts(*embedded)).splitlines() == [
        "model      the tiny model of this package (4 blocks, 1.15 M parameters, 4-bit)",
        "data       800 rows for training, 64 rows for validation",
        "tokens     22,519, 57 % of them labels; longest row 31 tokens",
        "batches    100 an epoch, of 8 rows; 15 % of their tokens are padding",
        "adapters   rank 8 on all 4 blocks; trainable 7.3 % (83,968 of 1.15 M)",
        "optimizer  adamw, learning rate 0.0003; 50 steps of 8 rows",
    ]


def test_lines_about_rows_follow_those_about_data(embedded):
    lines = summary.lines(summary.facts(*embedded, ["text (text)", "no valid set"]))
    assert lines.splitlines()[2] == "rows       text (text); no valid set"


def test_long_lines_go_on_below(embedded, monkeypatch):
    config, lazy, sets = embedded
    monkeypatch.setattr(Path, "home", lambda: Path("/home/someone"))
    place = f"/home/someone/{'a/long folder of data/' * 4}"
    facts = summary.facts(replace(config, data=place), lazy, sets)
    lines = summary.lines(facts).splitlines()
    assert lines[1].startswith("data       ~/a/long folder")
    assert lines[2].startswith(" " * summary.NAMES) and max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (Plan(streamed_blocks=0, head="resident", kept_blocks=4), "weights in memory; activations"),
        (
            Plan(streamed_blocks=1, kept_blocks=2, adapters="paged"),
            "weights 1 of 4 blocks from disk, 3 in memory; embedding and head from disk; "
            "activations 2 of 4 blocks recomputed, 2 kept; block inputs and adapters in a "
            "scratch file",
        ),
        (
            Plan(tile_tokens=256, inputs="memory", micro_batches=2),
            "weights from disk; activations recomputed; 256 tokens at a time; batches in 2 parts",
        ),
    ],
    ids=["kept", "some", "tiles"],
)
def test_a_plan_in_a_sentence(plan, expected):
    assert plan.summary(4).startswith(expected)
