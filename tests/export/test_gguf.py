"""GGUF files: read back with the `gguf` library, and run by llama.cpp where it is installed."""

import json
import sys

import mlx.core as mx
import numpy as np
import pytest
from bytes_tokenizer import VOCABULARY, write_tokenizer
from harness import save
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
from test_peft import make_dora
from tiny import make_adapter
from tokenizers import Regex, pre_tokenizers

from mlx_edgelora import EdgeLoraError
from mlx_edgelora.export.__main__ import main
from mlx_edgelora.export.gguf_arch import ARCHITECTURES
from mlx_edgelora.export.gguf_files import export_gguf, write_model
from mlx_edgelora.export.gguf_vocab import _BY_PATTERN

gguf = pytest.importorskip("gguf")
WIDE = {"hidden_size": 64, "vocab_size": VOCABULARY, "intermediate_size": 96}
PLAIN_EXPERTS = {"mlp_only_layers": [], "decoder_sparse_step": 1}
# What differs from the tiny models of other tests.
MODELS = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "phi3": {"tie_word_embeddings": False},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": PLAIN_EXPERTS,
    "qwen2_moe": PLAIN_EXPERTS
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
}
PROMPT = [40, 257, 3, 77, 120, 256, 9]
STEPS = 12
PRINTABLE = 94  # tokens before this one; others may be parts of a character


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Make a tiny model with a tokenizer of llama.cpp's kinds, and an adapter of it."""

    def make(name, keys=None, quantized=False, **changes):
        import architectures

        known = "llama" if name == "mistral" else name
        if known not in architectures.CONFIGS:
            monkeypatch.setitem(architectures.CONFIGS, known, {})
        changes = WIDE | MODELS.get(name, {}) | changes
        model = tmp_path / "model"
        model.mkdir()
        save(model, known, quantized, **changes)
        if name == "mistral":
            file = model / "config.json"
            settings = json.loads(file.read_text()) | {"model_type": name}
            file.write_text(json.dumps(settings))
        write_tokenizer(model)
        return model, make_adapter(tmp_path / "adapter", model, keys)

    return make


def read(file):
    """The tensors of a file as floats, and its fields."""
    reader = gguf.GGUFReader(file)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def merged(model, adapter):
    """The parameters of a model with its adapter merged in, unpacked."""
    from mlx.utils import tree_unflatten
    from mlx_lm.utils import dequantize_model

    loaded, _ = load_model(model)
    load_adapters(loaded, str(adapter))
    parts = [(n, m.fuse(dequantize=True)) for n, m in loaded.named_modules() if hasattr(m, "fuse")]
    loaded.update_modules(tree_unflatten(parts))
    return {
        name: np.array(array.astype(mx.float32))
        for name, array in tree_flatten(dequantize_model(loaded).parameters())
    }


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_merged_model_is_read_back(make, tmp_path, outtype, quantized):
    model, adapter = make("llama", quantized=quantized)
    file = export_gguf(adapter, tmp_path / "out", fused=True, outtype=outtype, notify=str)
    found, fields = read(file)
    expected = merged(model, adapter)
    assert len(found) == len(expected) + 1  # rope_freqs
    tolerance = {"f32": 0, "f16": 1e-3, "bf16": 4e-3, "q8_0": 2e-2}[outtype]

    def same(theirs, ours):
        scale = np.abs(ours).max()
        np.testing.assert_allclose(found[theirs], ours, rtol=0, atol=tolerance * scale)

    same("token_embd.weight", expected["model.embed_tokens.weight"])
    same("output.weight", expected["lm_head.weight"])
    same("output_norm.weight", expected["model.norm.weight"])
    for block in range(3):
        ours = f"model.layers.{block}"
        same(f"blk.{block}.ffn_down.weight", expected[f"{ours}.mlp.down_proj.weight"])
        same(f"blk.{block}.attn_v.weight", expected[f"{ours}.self_attn.v_proj.weight"])
        # llama.cpp rotates rows 2i and 2i + 1 of a head, the checkpoint i and i + 8.
        q = expected[f"{ours}.self_attn.q_proj.weight"]
        rows = [16 * head + i + 8 * odd for head in range(4) for i in range(8) for odd in (0, 1)]
        same(f"blk.{block}.attn_q.weight", q[rows])
        k = expected[f"{ours}.self_attn.k_proj.weight"]
        same(f"blk.{block}.attn_k.weight", k[rows[:32]])
    assert fields["general.architecture"] == "llama" and fields["llama.block_count"] == 3
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.tokens"][257] == "the"
    assert len(fields["tokenizer.ggml.tokens"]) == VOCABULARY
    assert fields["tokenizer.ggml.merges"] == ["h e", "t he"]


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_is_read_back(make, tmp_path, name):
    model, adapter = make(name)
    file = export_gguf(adapter, tmp_path / "out", notify=str)
    found, fields = read(file)
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["adapter.lora.alpha"] == 12  # scale 3 x rank 4
    ours = {k: np.array(v) for k, v in mx.load(str(adapter / "adapters.safetensors")).items()}
    assert len(found) == len(ours)
    base(tmp_path, model)
    whole, _ = read(tmp_path / "base/model.gguf")
    for theirs, array in found.items():
        tensor, _, leaf = theirs.rpartition(".")
        shape = np.atleast_2d(whole[tensor]).shape
        assert array.shape == (
            (*shape[:-2], 4, shape[-1]) if leaf == "lora_a" else (*shape[:-1], 4)
        )
    at = "model.layers.1.self_attn.o_proj.lora_b"
    np.testing.assert_array_equal(found["blk.1.attn_output.weight.lora_b"], ours[at].T)


def base(tmp_path, model):
    (tmp_path / "base").mkdir()
    write_model(tmp_path / "base/model.gguf", None, str(model), "f32", str)


def by_mlx_lm(model, adapter=None):
    """The next tokens that are printable, and their logarithmic probabilities."""
    loaded, _ = load_model(model)
    if adapter is not None:
        load_adapters(loaded, str(adapter))
    loaded.eval()
    tokens, scores = list(PROMPT), []
    for _ in range(STEPS):
        logits = loaded(mx.array([tokens]))[0, -1]
        tokens.append(mx.argmax(logits[:PRINTABLE]).item())
        scores.append((logits[tokens[-1]] - mx.logsumexp(logits)).item())
    return tokens[len(PROMPT) :], scores


def by_llama_cpp(file, lora=None):
    """As `by_mlx_lm`, computed by the llama.cpp that a package ships."""
    runtime = pytest.importorskip("xllamacpp")
    parameters = runtime.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 256, 1, 0
    parameters.cpuparams.n_threads = 1
    parameters.warmup = parameters.fit_params = False
    parameters.cache_type_k = parameters.cache_type_v = runtime.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = runtime.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        parameters.lora_adapters = [runtime.CommonAdapterLoraInfo(str(lora), 1.0)]
    request = {"prompt": PROMPT, "n_predict": STEPS, "temperature": 0, "n_probs": 1}
    request["logit_bias"] = [[token, False] for token in range(PRINTABLE, VOCABULARY)]
    answer = runtime.Server(parameters).handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    steps = answer["choices"][0]["logprobs"]["content"]
    return [step["id"] for step in steps], [step["logprob"] for step in steps]


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_goes_on_with_the_same_tokens(make, tmp_path, name):
    """The base model, the base model with the adapter, and the merged one."""
    model, adapter = make(name)
    base(tmp_path, model)
    lora = export_gguf(adapter, tmp_path / "lora", notify=str)
    fused = export_gguf(adapter, tmp_path / "fused", fused=True, outtype="f32", notify=str)
    before, after = by_mlx_lm(model), by_mlx_lm(model, adapter)
    assert before[0] != after[0] or abs(before[1][0] - after[1][0]) > 0.1
    for kind, found, expected in (
        ("base", by_llama_cpp(tmp_path / "base/model.gguf"), before),
        ("lora", by_llama_cpp(tmp_path / "base/model.gguf", lora), after),
        ("fused", by_llama_cpp(fused), after),
    ):
        assert found[0] == expected[0], kind
        np.testing.assert_allclose(found[1], expected[1], atol=2e-3, rtol=0, err_msg=kind)


def test_the_peak_is_a_few_tensors(make, tmp_path):
    model, adapter = make("llama", num_hidden_layers=12)
    whole = sum((model / "model.safetensors").stat().st_size for _ in range(1))
    largest = 4 * VOCABULARY * 64
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    export_gguf(adapter, tmp_path / "out", fused=True, outtype="q8_0", notify=str)
    peak = mx.get_peak_memory() - before
    adapters = (adapter / "adapters.safetensors").stat().st_size
    assert peak < 6 * largest + adapters < whole / 2


@pytest.mark.parametrize("splitter", ["llama-bpe", "qwen2", "smollm", "unknown"])
def test_how_a_text_is_split(make, tmp_path, splitter):
    model, adapter = make("qwen3")
    patterns = {name: pattern for pattern, name in _BY_PATTERN.items()} | {"unknown": r"\d|\w+"}
    steps = [pre_tokenizers.Digits(individual_digits=True)]
    if splitter != "smollm":
        steps = [pre_tokenizers.Split(Regex(patterns[splitter]), "isolated")]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitter == "smollm")
    write_tokenizer(model, pre_tokenizers.Sequence([*steps, last]))
    if splitter == "unknown":
        with pytest.raises(EdgeLoraError, match="name of this tokenizer is not known"):
            export_gguf(adapter, tmp_path / "out", fused=True, notify=str)
        assert not (tmp_path / "out").exists()
        return
    file = export_gguf(adapter, tmp_path / "out", fused=True, notify=str)
    assert read(file)[1]["tokenizer.ggml.pre"] == splitter


def wrong_model(make, tmp_path):
    return make("olmo2")[1]


def wrong_scaling(make, tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    return make("qwen3", rope_scaling=scaling)[1]


def tied_embedding(make, tmp_path):
    return make("qwen3", ["model.embed_tokens"])[1]


def dora(make, tmp_path):
    return make_dora(tmp_path / "dora", make("llama")[0], ["self_attn.q_proj"])


def dense_blocks(make, tmp_path):
    return make("qwen3_moe", mlp_only_layers=[1])[1]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (wrong_model, "olmo2 is not known here as GGUF"),
        (wrong_scaling, "rope scaling 'yarn' is not known here"),
        (tied_embedding, "is the vocabulary head as well"),
        (dora, "is of type dora, which llama.cpp has no adapters of"),
        (dense_blocks, "has blocks without experts"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_what_is_wrong_is_said_and_nothing_written(make, tmp_path, capsys, case, message):
    adapter = case(make, tmp_path)
    before = sorted(tmp_path.iterdir())
    target = tmp_path / "out"
    assert main(["gguf", "--adapter-path", str(adapter), "--save-path", str(target)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_without_the_library(make, tmp_path, monkeypatch, capsys):
    _, adapter = make("llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    target = tmp_path / "out"
    assert main(["gguf", "--adapter-path", str(adapter), "--save-path", str(target)]) == 2
    assert "pip install 'mlx-edgelora[gguf]'" in capsys.readouterr().err
    assert not target.exists()


def test_options_of_other_formats_are_refused(capsys):
    assert main(["peft", "--fused"]) == 2
    assert "--fused: has no meaning for peft" in capsys.readouterr().err
    assert main(["gguf", "--base-model", "x"]) == 2
    assert "--base-model: has no meaning for gguf" in capsys.readouterr().err


def test_every_architecture_is_one_of_the_library():
    names = set(gguf.MODEL_ARCH_NAMES.values())
    assert {architecture.name for architecture in ARCHITECTURES.values()} <= names
