"""The embedded model, its data and the script that makes them."""

import importlib.util
import json
from pathlib import Path

import mlx.core as mx
import pytest
import yaml
from mlx_lm import load
from mlx_lm.utils import get_total_parameters

from mlx_edgelora import embedded
from mlx_edgelora.errors import EdgeLoraError

SCRIPT = Path(__file__).parent.parent / "examples" / "make_embedded_model.py"
SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def base(no_network):
    return load(str(embedded.MODEL_PATH))


@pytest.fixture(scope="module")
def no_network():
    """Make every attempt to connect an error."""
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*args, **kwargs):
            raise AssertionError(f"a network connection was tried: {args}")

        patch.setattr("socket.socket.connect", refuse)
        yield


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_embedded_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_rows(split):
    lines = (embedded.DATA_PATH / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_config():
    return yaml.safe_load(embedded.DEFAULT_CONFIG.read_text(encoding="utf-8"))


def write_adapter(folder, scale):
    """Write an adapter that was never trained: random in both of its matrices."""
    mx.random.seed(0)
    parameters = {"rank": 2, "scale": scale, "dropout": 0.0, "keys": ["mlp.down_proj"]}
    weights = {}
    for block in range(4):
        name = f"model.layers.{block}.mlp.down_proj"
        weights[f"{name}.lora_a"] = mx.random.normal((256, 2))
        weights[f"{name}.lora_b"] = mx.random.normal((2, 192))
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def as_messages(row):
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]


def test_the_assets_are_small():
    size = sum(path.stat().st_size for path in embedded.ASSETS_PATH.rglob("*") if path.is_file())
    assert 500_000 < size <= 4_000_000


def test_the_model_is_a_quantized_llama_of_one_to_three_million_parameters(base):
    model, _ = base
    config = json.loads((embedded.MODEL_PATH / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llama"
    assert config["quantization"]["bits"] == 4
    assert 1_000_000 <= get_total_parameters(model) <= 3_000_000


def test_the_base_model_knows_its_language_but_not_the_task(base):
    model, tokenizer = base
    question = "Maria bought 12 apples in Paris. How many apples did Maria buy?"
    assert embedded.answer(model, tokenizer, question, 16) == "Maria bought 12 apples."
    rows = embedded.held_out_rows(10)
    assert embedded.exact_match(model, tokenizer, rows, embedded.MAX_TOKENS) < 0.2


def test_exact_match_counts_the_right_answers(base):
    model, tokenizer = base
    prompt = "Maria bought 12 apples in Paris. What is the city?"
    right = {"prompt": prompt, "completion": embedded.answer(model, tokenizer, prompt, 16)}
    wrong = {"prompt": prompt, "completion": right["completion"] + " Yes."}
    assert embedded.exact_match(model, tokenizer, [right, wrong, wrong, wrong], 16) == 0.25


def test_exact_match_refuses_no_rows(base):
    with pytest.raises(EdgeLoraError, match="exact_match got no rows"):
        embedded.exact_match(*base, [], 16)


def test_every_row_fits_and_its_prompt_is_a_prefix(base):
    _, tokenizer = base
    limit = read_config()["max_seq_length"]
    for row in (row for split in SPLITS for row in read_rows(split)):
        messages = as_messages(row)
        whole = tokenizer.apply_chat_template(messages)
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)
        assert whole[: len(prompt)] == prompt
        assert whole[-1] == tokenizer.eos_token_id
        assert len(whole) <= limit
        assert len(whole) - len(prompt) <= embedded.MAX_TOKENS


def test_no_row_is_in_two_splits_and_test_entities_are_new():
    prompts = {split: [row["prompt"] for row in read_rows(split)] for split in SPLITS}
    every = [prompt for split in SPLITS for prompt in prompts[split]]
    assert len(set(every)) == len(every) >= 1000
    records = {split: [row["completion"] for row in read_rows(split)] for split in SPLITS}
    for field in (0, 1):  # name and city
        entities = {s: {r.split("; ")[field] for r in records[s]} for s in SPLITS}
        assert not entities["test"] & (entities["train"] | entities["valid"])


@pytest.mark.parametrize("kind", ["rows", "preferences"])
def test_the_script_reproduces_the_data_byte_for_byte(kind, script, tmp_path):
    script.write_data(tmp_path, getattr(script, f"make_{kind}")())
    expected = {"rows": embedded.DATA_PATH, "preferences": embedded.PREFERENCES_PATH}[kind]
    for split in SPLITS:
        name = f"{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (expected / name).read_bytes()


def test_another_seed_gives_other_data(script):
    assert script.make_rows(1)["test"] != script.make_rows(0)["test"]


def test_the_script_reproduces_the_tokenizer(script, base):
    _, tokenizer = base
    assert script.make_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_the_default_config_names_no_path():
    config = read_config()
    assert not {"model", "data", "adapter_path"} & set(config)
    assert config["num_layers"] == -1 and config["mask_prompt"] is True


def test_demonstrate_wants_an_adapter(tmp_path):
    with pytest.raises(EdgeLoraError, match=r"has no adapter_config\.json"):
        embedded.demonstrate(tmp_path)


def test_demonstrate_wants_rows(tmp_path):
    write_adapter(tmp_path, scale=0.0)
    with pytest.raises(EdgeLoraError, match="count is 0"):
        embedded.demonstrate(tmp_path, count=0)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_demonstrate_compares_with_and_without_the_adapter(tmp_path, scale):
    write_adapter(tmp_path, scale)
    shown = embedded.demonstrate(tmp_path, count=2)
    row = embedded.held_out_rows(1)[0]
    assert (shown.prompt, shown.expected) == (row["prompt"], row["completion"])
    assert (shown.exact_match_before, shown.count) == (0.0, 2)
    assert (shown.before == shown.after) == (scale == 0.0)


def test_demonstration_prints_both_answers():
    text = str(embedded.Demonstration("p?", "e!", "b!", "a!", 0.0, 0.875, 40))
    assert "before    b!" in text
    assert "after     a!" in text
    assert "on 40 held-out rows: 0% before, 88% after" in text
