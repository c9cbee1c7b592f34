"""PEFT adapters as adapters of mlx-lm: round trips, real ones of `peft`, and what is refused."""

import json
from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest
from families import load_theirs, make_checkpoint, mlx_logits, torch_logits
from test_peft import TOKENS, assert_close, make_dora
from tiny import make_adapter, make_data, make_model

from mlx_edgelora import EdgeLoraError, TrainConfig, finetune
from mlx_edgelora.export.peft import export_peft
from mlx_edgelora.export.peft_import import import_peft

main = import_module("mlx_edgelora.import").main
pytestmark = pytest.mark.filterwarnings("ignore")
ROUND = {
    "llama": None,
    "phi3": None,
    "mixtral": None,
    "qwen2_moe": ["self_attn.v_proj", "mlp.gate", "mlp.switch_mlp.up_proj"],
    "qwen3_moe": None,
}


def tensors(folder):
    return mx.load(str(folder / "adapters.safetensors"))


@pytest.mark.parametrize("name", ROUND)
def test_there_and_back(tmp_path, name):
    """The same tensors to the last bit, so the same logits in mlx-lm."""
    if name not in ("llama", "phi3"):
        model = make_checkpoint(tmp_path / "model", name)
    else:
        model = make_model(tmp_path / "model", name, quantized=False)
    adapter = make_adapter(tmp_path / "adapter", model, ROUND[name], rank=5, scale=3.3)
    export_peft(adapter, tmp_path / "peft", notify=str)
    import_peft(tmp_path / "peft", tmp_path / "back", notify=str)
    ours, back = tensors(adapter), tensors(tmp_path / "back")
    assert ours.keys() == back.keys()
    scales = [
        json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]["scale"]
        for folder in (adapter, tmp_path / "back")
    ]
    assert abs(scales[0] - scales[1]) < 1e-12
    for key, array in ours.items():
        assert mx.array_equal(array, back[key]), key
    if name in ("llama", "phi3"):
        assert_close(
            mlx_logits(model, TOKENS, adapter), mlx_logits(model, TOKENS, tmp_path / "back")
        )


def test_dora_there_and_back(tmp_path):
    model = make_model(tmp_path / "model", "llama", quantized=False)
    adapter = make_dora(tmp_path / "adapter", model, ["self_attn.q_proj"])
    export_peft(adapter, tmp_path / "peft", notify=str)
    import_peft(tmp_path / "peft", tmp_path / "back", notify=str)
    ours, back = tensors(adapter), tensors(tmp_path / "back")
    assert ours.keys() == back.keys() and any(key.endswith(".m") for key in ours)
    assert all(mx.array_equal(array, back[key]) for key, array in ours.items())


SETTINGS = {
    "llama": [
        {"target_modules": ["q_proj", "down_proj", "lm_head"], "use_rslora": True},
        {"target_modules": "all-linear", "rank_pattern": {"k_proj": 2}},
        {"target_modules": ["v_proj"], "alpha_pattern": {"layers.1.self_attn.v_proj": 3}},
        {"target_modules": ["up_proj", "o_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj"], "use_dora": True},
    ],
    "mixtral": [{"target_modules": ["q_proj", "gate", "w1", "w2", "w3"]}],
    "qwen3_moe": [
        {"target_modules": ["v_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    ],
}


@pytest.mark.parametrize(
    ("name", "settings"), [(name, s) for name, all_of in SETTINGS.items() for s in all_of], ids=str
)
def test_adapters_that_peft_made(tmp_path, name, settings):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    model = make_checkpoint(tmp_path / "model", name)
    config = peft.LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", **settings)
    theirs = peft.get_peft_model(load_theirs(model), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_B" in key:
                parameter.copy_(0.1 * torch.randn_like(parameter))
            elif "magnitude" in key:
                parameter.mul_(1.1)
    theirs.save_pretrained(tmp_path / "peft")
    import_peft(tmp_path / "peft", tmp_path / "ours", notify=str)
    found = mlx_logits(model, TOKENS, tmp_path / "ours")
    assert np.abs(np.array(found) - np.array(mlx_logits(model, TOKENS))).max() > 0.01
    assert_close(found, torch_logits(theirs, TOKENS))


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral", "qwen3_moe"])
def test_there_through_peft_and_back(tmp_path, name):
    """As exported, loaded by PEFT, saved by PEFT and imported again."""
    peft = pytest.importorskip("peft")
    model = make_checkpoint(tmp_path / "model", name)
    adapter = make_adapter(tmp_path / "adapter", model, rank=5, scale=3.3)
    export_peft(adapter, tmp_path / "peft", notify=str)
    theirs = peft.PeftModel.from_pretrained(load_theirs(model), tmp_path / "peft")
    theirs.save_pretrained(tmp_path / "saved")
    import_peft(tmp_path / "saved", tmp_path / "back", notify=str)
    assert_close(mlx_logits(model, TOKENS, tmp_path / "back"), mlx_logits(model, TOKENS, adapter))


def test_experts_one_by_one(tmp_path):
    """As transformers 4 had them, with other names in the file."""
    model = make_model(tmp_path / "model", "qwen3_moe", quantized=False)
    adapter = make_adapter(tmp_path / "adapter", model, ["mlp.switch_mlp.up_proj"], num_layers=1)
    export_peft(adapter, tmp_path / "peft", notify=str)
    ours = tensors(adapter)
    place = "model.layers.2.mlp.switch_mlp.up_proj"
    single = {
        f"base_model.model.model.layers.2.mlp.experts.{i}.up_proj.lora_{leaf}.weight": ours[
            f"{place}.lora_{leaf.lower()}"
        ][i]
        for i in range(4)
        for leaf in "AB"
    }
    mx.save_safetensors(str(tmp_path / "peft/adapter_model.safetensors"), single)
    edit(tmp_path / "peft", target_modules=["up_proj"], target_parameters=None, rank_pattern={})
    edit(tmp_path / "peft", layers_to_transform=[2])
    import_peft(tmp_path / "peft", tmp_path / "back", notify=str)
    back = tensors(tmp_path / "back")
    assert ours.keys() == back.keys()
    assert all(mx.array_equal(array, back[key]) for key, array in ours.items())


def test_training_goes_on(tmp_path):
    model = make_model(tmp_path / "model", "llama", quantized=False)
    adapter = make_adapter(tmp_path / "adapter", model, rank=3)
    export_peft(adapter, tmp_path / "peft", notify=str)
    import_peft(tmp_path / "peft", tmp_path / "back", notify=str)
    config = json.loads((tmp_path / "back/adapter_config.json").read_text())
    make_data(tmp_path / "data")
    run = TrainConfig.from_dict(
        config
        | {
            "data": str(tmp_path / "data"),
            "adapter_path": str(tmp_path / "run"),
            "resume_adapter_file": str(tmp_path / "back/adapters.safetensors"),
            "iters": 1,
            "batch_size": 2,
            "val_batches": 0,
            "learning_rate": 1e-9,
        }
    )
    finetune(run, notify=str)
    trained = tensors(tmp_path / "run")
    for key, array in tensors(adapter).items():
        assert mx.allclose(array, trained[key], atol=1e-5), key


@pytest.fixture
def folder(tmp_path):
    model = make_model(tmp_path / "model", "llama", quantized=False)
    adapter = make_adapter(tmp_path / "adapter", model, ["self_attn.q_proj"], num_layers=3)
    return export_peft(adapter, tmp_path / "peft", notify=str)


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rename(folder, old, new):
    file = folder / "adapter_model.safetensors"
    arrays = {name.replace(old, new): array for name, array in mx.load(str(file)).items()}
    arrays.pop("", None)
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays)


LAST = "base_model.model.model.layers.2.self_attn.q_proj"
WRONG = {
    "rank": (lambda f: edit(f, r=5), "expected the rank 5 of adapter_config.json"),
    "no rank": (lambda f: edit(f, r="4"), "r is '4', expected a number above 0"),
    "alpha": (lambda f: edit(f, lora_alpha=float("nan")), "lora_alpha is nan"),
    "kind": (lambda f: edit(f, peft_type="IA3"), "peft_type is 'IA3', expected 'LORA'"),
    "bias": (lambda f: edit(f, bias="all"), "bias is 'all', which mlx-lm has no form for"),
    "pissa": (lambda f: edit(f, init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "pattern": (lambda f: edit(f, rank_pattern={"(a+)+$": 4}), "expected names of modules"),
    "target": (lambda f: edit(f, target_modules=["q_proj", "v_proj"]), "lacks model.layers.0.sel"),
    "block": (lambda f: rename(f, "layers.2", "layers.7"), "lacks model.layers.2.self_attn.q_proj"),
    "module": (
        lambda f: (rename(f, "q_proj", "wq"), edit(f, target_modules=["wq"])),
        "adapts model.layers.0.self_attn.wq, which the model in",
    ),
    "half": (lambda f: rename(f, f"{LAST}.lora_B.weight", ""), "has no lora_B for model.layers.2"),
    "extra": (lambda f: rename(f, f"{LAST}.lora_B", f"{LAST}.lora_C"), "has the tensor"),
    "prefix": (lambda f: rename(f, "base_model.model.", ""), "names that begin with base_model"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "is not the folder of a PEFT"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("[" * 9999), "is not the folder"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "cannot be read"),
    "pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "are a pickle",
    ),
    "mlx": (lambda f: edit(f, peft_type=None, lora_parameters={}), "adapter of mlx-lm already"),
    "no model": (lambda f: edit(f, base_model_name_or_path=None), "give one with --model"),
}


@pytest.mark.parametrize("damage", WRONG)
def test_what_is_wrong_is_said_and_nothing_written(tmp_path, folder, capsys, damage):
    change, message = WRONG[damage]
    change(folder)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["--peft", str(folder), "--save-path", str(tmp_path / "back")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_another_model_is_refused(tmp_path, folder):
    wider = make_model(tmp_path / "wider", "llama", quantized=False, hidden_size=96)
    other = make_model(tmp_path / "other", "deepseek_v3", quantized=False)
    for model, message in ((wider, "expected (96, 4)"), (other, "deepseek_v3 are not known")):
        with pytest.raises(EdgeLoraError) as error:
            import_peft(folder, tmp_path / "back", str(model), notify=str)
        assert message in str(error.value)
    assert not (tmp_path / "back").exists()
    assert main(["--peft", str(folder), "--save-path", str(tmp_path / "back")]) == 0
