"""Options: mlx-lm's files run, the command line wins, and nothing wrong passes in silence."""

import dataclasses
import json

import mlx.core as mx
import mlx_lm.lora
import mlx_lm.utils
import pytest
import yaml
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from mlx_edgelora.config import LoraParameters, TrainConfig, build_parser, config_from_cli
from mlx_edgelora.config.hints import HINTS
from mlx_edgelora.errors import EdgeLoraError

MLX_LM_FILE = """
model: "mlx_model"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
    eps: 1e-6
    weight_decay: 0.05
  sgd:
data: "some/folder"
seed: 7
num_layers: 12
batch_size: 2
iters: 300
val_batches: -1
learning_rate: 3e-5
steps_per_report: 5
steps_per_eval: 100
resume_adapter_file: null
adapter_path: "out"
save_every: 50
test: false
test_batches: 100
max_seq_length: 1024
grad_checkpoint: true
grad_accumulation_steps: 2
clear_cache_threshold: 4GB
mask_prompt: true
report_to: wandb
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 16
  scale: 10
  dropout: 0.1
lr_schedule:
  name: cosine_decay
  warmup: 10
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
"""


@pytest.fixture
def write(tmp_path):
    def _write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return _write


def test_names_and_defaults_are_those_of_mlx_lm():
    ours = TrainConfig().to_dict()
    nones = ("model", "data", "num_layers", "clear_cache_threshold")
    differing = dict.fromkeys(nones) | {"train": True}
    for name, default in mlx_lm.lora.CONFIG_DEFAULTS.items():
        assert ours[name] == differing.get(name, default), name


def test_every_flag_of_mlx_lm_is_a_flag_here():
    theirs = {flag for a in mlx_lm.lora.build_parser()._actions for flag in a.option_strings}
    ours = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert theirs <= ours


def test_a_file_of_mlx_lm_runs_here(write):
    path = write(MLX_LM_FILE)
    config = TrainConfig.from_yaml(path)
    assert config.lora_parameters == LoraParameters(
        rank=16, dropout=0.1, scale=10.0, keys=("self_attn.q_proj", "self_attn.v_proj")
    )
    adamw = config.optimizer_config["adamw"]
    assert adamw == {"betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.05}
    assert config.optimizer_config["sgd"] == {}
    assert config.learning_rate == 3e-5
    assert config.lr_schedule["arguments"] == [1e-5, 1000, 1e-7]
    assert config.lr_schedule["warmup_init"] == 1e-7
    assert (config.seed, config.val_batches, config.num_layers) == (7, -1, 12)
    assert config.clear_cache_threshold == 4 * 10**9
    assert config.resume_adapter_file is None
    assert config.config == path


def test_reading_yaml_leaves_the_yaml_package_alone(write):
    config = TrainConfig.from_yaml(write("learning_rate: 2E-4"))
    assert config.learning_rate == 2e-4
    resolvers = yaml.SafeLoader.yaml_implicit_resolvers["1"]
    ours = TrainConfig.from_yaml.__func__.__globals__["read_yaml"].__globals__["_Loader"]
    assert ours.yaml_implicit_resolvers["1"] is not resolvers


@pytest.mark.parametrize("text", ["1e-5", "1E5", "1.e-5", "-1.5e+3", ".5e-3", "1_0e2"])
def test_exponents_are_numbers_as_in_mlx_lm(write, text):
    schedule = f"lr_schedule: {{name: step_decay, arguments: [{text}, 1]}}"
    expected = yaml.load(f"[{text}]", mlx_lm.lora.yaml_loader)[0]
    ours = TrainConfig.from_yaml(write(schedule)).lr_schedule["arguments"][0]
    assert ours == float(expected) == float(text)


def test_an_empty_file_and_null_mean_the_defaults(write):
    assert TrainConfig.from_dict({"iters": None, "lora_parameters": {"rank": None}}) == (
        TrainConfig()
    )
    path = write("# nothing yet\n")
    assert TrainConfig.from_yaml(path) == TrainConfig(config=path)


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(write):
    path = write(MLX_LM_FILE)
    config = config_from_cli(["-c", path, "--iters", "20", "--no-mask-prompt", "--test"])
    assert (config.iters, config.mask_prompt, config.test) == (20, False, True)
    assert (config.batch_size, config.steps_per_report, config.train) == (2, 5, True)
    assert config.prompt_feature == "prompt"
    assert config.config == path


def test_a_flag_for_every_kind_of_value():
    line = (
        "--num-layers -1 --learning-rate 1e-3 --clear-cache-threshold 1.5GB --quantize 4 "
        "--weights resident --dtype float32 --log run.jsonl --optimizer AdamW"
    )
    assert config_from_cli(line.split()) == TrainConfig(
        num_layers=-1,
        learning_rate=1e-3,
        clear_cache_threshold=1_500_000_000,
        quantize=4,
        weights="resident",
        dtype="float32",
        log="run.jsonl",
        optimizer="adamw",
    )


def test_flags_and_file_of_the_approximate_loss(write):
    line = "--loss approximate --loss-k 7 --loss-max-subset 90 --no-loss-tail-correction"
    expected = {
        "loss": "approximate",
        "loss_k": 7,
        "loss_max_subset": 90,
        "loss_tail_correction": False,
    }
    config = config_from_cli(line.split())
    assert expected.items() <= config.to_dict().items()
    assert TrainConfig.from_dict(config.to_dict()) == config
    path = write("loss: approximate\nloss_k: 7\nloss_max_subset: 90\nloss_tail_correction: false")
    assert expected.items() <= TrainConfig.from_yaml(path).to_dict().items()
    assert config_from_cli(["--loss-tail-correction", "--loss", "approximate"]) == TrainConfig(
        loss="approximate", loss_tail_correction=True
    )


def test_help_names_every_option_that_is_one_value(capsys):
    with pytest.raises(SystemExit, match="0"):
        config_from_cli(["--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        assert (flag in shown) == (field.metadata["kind"].parse is not None), flag


@pytest.mark.parametrize("argv", [[], ["--iters", "3"]])
def test_a_preset_lies_under_a_run_that_names_nothing(argv):
    config = config_from_cli(argv, preset={"batch_size": 3, "iters": 9})
    assert (config.batch_size, config.iters) == (3, 3 if argv else 9)


def test_epochs_take_the_place_of_steps(write):
    """Of a file or a preset as well, which the command line wins over."""
    assert TrainConfig().iters == 1000
    for argv, preset in (
        (["--epochs", "3"], {"iters": 9}),
        (["-c", write("iters: 5"), "--epochs", "3"], None),
        (["-c", write("epochs: 3")], {"iters": 9}),
    ):
        config = config_from_cli(argv, preset=preset)
        assert (config.iters, config.epochs) == (None, 3)
    config = config_from_cli(["-c", write("epochs: 5"), "--iters", "7"])
    assert (config.iters, config.epochs) == (7, None)
    for both in (["--iters", "7", "--epochs", "2"], ["-c", write("iters: 7\nepochs: 2")]):
        with pytest.raises(EdgeLoraError, match=r"^epochs: got 2 with iters 7, expected one of"):
            config_from_cli(both)


@pytest.mark.parametrize("argv", [["--model", "m"], ["--data", "d"]])
def test_a_preset_is_not_for_runs_of_something_else(argv):
    assert config_from_cli(argv, preset={"batch_size": 3}).batch_size == 4


def test_a_config_file_replaces_the_preset(write):
    config = config_from_cli(["-c", write("iters: 5")], preset={"batch_size": 3})
    assert (config.iters, config.batch_size) == (5, 4)


@pytest.mark.parametrize(
    ("argv", "train", "test"),
    [
        ([], True, False),
        (["--train"], True, False),
        (["--test"], False, True),  # as in mlx-lm, where training must be asked for
        (["--train", "--test"], True, True),
    ],
)
def test_train_is_the_default_unless_test_is_given(argv, train, test):
    config = config_from_cli(argv)
    assert (config.train, config.test) == (train, test)


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        ({"learing_rate": 1e-3}, r"learing_rate: unknown key, .* nearest .* is learning_rate;"),
        ({"lora_parameters": {"rnk": 4}}, r"lora_parameters\.rnk: unknown key, .* is rank;"),
        ({"lora_parameters": {"alpha": 4}}, r"lora_parameters\.alpha: unknown key; .* scale"),
        ({"lora_layers": 4}, r"lora_layers: unknown key; write num_layers"),
        ({"steps_per_save": 4}, r"steps_per_save: unknown key; write save_every"),
        ({"use_dora": True}, r"use_dora: unknown key; write fine_tune_type: dora"),
        ({"gradient_accumulation_steps": 4}, r"unknown key; write grad_accumulation_steps"),
        ({"xyz": 4}, r"xyz: unknown key, --help lists all; correct it or take it out"),
        ({"data_format": "messages"}, r"data_format: got 'messages', expected one of chat, comp"),
        ({"val_split": 1}, r"val_split: got 1, expected a number above 0 and below 1"),
        ({"system_prompt": ""}, r"system_prompt: got '', expected text that is not empty"),
        ({"lora_parameters": {"rank": 0}}, r"lora_parameters\.rank: got 0, expected a whole"),
        ({"lora_parameters": {"dropout": 1.0}}, r"lora_parameters\.dropout: got 1\.0, expected"),
        ({"lora_parameters": {"dropout": -0.1}}, r"got -0\.1, expected a number from 0"),
        ({"lora_parameters": {"scale": 0}}, r"lora_parameters\.scale: got 0, expected"),
        ({"lora_parameters": {"keys": "q_proj"}}, r"lora_parameters\.keys: got 'q_proj'"),
        ({"lora_parameters": {"keys": []}}, r"lora_parameters\.keys: got \[\], expected"),
        ({"lora_parameters": 8}, r"lora_parameters: got 8, expected a mapping"),
        ({"use_rslora": True}, r"use_rslora: unknown key; write use_rslora under lora_parameters"),
        ({"lora_parameters": {"use_rslora": 1}}, r"lora_parameters\.use_rslora: got 1, expected t"),
        ({"loraplus_lr_ratio": 0}, r"loraplus_lr_ratio: got 0, expected a number above 0"),
        ({"fine_tune_type": "qlora"}, r"fine_tune_type: got 'qlora', expected one of lora, dora"),
        ({"trust_remote_code": True}, r"trust_remote_code: got True, expected false"),
        ({"num_layers": 0}, r"num_layers: got 0, expected .* or -1 for all"),
        ({"num_layers": -2}, r"num_layers: got -2, expected"),
        ({"batch_size": 0}, r"batch_size: got 0, expected a whole number of at least 1"),
        ({"batch_size": True}, r"batch_size: got True, expected a whole number"),
        ({"iters": 0}, r"iters: got 0, expected"),
        ({"iters": 1e3}, r"iters: got 1000\.0, expected a whole number"),
        ({"iters": "10"}, r"iters: got '10', expected a whole number"),
        ({"grad_accumulation_steps": 0}, r"grad_accumulation_steps: got 0"),
        ({"max_seq_length": 1}, r"max_seq_length: got 1, expected .* at least 2"),
        ({"steps_per_report": 0}, r"steps_per_report: got 0"),
        ({"steps_per_eval": 0}, r"steps_per_eval: got 0"),
        ({"save_every": 0}, r"save_every: got 0"),
        ({"val_batches": -2}, r"val_batches: got -2, expected -1 or"),
        ({"test_batches": 0}, r"test_batches: got 0, expected -1 or"),
        ({"seed": -1}, r"seed: got -1, expected a whole number from 0 to 4294967295"),
        ({"learning_rate": 0}, r"learning_rate: got 0, expected a number above 0"),
        ({"learning_rate": float("nan")}, r"learning_rate: got nan, expected"),
        ({"learning_rate": float("inf")}, r"learning_rate: got inf, expected"),
        ({"learning_rate": "1e-5"}, r"learning_rate: got '1e-5', expected"),
        ({"mask_prompt": 1}, r"mask_prompt: got 1, expected true or false"),
        ({"mask_prompt": "yes"}, r"mask_prompt: got 'yes', expected true or false"),
        ({"model": 3}, r"model: got 3, expected text"),
        ({"optimizer": "lion"}, r"optimizer: got 'lion', expected one of adam, adamw"),
        (
            {"optimizer_config": {"lion": {}}},
            r"lion: unknown key, expected one of adam,",
        ),
        ({"optimizer_config": {"adamw": 3}}, r"optimizer_config\.adamw: got 3, expected"),
        ({"optimizer_config": [1]}, r"optimizer_config: got \[1\], expected a mapping"),
        (
            {"optimizer_config": {"adamw": {"wieght_decay": 0.1}}},
            r"optimizer_config\.adamw\.wieght_decay: unknown key, .* is weight_decay;",
        ),
        (
            {"optimizer_config": {"adam": {"learning_rate": 0.1}}},
            r"optimizer_config\.adam\.learning_rate: unknown key",
        ),
        (
            {"lr_schedule": {"name": "cosine", "arguments": [1e-5, 9]}},
            r"lr_schedule\.name: got 'cosine', expected one of exponential_decay",
        ),
        (
            {"lr_schedule": {"name": "math", "arguments": [1e-5]}},
            r"lr_schedule\.name: got 'math', expected one of",
        ),
        ({"lr_schedule": {"name": "cosine_decay"}}, r"lr_schedule\.arguments: missing"),
        (
            {"lr_schedule": {"name": "cosine_decay", "arguments": ["1e-5"]}},
            r"lr_schedule\.arguments: got \['1e-5'\], expected a list",
        ),
        (
            {"lr_schedule": {"name": "cosine_decay", "arguments": [1], "warm_up": 3}},
            r"lr_schedule\.warm_up: unknown key, .* is warmup;",
        ),
        ({"report_to": "board"}, r"report_to: got 'board', expected some of wandb, swanlab, t"),
        ({"quantize": 7}, r"quantize: got 7, expected one of 2, 3, 4, 5, 6, 8"),
        ({"dtype": "int8"}, r"dtype: got 'int8', expected one of float32"),
        ({"weights": "disk"}, r"weights: got 'disk', expected one of streamed, resident"),
        ({"kernel": "fast"}, r"kernel: got 'fast', expected one of auto"),
        ({"activations": "disk"}, r"activations: got 'disk', expected one of spill, ram"),
        ({"adapters": "disk"}, r"adapters: got 'disk', expected one of resident, paged"),
        ({"max_grad_norm": 0}, r"max_grad_norm: got 0, expected a number above 0"),
        ({"max_grad_norm": float("inf")}, r"max_grad_norm: got inf, expected a number above 0"),
        ({"loss": "sampled"}, r"loss: got 'sampled', expected one of exact, approximate"),
        ({"loss_k": 0}, r"loss_k: got 0, expected a whole number of at least 1"),
        ({"loss_k": 10.0}, r"loss_k: got 10\.0, expected a whole number"),
        ({"loss_k": True}, r"loss_k: got True, expected a whole number"),
        ({"loss_max_subset": 0}, r"loss_max_subset: got 0, expected a whole number of at least 1"),
        ({"loss_tail_correction": 1}, r"loss_tail_correction: got 1, expected true or false"),
        ({"label_smoothing": 1.0}, r"label_smoothing: got 1\.0, expected a number from 0 to below"),
        ({"label_smoothing": -0.1}, r"label_smoothing: got -0\.1, expected a number from 0"),
        ({"label_smoothing": float("nan")}, r"label_smoothing: got nan, expected a number from 0"),
        ({"clear_cache_threshold": "4TB"}, r"clear_cache_threshold: got '4TB', expected bytes"),
        ({"clear_cache_threshold": -1}, r"clear_cache_threshold: got -1, expected bytes"),
        ({"clear_cache_threshold": "GB"}, r"clear_cache_threshold: got 'GB', expected bytes"),
        ({"hf_dataset": {"name": "billsum"}}, r"hf_dataset\.name: unknown key"),
        ({"hf_dataset": {"train_split": "train"}}, r"hf_dataset\.path: missing, expected the name"),
        ({"hf_dataset": []}, r"hf_dataset: got \[\], expected a mapping with path"),
        ({"hf_dataset": ["billsum"]}, r"hf_dataset: got 'billsum', expected a mapping"),
    ],
)
def test_what_is_wrong_is_refused_in_one_sentence(mapping, sentence):
    with pytest.raises(EdgeLoraError, match=rf"^run\.yaml: .*{sentence}") as caught:
        TrainConfig.from_dict(mapping, place="run.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        (
            {"activations": "ram", "adapters": "resident", "spill_dir": "x"},
            r"spill_dir: got 'x' with activations ram",
        ),
        ({"train": False}, r"train: got false without test"),
        ({"loss_k": 9}, r"loss_k: got 9 with the exact loss, which has no use for it; leave it"),
        ({"loss": "exact", "loss_max_subset": 9}, r"loss_max_subset: got 9 with the exact loss"),
        ({"loss_tail_correction": True}, r"loss_tail_correction: got True with the exact loss"),
        ({"loss_tail_correction": False}, r"loss_tail_correction: got False with the exact loss"),
        (
            {"loss": "approximate", "label_smoothing": 0.1},
            r"label_smoothing: got 0\.1 with the approximate loss, expected 0: a target over",
        ),
        ({"adapter_path": ""}, r"adapter_path: got no name"),
    ],
)
def test_options_that_contradict_each_other_are_refused(mapping, sentence):
    with pytest.raises(EdgeLoraError, match=sentence):
        TrainConfig.from_dict(mapping)


def test_python_callers_get_the_same_checks():
    with pytest.raises(EdgeLoraError, match=r"^batch_size: got 0, expected a whole number"):
        TrainConfig(batch_size=0)
    with pytest.raises(EdgeLoraError, match=r"^lora_parameters\.rank: got 'a'"):
        LoraParameters(rank="a")
    with pytest.raises(EdgeLoraError, match=r"^iters: got 0"):
        dataclasses.replace(TrainConfig(), iters=0)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--learing-rate", "1"], r"--learing-rate: unknown key, .* is --learning-rate;"),
        (["--learing-rate=1"], r"--learing-rate: unknown key, .* is --learning-rate;"),
        (["--iter", "3"], r"--iter: unknown key, .* is --iters;"),
        (["--lora-layers=3"], r"--lora-layers: unknown key; write num_layers"),
        (["--xyz", "3"], r"--xyz: unknown key, --help lists all"),
        (["--iters", "3.5"], r"--iters: got '3\.5', expected a whole number"),
        (["--iters", "0"], r"--iters: got 0, expected a whole number"),
        (["--iters"], r"argument --iters: expected one argument; --help"),
        (["model"], r"got 'model', expected a flag"),
        (["--lora-parameters", "{}"], r"--lora-parameters is not a flag; .* --config"),
        (["--trust-remote-code"], r"--trust-remote-code: got True, expected false"),
        (["--test", "--no-train", "--no-test"], r"train: got false without test"),
    ],
)
def test_the_command_line_is_strict(argv, sentence):
    with pytest.raises(EdgeLoraError, match=sentence):
        config_from_cli(argv)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("iters: 5\nlearing_rate: 1\n", r"run\.yaml: learing_rate: unknown key"),
        ("iters: 5\niters: 6\n", r"run\.yaml, line 2: .* the key 'iters' occurs twice"),
        ("iters: [5\n", r"run\.yaml, line 2: is not valid YAML"),
        ("- iters\n", r"run\.yaml: got list, expected `key: value`"),
        ("5: 6\n", r"run\.yaml: 5: unknown key"),
        ("a: !!python/object:os.system {}\n", r"run\.yaml, line 1: is not valid YAML"),
    ],
)
def test_a_bad_file_is_named(write, text, sentence):
    path = write(text)
    with pytest.raises(EdgeLoraError, match=sentence):
        config_from_cli(["-c", path])


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(EdgeLoraError, match=r"none\.yaml: cannot be read \(No such file"):
        TrainConfig.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EdgeLoraError, match=r"binary\.yaml: is not UTF-8 text"):
        TrainConfig.from_yaml(tmp_path / "binary.yaml")


@pytest.mark.parametrize("size", ["4GB", "1.5 g", "500M", "12mb", "1024", "0"])
def test_sizes_are_read_as_mlx_lm_reads_them(size):
    expected = mlx_lm.utils._parse_size(size)
    assert TrainConfig(clear_cache_threshold=size).clear_cache_threshold == expected
    assert config_from_cli(["--clear-cache-threshold", size]).clear_cache_threshold == expected


def test_the_cache_threshold_of_a_file_arrives_and_in_mlx_lm_does_not(write):
    path = write("clear_cache_threshold: 1000\n")
    assert config_from_cli(["-c", path]).clear_cache_threshold == 1000
    args = vars(mlx_lm.lora.build_parser().parse_args(["-c", path]))
    assert args["clear_cache_threshold"] == 0  # not None, so the file's value is never taken


def test_to_dict_is_json_that_gives_the_same_run_again():
    config = TrainConfig.from_dict(
        {
            "hf_dataset": {"path": "billsum", "prompt_feature": "text"},
            "lora_parameters": {"keys": ["mlp.up_proj"]},
            "lr_schedule": {"name": "linear_schedule", "arguments": [0.0, 1.0, 5]},
            "resume_adapter_file": "a.safetensors",
        }
    )
    saved = json.loads(json.dumps(config.to_dict()))
    assert TrainConfig.from_dict(saved) == config
    assert saved["lora_parameters"] == {
        "rank": 8,
        "dropout": 0.0,
        "scale": 20.0,
        "keys": ["mlp.up_proj"],
    }
    assert saved["hf_dataset"][0]["path"] == "billsum"


@pytest.fixture
def make_model():
    def _make():
        arguments = llama.ModelArgs(
            model_type="llama",
            hidden_size=16,
            num_hidden_layers=2,
            intermediate_size=16,
            num_attention_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=32,
        )
        model = llama.Model(arguments)
        model.freeze()
        return model

    return _make


def test_mlx_lm_loads_an_adapter_by_the_saved_options(tmp_path, make_model):
    config = TrainConfig(num_layers=1, lora_parameters=LoraParameters(rank=3))
    model = make_model()
    saved = config.to_dict()
    linear_to_lora_layers(model, config.num_layers, saved["lora_parameters"])
    weights = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    loaded = dict(tree_flatten(load_adapters(make_model(), str(tmp_path)).parameters()))
    assert weights and all(mx.array_equal(loaded[name], weights[name]) for name in weights)
    assert all(".layers.1." in name for name in weights)


def test_a_config_keeps_no_reference_to_what_it_was_made_from():
    arguments = {"betas": [0.9, 0.99]}
    config = TrainConfig(optimizer_config={"adam": arguments})
    arguments["eps"] = 1.0
    assert config.optimizer_config["adam"] == {"betas": [0.9, 0.99]}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.iters = 5


def test_num_layers_zero_is_refused_where_mlx_lm_adapts_all_blocks(make_model):
    model = make_model()
    linear_to_lora_layers(model, 0, TrainConfig().to_dict()["lora_parameters"])
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert any(".layers.0." in name for name in names)
    with pytest.raises(EdgeLoraError, match=r"num_layers: got 0, .*\(0 is not accepted"):
        TrainConfig(num_layers=0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"memory_budget": "4 apples"}, "memory_budget: got '4 apples', expected min, or a size"),
        ({"memory_budget": "0.5MB"}, "memory_budget: got '0.5MB', expected min, or a size"),
        ({"memory_budget": -1}, "memory_budget: got -1, expected"),
        ({"memory_budget": "4GB", "plan": "p"}, "memory_budget: got 4000000000 with plan 'p'"),
        ({"weights": "streamed", "plan": "p"}, "weights: got 'streamed' with plan 'p'"),
        ({"kernel": "fused", "plan": "p"}, "kernel: got 'fused' with plan 'p'"),
        ({"duty": 0}, "duty: got 0, expected a number above 0 and at most 1"),
        (
            {"memory_budget": "min", "weights": "resident"},
            "weights: got 'resident' with memory_budget min",
        ),
        (
            {"memory_budget": "min", "adapters": "resident"},
            "adapters: got 'resident' with memory_budget min",
        ),
        ({"test": True, "memory_profile": "m"}, "memory_profile: got 'm' without training"),
    ],
)
def test_what_contradicts_a_memory_budget_is_refused(options, sentence):
    with pytest.raises(EdgeLoraError, match=sentence):
        TrainConfig(**options)


def test_hints_are_for_keys_that_do_not_exist():
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert not names & HINTS.keys()


def test_rslora_is_a_scale_in_the_configuration_of_the_adapter():
    config = TrainConfig.from_dict(
        {"lora_parameters": {"rank": 16, "scale": 2.5, "use_rslora": True}}
    )
    saved = config.to_dict()
    assert saved["lora_parameters"] == {"rank": 16, "scale": 10.0, "dropout": 0.0}
    again = TrainConfig.from_dict({"lora_parameters": saved["lora_parameters"]})
    assert again.lora_parameters == config.lora_parameters  # not scaled twice
    assert LoraParameters(rank=16, scale=2.5, use_rslora=False).scale == 2.5


def test_loraplus_takes_an_adafactor_without_a_rate_of_its_own():
    own = {"adafactor": {"relative_step": False}}
    config = TrainConfig(optimizer="adafactor", optimizer_config=own, loraplus_lr_ratio=16)
    assert config.loraplus_lr_ratio == 16.0
    with pytest.raises(EdgeLoraError, match=r"^loraplus_lr_ratio: got 16 with adafactor, which s"):
        TrainConfig(optimizer="adafactor", loraplus_lr_ratio=16)
