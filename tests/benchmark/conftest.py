import os
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_edgelora.benchmark.contenders import contenders
from mlx_edgelora.benchmark.job import TrainingJob
from mlx_edgelora.benchmark.results import TOLERANCES
from mlx_edgelora.benchmark.rounds import Comparison
from mlx_edgelora.benchmark.rows import synthetic_rows, tokenizer_of, words_for, write_rows
from mlx_edgelora.benchmark.run import write_start
from mlx_edgelora.benchmark.shapes import SHAPES, add_tokenizer, checkpoint
from mlx_edgelora.model.loading import open_model

CHEATS = (
    "cheats:honest",
    "cheats:trains_nothing",
    "cheats:skips_the_optimizer",
    "cheats:reports_a_promise",
    "cheats:updates_later",
    "cheats:vanishes",
    "stale:run",
)


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """Three steps on two rows of a block of the small shape."""
    root = tmp_path_factory.mktemp("benchmark")
    model = checkpoint(root, "small", 1, "float32")
    add_tokenizer(model, SHAPES["small"][-1])
    rows = synthetic_rows(tokenizer_of(model), 4, 64, 0.5, words_for(model))
    masked = write_rows(root / "data", rows)
    start = root / "start.safetensors"
    mx.random.seed(0)
    lazy = open_model(str(model), streamed=False, quantize=None, cache=root)
    write_start(lazy, 4, start)
    return TrainingJob(
        model=str(model),
        data=str(root / "data"),
        start=str(start),
        context=64,
        batch=2,
        steps=3,
        rank=4,
        scale=20.0,
        learning_rate=1e-4,
        mask_prompt=masked,
        last=3,
        output=str(root / "out"),
    )


@pytest.fixture(scope="session")
def compared(job, tmp_path_factory):
    """Results by name: mlx-lm's, some of this package's and those of all cheats."""
    wanted = (
        "mlx-lm",
        "mlx-lm, checkpointing",
        *CHEATS,
        "mlx-edgelora, no limit",
        "mlx-edgelora, min",
    )
    rivals = [rival for rival in contenders(also=CHEATS) if rival.name in wanted]
    folder, here = tmp_path_factory.mktemp("compared"), str(Path(__file__).parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
        tolerance = TOLERANCES["float32"]
        results = Comparison(job, folder, tolerance, lambda line: None).run(rivals)
    return {result.name: result for result in results}
