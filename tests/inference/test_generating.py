"""Streamed models answer as mlx-lm does, token for token, in less memory."""

import importlib
import json
import os
from contextlib import closing

import mlx.core as mx
import pytest
from backends import frees_at_once
from mlx_lm import load, stream_generate
from mlx_lm.generate import batch_generate
from tiny import make_adapter, make_model, words, write_rows

from mlx_edgelora import EdgeLoraError
from mlx_edgelora.embedded import MODEL_PATH, held_out_rows
from mlx_edgelora.generate import main
from mlx_edgelora.inference.generating import Sampling, open_generator
from mlx_edgelora.inference.streamed import open_lazy, plan_inference, streamed

PROMPTS = [words(range(9)), words([3, 1, 4, 1, 5]), words(range(30, 70))]
MODELS = {
    "llama": {"quantized": False},
    "qwen3": {},
    "gemma2": {},
    "cohere2": {},
    "qwen3_moe": {},
    "gpt_oss": {"quantized": False},
    "olmo_hybrid": {"quantized": False},
}


def theirs(model, adapter, prompts, count=12):
    loaded, tokenizer = load(str(model), adapter_path=adapter and str(adapter))
    return [
        [
            response.token
            for response in stream_generate(
                loaded, tokenizer, tokenizer.encode(prompt), max_tokens=count
            )
        ]
        for prompt in prompts
    ]


def ours(model, adapter, prompts, budget="min", count=12):
    lazy = open_lazy(str(model), adapter, model / "cache")
    plan = plan_inference(lazy, budget, 1, 64)
    _, tokenizer = load(str(model))
    with closing(streamed(lazy, plan)) as ready:
        return [
            [
                response.token
                for response in stream_generate(
                    ready,
                    tokenizer,
                    tokenizer.encode(prompt),
                    max_tokens=count,
                    prefill_step_size=plan.prefill_step,
                )
            ]
            for prompt in prompts
        ]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_mlx_lm(tmp_path, name):
    model = make_model(tmp_path / "model", name, **MODELS[name])
    assert ours(model, None, PROMPTS) == theirs(model, None, PROMPTS)


@pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_with_an_adapter_and_some_blocks_in_memory(tmp_path, dora):
    model = make_model(tmp_path / "model", "llama", num_hidden_layers=4)
    adapter = make_adapter(tmp_path / "adapter", model, num_layers=4, dora=dora)
    expected = theirs(model, adapter, PROMPTS)
    assert expected != theirs(model, None, PROMPTS)
    lazy = open_lazy(str(model), adapter, tmp_path)
    least = plan_inference(lazy, "min", 1, 64)
    for more in (0, 30_000, 10**6):
        assert ours(model, adapter, PROMPTS, least.peak + more) == expected


def test_many_prompts_are_answered_at_once(tmp_path):
    model = make_model(tmp_path / "model", "qwen3")
    adapter = make_adapter(tmp_path / "adapter", model)
    loaded, tokenizer = load(str(model), adapter_path=str(adapter))
    encoded = [tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = batch_generate(loaded, tokenizer, encoded, max_tokens=9).texts
    with open_generator(str(model), adapter, "min", rows=3, tokens=64, notify=str) as generator:
        assert generator.answers(encoded, Sampling(max_tokens=9)) == expected
        with generator.without_adapter():
            base = generator.answers(encoded, Sampling(max_tokens=9))
    loaded, _ = load(str(model))
    assert base == batch_generate(loaded, tokenizer, encoded, max_tokens=9).texts != expected


def test_answers_of_a_batch_are_the_texts_of_single_ones(tmp_path, monkeypatch):
    """The embedded model's tokenizer begins words with a space, which an answer begins without."""
    rows = [row["prompt"] for row in held_out_rows(2)]
    with open_generator(str(MODEL_PATH), rows=2, tokens=64, notify=str) as generator:
        encoded = [generator.encode([{"role": "user", "content": row}]) for row in rows]
        sampling = Sampling(max_tokens=6)
        single = ["".join(generator.stream(prompt, sampling)) for prompt in encoded]
        assert generator.answers(encoded, sampling) == single
    assert all(text == text.strip() != "" for text in single)


def test_the_peak_while_answers_end_is_the_plans(tmp_path):
    model = make_model(tmp_path / "model", "llama", quantized=False, num_hidden_layers=12)
    plan = plan_inference(open_lazy(str(model), None, tmp_path), "min", 6, 250)
    with open_generator(str(model), None, "min", rows=6, tokens=250, notify=str) as generator:
        encoded = [generator.encode(words([i] * 240)) for i in range(6)]
        ends = {generator.answers([prompt], Sampling(max_tokens=2))[0] for prompt in encoded}
        assert len(ends) > 1
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        tokenizer = generator._tokenizer
        tokenizer.add_eos_token(min(text.split()[1] for text in ends if " " in text))
        generator.answers(encoded, Sampling(max_tokens=4))
    assert mx.get_peak_memory() - before < plan.peak


@frees_at_once
def test_the_peak_is_the_plans(tmp_path):
    model = make_model(
        tmp_path / "model", "llama", quantized=False, num_hidden_layers=12, hidden_size=256
    )
    lazy = open_lazy(str(model), None, tmp_path)
    whole = sum(info.stop - info.start for _, info in lazy.checkpoint.tensors.values())
    plan = plan_inference(lazy, "min", 1, 64)
    del lazy
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with open_generator(str(model), None, "min", tokens=64, notify=str) as generator:
        generator.answers([generator.encode(PROMPTS[0])], Sampling(max_tokens=5))
    peak = mx.get_peak_memory() - before
    assert peak < min(whole / 2, plan.peak)


def test_a_budget_that_is_too_small_is_refused(tmp_path):
    model = make_model(tmp_path / "model", "llama")
    with (
        pytest.raises(EdgeLoraError, match=r"memory_budget: got 1\.00 kB, but .* needs"),
        open_generator(str(model), None, 1000, notify=str),
    ):
        pass


def test_the_command_answers_a_file_of_prompts(tmp_path, capsys):
    model = make_model(tmp_path / "model", "llama")
    adapter = make_adapter(tmp_path / "adapter", model)
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": PROMPTS[0]}, {"messages": [{"role": "user", "content": PROMPTS[1]}]}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows) + PROMPTS[2] + "\n")
    flags = ["--adapter-path", str(adapter), "--memory-budget", "min", "-m", "4"]
    assert main([*flags, "--prompts", str(prompts), "--compare"]) == 0
    printed = capsys.readouterr()
    assert "s for 3 prompts together, an answer of 4 tokens" in printed.err
    found = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["prompt"] for row in found] == PROMPTS
    assert all(set(row) == {"prompt", "base", "adapter"} for row in found)
    assert main([*flags, "--prompt", PROMPTS[0]]) == 0
    assert capsys.readouterr().out.strip() == found[0]["adapter"].strip()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compare"], "--compare: got no --adapter-path"),
        (["--adapter-path", "nowhere"], "nowhere has no adapter_config.json"),
        (["--prompts", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--prompt", "a", "--chat"], "got both"),
        (["--prompt", " "], "expected a prompt or messages"),
        (["--memory-budget", "1KB"], "--memory-budget: got '1KB'"),
        (["--top-p", "1.5"], "--top-p: got 1.5, expected at least 0 and at most 1"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--temp", "nan"], "--temp: got nan"),
        (["--prompts", os.devnull], "is empty, expected a prompt"),
    ],
)
def test_what_is_wrong_is_said(flags, message, capsys):
    assert main(flags) == 2
    assert message in capsys.readouterr().err


def test_a_chat_goes_on_until_an_empty_line(tmp_path, monkeypatch, capsys):
    model = make_model(tmp_path / "model", "llama")
    lines = iter([PROMPTS[1], PROMPTS[0], ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert main(["--model", str(model), "--chat", "-m", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def without_template(model):
    (model / "chat_template.jinja").unlink(missing_ok=True)
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))


def test_without_a_template_a_prompt_is_plain_text(tmp_path, capsys):
    model = make_model(tmp_path / "model", "llama")
    without_template(model)
    flags = ["--model", str(model), "-m", "4", "--prompt", PROMPTS[0]]
    assert main([*flags, "--memory-budget", "min"]) == 0
    streamed = capsys.readouterr().out
    assert main([*flags, "--ignore-chat-template"]) == 0
    assert capsys.readouterr().out == streamed
    assert main([*flags, "--system-prompt", "x"]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_a_template_that_refuses_is_a_sentence(tmp_path, capsys):
    model = make_model(tmp_path / "model", "llama")
    (model / "chat_template.jinja").write_text("{{ raise_exception('no system') }}")
    assert main(["--model", str(model), "--prompt", "w1", "-m", "2"]) == 2
    assert "does not take this conversation (no system)" in capsys.readouterr().err


def test_prompts_are_planned_with_their_tokens(tmp_path, capsys):
    model = make_model(tmp_path / "model", "llama")
    peaks = []
    for count in (5, 5000):
        with open_generator(
            str(model), None, "min", tokens=9, notify=peaks.append, prompts=[words([1] * count)]
        ):
            pass
    assert peaks[0] != peaks[1]


def test_a_model_that_cannot_be_streamed_answers_if_it_fits(tmp_path, monkeypatch, capsys):
    model = make_model(tmp_path / "model", "llama")

    def refuse(model):
        raise EdgeLoraError("no blocks")

    monkeypatch.setattr("mlx_edgelora.inference.streamed.checked_blocks", refuse)
    flags = ["--model", str(model), "--prompt", PROMPTS[0], "-m", "3", "--memory-budget"]
    assert main([*flags, "1GB"]) == 0
    assert main([*flags, "min"]) == 2
    assert "no blocks; so it cannot be read block by block" in capsys.readouterr().err


COMMANDS = "generate", "fuse", "evaluate", "export.__main__"
OTHERS = {
    "base model": ("llama", {"hidden_size": 96}),
    "depth": ("llama", {"num_hidden_layers": 1}),
    "architecture": ("qwen3_moe", {}),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_of_another_model_is_one_sentence(tmp_path, command, other, capsys):
    name, changes = OTHERS[other]
    model = make_model(tmp_path / "model", "llama")
    make_model(tmp_path / "other", name, **changes)
    adapter = make_adapter(tmp_path / "adapter", model)
    check_refused(command, adapter, tmp_path, capsys, "--model", str(tmp_path / "other"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_rank_is_one_sentence(tmp_path, command, capsys):
    model = make_model(tmp_path / "model", "llama")
    adapter = make_adapter(tmp_path / "adapter", model)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    config["lora_parameters"]["rank"] = 3
    path.write_text(json.dumps(config))
    check_refused(command, adapter, tmp_path, capsys)
    # As in an adapter of another program, whose file says nothing of the rank.
    arrays = mx.load(str(adapter / "adapters.safetensors"))
    mx.save_safetensors(str(adapter / "adapters.safetensors"), arrays)
    check_refused(command, adapter, tmp_path, capsys)


def check_refused(command, adapter, folder, capsys, *flags):
    more = {
        "generate": ["--prompt", "w1", "-m", "1"],
        "fuse": ["--save-path", str(folder / "fused")],
        "export.__main__": ["peft", "--save-path", str(folder / "fused")],
        "evaluate": ["--data", str(folder / "test.jsonl")],
    }
    write_rows(folder / "test.jsonl", [{"prompt": "w1", "completion": "w2"}])
    run = importlib.import_module(f"mlx_edgelora.{command}").main
    assert run(["--adapter-path", str(adapter), *flags, *more[command]]) == 2
    (message,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert message.startswith("error: ") and "adapter" in message and len(message) < 600
    assert not (folder / "fused").exists()
