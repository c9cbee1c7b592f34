"""Answers during a run: mlx-lm's, within the budget, and without a trace in training."""

import json

import pytest
from mlx_lm import generate, load
from tiny import make_data, make_model, run_options, words, write_rows

from mlx_edgelora import EdgeLoraError, LoraParameters, TrainConfig, finetune
from mlx_edgelora.config.command_line import config_from_cli
from mlx_edgelora.report.page import page
from mlx_edgelora.report.run import read_run

PROMPTS = [words(range(9)), words([3, 1, 4])]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model that is not quantized, whose products are those of mlx-lm to the last bit."""
    root = tmp_path_factory.mktemp("plain")
    make_model(root / "model", "llama", quantized=False, num_hidden_layers=3)
    make_data(root / "data")
    return root


def run(tiny, folder, notify=str, **options):
    base = run_options(tiny, folder) | {"learning_rate": 1e-2, "verify": "off", "iters": 3}
    result = finetune(TrainConfig(**base | options), notify=notify)
    return result, (folder / "adapters/adapters.safetensors").read_bytes()


@pytest.mark.parametrize("budget", ["min", None], ids=str)
def test_training_is_the_same_to_the_last_bit(plain, tmp_path, budget):
    options = {"memory_budget": budget, "lora_parameters": LoraParameters(dropout=0.2)}
    _, expected = run(plain, tmp_path / "without", **options)
    options |= {"sample_every": 1, "sample_prompts": PROMPTS, "sample_tokens": 5}
    _, found = run(plain, tmp_path / "with", **options)
    assert found == expected


@pytest.mark.parametrize("budget", ["min", None], ids=str)
def test_answers_are_those_of_mlx_lm(plain, tmp_path, capsys, budget):
    log = tmp_path / "run.jsonl"
    options = {"sample_every": 2, "sample_prompts": PROMPTS, "sample_tokens": 6, "log": str(log)}
    run(plain, tmp_path, memory_budget=budget, **options)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    samples = [record["samples"] for record in records if "samples" in record]
    assert [record["step"] for record in samples] == [0, 2, 3]
    expected = {}
    for name, adapter in (("before", None), ("now", str(tmp_path / "adapters"))):
        model, tokenizer = load(str(plain / "model"), adapter_path=adapter)
        expected[name] = [
            generate(model, tokenizer, encoded(tokenizer, prompt), max_tokens=6)
            for prompt in PROMPTS
        ]
    assert expected["before"] != expected["now"]
    for name, answers in expected.items():
        assert [row[name] for row in samples[-1]["answers"]] == answers
    assert "step 3      " in capsys.readouterr().out
    html = page(read_run(log.read_bytes().splitlines(), "run.jsonl"))
    assert "Answers during training" in html and "step 3" in html


def encoded(tokenizer, prompt):
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)


@pytest.mark.slow
def test_the_budget_is_kept(tmp_path, memory):
    """With caches of thousands of tokens for every prompt it would not be."""
    wide = {"hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 512}
    make_model(tmp_path / "model", "llama", quantized=False, **wide)
    make_data(tmp_path / "data")
    options = {"memory_budget": "18MB", "sample_every": 3}
    result, _ = run(tmp_path, tmp_path, sample_prompts=PROMPTS * 4, sample_tokens=40, **options)
    assert result.peak_memory_bytes <= 18e6
    with pytest.raises(EdgeLoraError, match="sample_every: an answer of 9999 tokens needs"):
        run(tmp_path, tmp_path / "b", sample_prompts=PROMPTS, sample_tokens=9999, **options)


def test_prompts_come_from_a_file_or_from_the_data(tmp_path):
    make_model(tmp_path / "model", "llama", quantized=False)
    (tmp_path / "data").mkdir()
    rows = [{"prompt": prompt, "completion": words([7])} for prompt in PROMPTS]
    write_rows(tmp_path / "data/train.jsonl", [{"prompt": words([9]), "completion": "w1"}, *rows])
    write_rows(tmp_path / "data/valid.jsonl", rows)
    asked = tmp_path / "asked.txt"
    asked.write_text(f"{PROMPTS[1]}\n\n{json.dumps({'prompt': PROMPTS[0]})}\n")
    for number, (options, expected) in enumerate(
        [
            ({}, [words([9]), PROMPTS[0]]),
            ({"val_batches": 1}, PROMPTS),
            ({"sample_prompts": [str(asked), words([5])]}, [*PROMPTS[::-1], words([5])]),
        ]
    ):
        log = tmp_path / f"{number}.jsonl"
        options |= {"sample_every": 9, "sample_tokens": 1, "log": str(log), "iters": 1}
        run(tmp_path, tmp_path / str(number), **options)
        records = [json.loads(line) for line in log.read_text().splitlines()]
        (*_, last) = [record["samples"] for record in records if "samples" in record]
        assert [row["prompt"] for row in last["answers"]] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_prompts": PROMPTS}, "sample_prompts: got .* without sample_every"),
        ({"sample_tokens": 3}, "sample_tokens: got 3 without sample_every"),
        ({"sample_every": 3, "test": True}, "sample_every: got 3 without training"),
        ({"sample_every": 0}, "sample_every: got 0"),
        ({"sample_every": 1, "sample_prompts": [" "]}, "sample_prompts: got ' ', expected a"),
        ({"sample_every": 1}, "the data have no prompts with an answer"),
    ],
)
def test_what_is_wrong_is_said(tiny, tmp_path, options, message):
    with pytest.raises(EdgeLoraError, match=message):
        run(tiny, tmp_path, **options)
    assert not (tmp_path / "adapters").exists()


def test_the_command_line_takes_several_prompts():
    config = config_from_cli(["--sample-every", "5", "--sample-prompts", "a b", "c"])
    assert config.sample_prompts == ("a b", "c")
    assert TrainConfig.from_dict(config.to_dict()) == config
