"""The model and the data sets of the package, and a comparison of answers before and after tuning.

Both are made by `examples/make_embedded_model.py`. The base model was trained on a small generated
English. The data set teaches it a new task: to turn a sentence into a record. The set of
preferences has pairs of answers, of which the one in the active voice is preferred.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import mlx.nn as nn
from mlx_lm import generate, load
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_edgelora.errors import EdgeLoraError

ASSETS_PATH = Path(__file__).resolve().parent / "assets"
MODEL_PATH = ASSETS_PATH / "model"
DATA_PATH = ASSETS_PATH / "data"
PREFERENCES_PATH = ASSETS_PATH / "preferences"
DEFAULT_CONFIG = ASSETS_PATH / "default.yaml"

MAX_TOKENS = 32
"""Tokens an answer may have; the records of the data set have 16."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt answered by the base and the tuned model, and the share of exact answers of each.

    Attributes:
        prompt: the prompt.
        expected: the expected answer.
        before: the base model's answer.
        after: the tuned model's answer.
        exact_match_before: fraction of held-out rows that the base model answers exactly.
        exact_match_after: fraction of held-out rows that the tuned model answers exactly.
        count: number of held-out rows.
    """

    prompt: str
    expected: str
    before: str
    after: str
    exact_match_before: float
    exact_match_after: float
    count: int

    def __str__(self) -> str:
        """Return the comparison as lines for a terminal."""
        return (
            f"prompt    {self.prompt}\n"
            f"expected  {self.expected}\n"
            f"before    {self.before}\n"
            f"after     {self.after}\n"
            f"exact match on {self.count} held-out rows: "
            f"{self.exact_match_before:.0%} before, {self.exact_match_after:.0%} after"
        )


def held_out_rows(count: int) -> list[dict[str, str]]:
    """Return the first `count` held-out rows, each with "prompt" and "completion".

    Raises:
        EdgeLoraError: `count` is below 1.
    """
    if count < 1:
        raise EdgeLoraError(
            f"count is {count} where held-out rows are asked for; give a number of at least 1."
        )
    with (DATA_PATH / "test.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, count)]


def answer(model: nn.Module, tokenizer: TokenizerWrapper, prompt: str, max_tokens: int) -> str:
    """Return the model's greedy answer to a user's prompt, of at most `max_tokens` tokens."""
    messages = [{"role": "user", "content": prompt}]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return generate(model, tokenizer, tokens, max_tokens=max_tokens).strip()


def exact_match(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    rows: Sequence[dict[str, str]],
    max_tokens: int,
) -> float:
    """Return the fraction of rows that the model answers exactly with their completion.

    Raises:
        EdgeLoraError: `rows` is empty.
    """
    if not rows:
        raise EdgeLoraError(
            "exact_match got no rows where it needs at least one; give it rows with a prompt "
            "and a completion."
        )
    right = sum(
        answer(model, tokenizer, row["prompt"], max_tokens) == row["completion"].strip()
        for row in rows
    )
    return right / len(rows)


def demonstrate(adapter_path: Path | str, count: int = 40) -> Demonstration:
    """Compare the embedded model with and without the adapter, on `count` held-out rows.

    Both models are loaded and run by mlx-lm alone, so a right answer also shows that mlx-lm can
    use the adapter.

    Raises:
        EdgeLoraError: `adapter_path` lacks a file of an adapter, or `count` is below 1.
    """
    for name in ("adapter_config.json", "adapters.safetensors"):
        if not (Path(adapter_path) / name).is_file():
            raise EdgeLoraError(
                f"{adapter_path} has no {name} where an adapter folder needs one; give the "
                "adapter_path of a finished training run."
            )
    rows = held_out_rows(count)
    prompt = rows[0]["prompt"]
    results = []
    for adapter in (None, str(adapter_path)):
        model, tokenizer = load(str(MODEL_PATH), adapter_path=adapter)
        score = exact_match(model, tokenizer, rows, MAX_TOKENS)
        results.append((answer(model, tokenizer, prompt, MAX_TOKENS), score))
    (before, score_before), (after, score_after) = results
    return Demonstration(
        prompt=prompt,
        expected=rows[0]["completion"],
        before=before,
        after=after,
        exact_match_before=score_before,
        exact_match_after=score_after,
        count=len(rows),
    )
