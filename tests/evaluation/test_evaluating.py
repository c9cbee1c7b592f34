"""Losses and answers without and with an adapter, beside those of mlx-lm."""

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from harness import engine, random_batch, save
from mlx.utils import tree_flatten
from mlx_lm import generate, load
from mlx_lm.utils import load_model
from tiny import make_adapter, make_model, words, write_rows

from mlx_edgelora import EdgeLoraError
from mlx_edgelora.evaluate import main
from mlx_edgelora.evaluation.evaluating import evaluate
from mlx_edgelora.evaluation.scores import exact_match, token_f1
from mlx_edgelora.generate import main as generate_command
from mlx_edgelora.model.lora import without_adapter
from mlx_edgelora.training.adapters import save_adapters

ROWS = [{"prompt": words(range(n, n + 5)), "completion": words([n, 7, 3])} for n in range(6)]
PLANS = {
    "streamed": {},
    "in memory": {"streamed": False, "head": "resident", "spilled": False},
    "tiles": {"tile_tokens": 8},
    "paged": {"adapters": "paged"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model, its adapter and a file of test rows, which no test changes."""
    root = tmp_path_factory.mktemp("trained")
    make_model(root / "model", "llama", num_hidden_layers=3, quantized=False)
    make_adapter(root / "adapter", root / "model", num_layers=3)
    write_rows(root / "test.jsonl", ROWS)
    return root


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_both_losses_are_those_of_two_passes(tmp_path, name, plan):
    ours = engine(save(tmp_path, name, False), **PLANS[plan])
    ours.model.eval()
    batch = random_batch()
    adapted, count = ours.loss(batch)
    with without_adapter(ours.model):
        base, _ = ours.loss(batch)
    found = ours.base_and_adapted_loss(batch)
    assert found[2] == count
    assert [loss.item() for loss in found[:2]] == [base.item(), adapted.item()]
    assert abs(base.item() - adapted.item()) > 1e-4


def test_both_losses_where_blocks_are_compiled(tmp_path, compiles):
    """Functions are compiled by the scale, too, which both sides do not share."""
    ours = engine(save(tmp_path, "llama", False, num_hidden_layers=2), compiled=True)
    ours.model.eval()
    batch = random_batch()
    adapted, _ = ours.loss(batch)
    base, again, _ = ours.base_and_adapted_loss(batch)
    assert abs(again.item() - adapted.item()) < 1e-5 < abs(base.item() - adapted.item())


def test_weights_are_read_once_for_both(tmp_path):
    ours, read = engine(save(tmp_path, "llama", True)), []
    for measure in (ours.loss, ours.base_and_adapted_loss):
        before = ours.disk.read_bytes
        measure(random_batch())
        read.append(ours.disk.read_bytes - before)
    head = sum(array.nbytes for array in ours.head.slice(0, ours.head.vocabulary).values())
    assert read[1] < read[0] + 3 * head < 2 * read[0]


def loss_of(model, tokenizer, rows):
    """Mean loss of the tokens of the answers, by plain MLX."""
    losses = []
    for row in rows:
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        tokens = tokenizer.apply_chat_template(messages, return_dict=False)
        prompt = tokenizer.apply_chat_template(
            messages[:1], add_generation_prompt=True, return_dict=False
        )
        row_tokens = mx.array(tokens)[None]
        each = nn.losses.cross_entropy(model(row_tokens[:, :-1]), row_tokens[:, 1:])
        losses.append(each[0, len(prompt) - 1 :])
    return mx.concatenate(losses).mean().item()


def with_masked_prompts(adapter):
    """Let the adapter be one that was trained on answers only."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_prompt": True}))
    return adapter


def make_full(folder, model):
    """The result of a full fine-tuning of the last block."""
    loaded, _ = load_model(model, lazy=True)
    loaded.freeze()
    loaded.layers[-1].unfreeze()
    mx.random.seed(0)
    weights = {
        name: value + 0.1 * mx.random.normal(value.shape)
        for name, value in tree_flatten(loaded.trainable_parameters())
    }
    options = {"fine_tune_type": "full", "num_layers": 1, "lora_parameters": None}
    save_adapters(folder, weights, options | {"model": str(model)})
    return folder


@pytest.mark.parametrize(
    ("kind", "budget"), [("lora", "min"), ("lora", None), ("dora", "min"), ("full", "min")]
)
def test_figures_and_answers_are_those_of_mlx_lm(trained, kind, budget, tmp_path, capsys):
    adapter, file = trained / "adapter", tmp_path / "answers.jsonl"
    if kind == "dora":
        adapter = make_adapter(tmp_path / kind, trained / "model", num_layers=3, dora=True)
    elif kind == "full":
        adapter = make_full(tmp_path / kind, trained / "model")
    with_masked_prompts(adapter)
    options = {"num_samples": 3, "max_tokens": 5, "memory_budget": budget, "save_path": file}
    found = evaluate(adapter, data=str(trained / "test.jsonl"), notify=str, **options)
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert written == found.rows and len(written) == 3
    for side, path in (("base", None), ("adapter", str(adapter))):
        model, tokenizer = load(str(trained / "model"), adapter_path=path)
        assert abs(getattr(found, f"{side}_loss") - loss_of(model, tokenizer, ROWS)) < 1e-5
        for row, asked in zip(written, ROWS, strict=False):
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": asked["prompt"]}], add_generation_prompt=True
            )
            answer = generate(model, tokenizer, prompt, max_tokens=5)
            assert row[side]["answer"] == answer
            assert row["expected"] == asked["completion"]
    assert abs(found.base_loss - found.adapter_loss) > 1e-3
    prompts = tmp_path / "prompts.jsonl"
    write_rows(prompts, [{"prompt": row["prompt"]} for row in ROWS[:3]])
    flags = ["--prompts", prompts, "--adapter-path", adapter, "--compare", "--max-tokens", 5]
    assert generate_command([*map(str, flags), "--memory-budget", "min"]) == 0
    compared = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, own in zip(compared, written, strict=True):
        assert row["base"] == own["base"]["answer"] and row["adapter"] == own["adapter"]["answer"]
    assert found.tokens == sum(len(row["completion"].split()) + 1 for row in ROWS)


def test_the_command_prints_a_table_of_80_columns(trained, capsys):
    flags = ["--adapter-path", str(trained / "adapter"), "--data", str(trained / "test.jsonl")]
    assert main([*flags, "--num-samples", "2", "--max-tokens", "70"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for name in ("loss", "perplexity", "exact match", "token F1", "expected", "base", "adapter"):
        assert name in out
    assert main([*flags, "--num-samples", "0"]) == 0
    assert "token F1" not in capsys.readouterr().out


def test_rows_of_plain_text_have_losses_only(trained, tmp_path, capsys):
    write_rows(tmp_path / "text.jsonl", [{"text": words(range(9))}])
    adapter = make_adapter(tmp_path / "adapter", trained / "model")
    assert main(["--adapter-path", str(adapter), "--data", str(tmp_path / "text.jsonl")]) == 0
    assert "no row of the test set ends with an answer" in capsys.readouterr().out


def test_scores():
    assert exact_match(" a b\n", "a b") and not exact_match("a b", "a  b")
    assert token_f1("The cat sat.", "the cat") == pytest.approx(0.8)
    assert token_f1("x x", "x") == pytest.approx(2 / 3)
    assert token_f1("y", "x") == 0 and token_f1("", "") == 1 and token_f1("", "x") == 0
    assert token_f1("+", "+") == 1


def edit(config, **changes):
    path = config / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "flags", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), [], "is not the folder of an"),
        (lambda folder: edit(folder, fine_tune_type="ia3"), [], "fine_tune_type"),
        (lambda folder: edit(folder, num_layers=1), [], "but adapter_config.json says"),
        (lambda folder: None, ["--num-samples", "-1"], "num_samples: got -1"),
        (lambda folder: None, ["--max-tokens", "0"], "max_tokens: got 0"),
        (lambda folder: None, ["--batch-size", "0"], "batch_size: got 0"),
        (lambda folder: None, ["--num-samples", "0", "--save-path", "a"], "it has no rows"),
        (lambda folder: None, ["--data", "nowhere/at/all"], "does not exist"),
        (lambda folder: None, ["--memory-budget", "1MB"], "memory_budget"),
    ],
)
def test_what_is_wrong_is_said(trained, tmp_path, capsys, damage, flags, message):
    adapter = make_adapter(tmp_path / "adapter", trained / "model", num_layers=3)
    damage(adapter)
    wanted = ["--adapter-path", str(adapter), "--data", str(trained / "test.jsonl"), *flags]
    assert main(wanted) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "does not fit the model"),
        ({"num_hidden_layers": 2}, "does not fit the model"),
    ],
)
def test_another_base_model_is_refused(trained, tmp_path, capsys, changes, message):
    make_model(tmp_path / "other", "llama", quantized=False, **{"num_hidden_layers": 3} | changes)
    flags = ["--adapter-path", str(trained / "adapter"), "--data", str(trained / "test.jsonl")]
    assert main([*flags, "--model", str(tmp_path / "other")]) == 2
    assert message in capsys.readouterr().err


def test_without_a_template_it_says_so(trained, tmp_path, capsys):
    make_model(tmp_path / "model", "llama", num_hidden_layers=3, quantized=False)
    (tmp_path / "model/chat_template.jinja").unlink()
    flags = ["--adapter-path", str(trained / "adapter"), "--data", str(trained / "test.jsonl")]
    assert main([*flags, "--model", str(tmp_path / "model")]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_a_full_disk_leaves_the_file_of_before(trained, tmp_path, monkeypatch):
    file = tmp_path / "answers.jsonl"
    file.write_text("before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(EdgeLoraError, match="No space left"):
        evaluate(
            trained / "adapter",
            data=str(trained / "test.jsonl"),
            num_samples=1,
            max_tokens=1,
            save_path=file,
            notify=str,
        )
    assert file.read_text() == "before"


def test_without_an_adapter_in_its_folder_it_says_what_makes_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    assert "mlx-edgelora train makes one" in capsys.readouterr().err
