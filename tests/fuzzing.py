"""Hostile inputs of every kind that this package reads, by number: the same number, the same input.

Each target writes an input made from a good one, and reads it as a command does. It returns if the
input is accepted. `EdgeLoraError` and `RowError` are refusals; every other exception is a finding,
and so is `SilentlyWrong`, for what was accepted and is not what the input says.
"""

import dataclasses
import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import yaml
from tiny import make_adapter, make_model

from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.config import TrainConfig, config_from_cli
from mlx_edgelora.config.nested import OPTIMIZERS
from mlx_edgelora.data import load_datasets
from mlx_edgelora.data.conversation import RowError
from mlx_edgelora.engine.optimizer import build_optimizer
from mlx_edgelora.errors import MOST_CHARACTERS, EdgeLoraError
from mlx_edgelora.inference.streamed import open_lazy
from mlx_edgelora.model.checkpoint import load_lazily, read_checkpoint
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.model.tokenizer import load_tokenizer_of
from mlx_edgelora.planner import machine
from mlx_edgelora.planner.measured import VERSION, Measurements
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.storage.safetensors import DTYPES
from mlx_edgelora.training.adapters import base_model, check_adapter, read_adapter_weights

ODD: list[Any] = [None, True, False, 0, 1, -1, 2, 3, 7, 64, 1.5, -0.0, 1e-320, 1e308, 2**31, 2**63]
ODD += [2**64, 10**30, 10**400, "", " ", "\0", "x", "1", "a" * 20_000, "\ud800", "\u202e", "é\n"]
ODD += ["{{ 1 / 0 }}", "../../x", "~root/x", "~nobody-x", "/dev/null", [], {}, [[]], ["x"], [None]]
ODD += [{"a": 1}, [1, 2, 3], {"text": "x"}, [0] * 50, float("nan"), float("inf"), -float("inf")]
TEXTS = ["1", "0", "-1", "true", "null", "~", "1e-5", ".inf", ".nan", "1e999", "9" * 5000, "0x_"]
TEXTS += ["0b_", "0o8", "1_000", "12:30:45", "2001-13-45", "2001-01-01 25:61:61", "!!int abc"]
TEXTS += ["!!bool abc", "!!float x", "!!int ''", "!!timestamp x", "!!binary '@@@'", "!!set {a, b}"]
TEXTS += ["!!omap [a: 1]", "!!pairs [a]", "!!null x", "!!python/object/apply:os.system ['true']"]
TEXTS += ["[1, 2]", "[]", "{}", "{a: 1}", "'text'", '"\\0"', '"\\ud800"', "|\n  x\n", "&a [*a]"]
TEXTS += ["*no", "<<", "{? [a]: b}", "[" * 3000, "{a: " * 500, "4GB", "9" * 40 + "GB", "min", "2h"]
TEXTS += ["{rank: 8, scale: 1e400}", "{rank: -1}", "{keys: [a]}", "{adam: {betas: [1]}}", "- -"]
TEXTS += [
    "{name: cosine_decay, arguments: [1e-5, 0]}",
    "{path: &p {x: *p}}",
    "@",
    "`",
    "\t",
    "\x07",
]
TEMPLATES = ["{{ 2 ** (10 ** 9) }}", "{{ 1 / 0 }}", "{{ 'x' * 10 ** 12 }}", "{% for %}", "{{ m", ""]
TEMPLATES += [
    "{{ messages[9] }}",
    "{{ messages | tojson }}",
    "{{ [][1] }}",
    "{% macro f() %}{{ f() }}",
]
TEMPLATES += [
    "{{ ''.__class__.__mro__ }}",
    "{{ namespace(__init__=1) }}",
    "{{ raise_exception('x') }}",
]
ROWS = [{"text": "w1 w2"}, {"prompt": "w1 w2", "completion": "w3 w4"}]
ROWS += [
    {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]},
    {"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]},
]


class SilentlyWrong(Exception):
    """An input was accepted, and what was read is not what it says."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise SilentlyWrong(what)


def mutate(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """Replace, remove, add or nest something in a JSON value."""
    chance = rng.random()
    if chance < 0.2 or depth > 5 or not isinstance(value, dict | list) or not value:
        if isinstance(value, int | float) and chance < 0.1 and not isinstance(value, bool):
            return rng.choice([-value, value + 1, value * 2, 0, value * 10**9, str(value)])
        return rng.choice(ODD)
    if isinstance(value, dict):
        key, result = rng.choice(list(value)), dict(value)
        if chance < 0.3:
            del result[key]
        elif chance < 0.4:
            result[rng.choice(["extra", "", "role", "text", key + "s"])] = rng.choice(ODD)
        else:
            result[key] = mutate(rng, value[key], depth + 1)
        return result
    at, result = rng.randrange(len(value)), list(value)
    if chance < 0.3:
        del result[at]
    elif chance < 0.4:
        result.insert(at, rng.choice([value[at], *ODD]))
    else:
        result[at] = mutate(rng, value[at], depth + 1)
    return result


def damage(rng: random.Random, content: bytes) -> bytes:
    """Change the bytes of a file."""
    at, to = sorted(rng.choices(range(len(content) + 1), k=2))
    to = min(to, at + 8)
    flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in content[at : at + 1])
    quote = rng.choice([b"'", b'\\"', b"\xe2\x80\x9c"])
    return rng.choice(
        [
            content[:at] + flipped + content[at + 1 :],
            content[:at] + content[to:],
            content[:at] + rng.randbytes(4) + content[at:],
            content[:at],
            content.decode("utf-8", "replace").encode("utf-16"),
            rng.choice([b"[", b'{"a":']) * 20_000 + content,
            content.replace(b"\n", rng.choice([b"\r", b"\r\n", b"\0\n", b",\n"])),
            b"\xef\xbb\xbf" + content,
            content.replace(b'"', quote, 1),
        ]
    )


def as_json(rng: random.Random, value: Any, more: int = 3) -> bytes:
    """A mutated JSON value as a file, sometimes with its bytes damaged too."""
    for _ in range(rng.randrange(more)):
        value = mutate(rng, value)
    try:
        content = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    except ValueError:  # a number of too many digits for Python
        content = '{"a": ' + "9" * 5000 + "}"
    found = content.encode("utf-8", "surrogatepass")
    return damage(rng, found) if rng.random() < 0.3 else found


class Fuzzer:
    """A folder with a good model and adapter, and the targets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = make_model(folder / "model")
        self.adapter = make_adapter(folder / "adapter", self.model)
        self.lazy = load_lazily(read_checkpoint(self.model))
        self.tokenizer = load_tokenizer_of(self.lazy)
        self.good = {path: path.read_bytes() for path in self.files()}
        file = folder / "unchecked.safetensors"  # as mlx-lm writes it, without a checksum
        arrays = mx.load(str(self.adapter / "adapters.safetensors"))
        mx.save_safetensors(str(file), arrays)
        self.unchecked = file.read_bytes()
        self.shapes = {name: array.shape for name, array in arrays.items()}
        self.targets: dict[str, Callable[[random.Random], None]] = {
            name.removeprefix("fuzz_"): getattr(self, name)
            for name in dir(self)
            if name.startswith("fuzz_")
        }

    def files(self) -> list[Path]:
        return [path for place in (self.model, self.adapter) for path in place.iterdir()]

    def run(self, number: int) -> tuple[str, str]:
        """Run one input; returns the target, and accepted, refused or what is wrong."""
        name = list(self.targets)[number % len(self.targets)]
        try:
            self.targets[name](random.Random(number))
            return name, "accepted"
        except (EdgeLoraError, RowError) as error:
            long = len(str(error)) > MOST_CHARACTERS or not str(error)
            return name, f"WRONG: message of {len(str(error))} characters" if long else "refused"
        except SilentlyWrong as error:
            return name, f"WRONG: {error}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            place = error.__traceback__
            while place.tb_next is not None:
                place = place.tb_next
            where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}"
            return name, f"TRACEBACK: {type(error).__name__}: {str(error)[:150]} ({where})"
        finally:
            for path in set(self.files()) - set(self.good):
                path.unlink()
            for path, content in self.good.items():
                if (
                    not path.exists()
                    or path.stat().st_size != len(content)
                    or name
                    in (
                        "header_of_shard",
                        "adapter",
                    )
                    or path.suffix == ".json"
                ):
                    path.write_bytes(content)

    def _check_sets(self, tokenizer: object, folder: Path, rng: random.Random) -> None:
        config = TrainConfig(
            model="x",
            data=str(folder),
            batch_size=1,
            val_batches=0,
            mask_prompt=rng.random() < 0.5,
            max_seq_length=rng.choice([2, 8, 64, 100_000]),
        )
        rows, _, _ = load_datasets(config, tokenizer, lambda line: None)
        require(len(rows) > 0, "an empty data set")
        for i in range(len(rows)):
            tokens = np.array(rows[i][0])
            require(tokens.size > 0 and tokens.min() >= 0, "tokens that are none")

    def fuzz_jsonl(self, rng: random.Random) -> None:
        """Rows of training data."""
        place = self.folder / "data"
        place.mkdir(exist_ok=True)
        first = rng.choice(ROWS)
        rows: list[Any] = [first] * 3
        if rng.random() < 0.7:
            rows[rng.randrange(3)] = mutate(rng, first)
        lines = []
        for row in rows:
            try:
                lines.append(json.dumps(row, ensure_ascii=rng.random() < 0.5))
            except ValueError:
                lines.append("9" * 5000)
        content = ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
        content = damage(rng, content) if rng.random() < 0.3 else content
        (place / "train.jsonl").write_bytes(content)
        self._check_sets(self.tokenizer, place, rng)

    def fuzz_yaml(self, rng: random.Random) -> None:
        """A configuration file."""
        names = [field.name for field in dataclasses.fields(TrainConfig)]
        others = ["", "x", "1", "null", "[a]", "{a: b}", "? a", "2001-13-45", "<<", "!!int a", "'m"]
        lines = [
            f"{rng.choice(names if rng.random() < 0.9 else others)}: {rng.choice(TEXTS)}"
            for _ in range(rng.randrange(1, 5))
        ]
        content = ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
        path = self.folder / "config.yaml"
        path.write_bytes(damage(rng, content) if rng.random() < 0.3 else content)
        config = TrainConfig.from_yaml(path)
        self._check_config(config)
        for key, value in (yaml.safe_load(path.read_bytes()) or {}).items():
            plain = isinstance(value, bool | int) and key not in ("memory_budget", "verify")
            require(not plain or getattr(config, key) == value, f"{key} is not {value}")

    def _check_config(self, config: TrainConfig) -> None:
        again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        require(again.to_dict() == config.to_dict(), "options change when they are written")

    def fuzz_options(self, rng: random.Random) -> None:
        """Options from Python or YAML."""
        field = rng.choice(dataclasses.fields(TrainConfig))
        value = rng.choice([*ODD, *[field.default] * 20])
        value = None if value is dataclasses.MISSING else value
        self._check_config(TrainConfig.from_dict({field.name: value}))

    def fuzz_command_line(self, rng: random.Random) -> None:
        """Options of a command line."""
        names = [field.name.replace("_", "-") for field in dataclasses.fields(TrainConfig)]
        arguments = []
        for _ in range(rng.randrange(1, 3)):
            value = rng.choice([*TEXTS, *(str(v) for v in ODD if v != 10**400)])
            flag = "--" + rng.choice(names)
            arguments += [f"{flag}={value}"] if rng.random() < 0.7 else [flag, value]
        arguments = [a for a in arguments if not a.startswith(("--config", "-h"))]
        self._check_config(config_from_cli(arguments))

    def fuzz_optimizer(self, rng: random.Random) -> None:
        """Arguments of optimizers, with an update by each."""
        name = rng.choice(list(OPTIMIZERS))
        keys = [
            "betas",
            "eps",
            "bias_correction",
            "weight_decay",
            "momentum",
            "ns_steps",
            "nesterov",
        ]
        keys += ["dampening", "clip_threshold", "decay_rate", "beta_1", "scale_parameter", "x"]
        values = [*ODD, [0.9, 0.99], [0.5, "x"], 0.1, 0.9, 5, 10**6, 10**10, [1e-30, 1e-3], [-1, 2]]
        arguments = {rng.choice(keys): rng.choice(values) for _ in range(rng.randrange(3))}
        config = TrainConfig.from_dict({"optimizer": name, "optimizer_config": {name: arguments}})
        self._check_config(config)
        self._update(build_optimizer(config))

    def fuzz_schedule(self, rng: random.Random) -> None:
        """Schedules of the learning rate, with an update by each."""
        names = ["cosine_decay", "step_decay", "linear_schedule", "exponential_decay", "x"]
        numbers = [*ODD, 1e-5, 0.9, 1000, 10, 0.1, 1e-5, 100]
        schedule = {
            "name": rng.choice([*names, "join_schedules"]),
            "arguments": [rng.choice(numbers) for _ in range(rng.randrange(5))],
        }
        if rng.random() < 0.4:
            schedule |= {"name": "cosine_decay", "arguments": [1e-5, rng.randint(1, 999)]}
        if rng.random() < 0.3:
            schedule["warmup"] = rng.choice(numbers)
        schedule = mutate(rng, schedule) if rng.random() < 0.2 else schedule
        self._update(build_optimizer(TrainConfig.from_dict({"lr_schedule": schedule})))

    def _update(self, optimizer: Any) -> None:
        weights, gradient = {"x": mx.ones((2, 3))}, {"x": mx.full((2, 3), 0.5)}
        found = optimizer.apply_gradients(gradient, weights)["x"]
        mx.eval(found)
        require(math.isfinite(float(optimizer.learning_rate)), "a learning rate that is none")
        require(found.shape == (2, 3), "an update of another shape")

    def fuzz_plan(self, rng: random.Random) -> None:
        """A plan file."""
        path = self.folder / "plan.json"
        path.write_bytes(as_json(rng, json.loads(Plan().json())))
        plan = Plan.read(path)
        require(Plan.from_json(plan.json(), "x") == plan, "a plan changes when it is written")
        for key, value in json.loads(path.read_bytes().decode("utf-8-sig")).items():
            require(key == "version" or getattr(plan, key) == value, f"{key} is not {value}")

    def fuzz_machine(self, rng: random.Random) -> None:
        """The cache of this machine's rates."""
        path = self.folder / "machine.json"
        rates = dict.fromkeys((field.name for field in dataclasses.fields(machine.Rates)), 1e9)
        path.write_bytes(as_json(rng, {"key": {"rates": rates, "measured": 1.7e9}}))
        for rates, _ in machine._read(path).values():
            numbers = dataclasses.astuple(rates)
            require(all(0 < n < math.inf for n in numbers), "a rate that is none")

    def fuzz_measured(self, rng: random.Random) -> None:
        """The cache of measured steps."""
        path = self.folder / "measured.json"
        rows = [["update", [0], [1, 16, 16, 0], [100, 0.5]]]
        rows += [["forward", [1, 2, None, "a", None, "b", True], [1, 16, 16, 0], [100, 0.5]]]
        path.write_bytes(as_json(rng, {"version": VERSION, "models": {"key": rows}}, 4))
        measurements = Measurements(path, "key")
        measurements.read()
        for _, _, shape, taken in measurements.rows():
            require(min(dataclasses.astuple(shape)) >= 0, "a negative shape")
            require(0 <= taken.bytes < math.inf, "a size that is none")
            require(0 <= taken.seconds < math.inf, "a time that is none")

    def fuzz_config(self, rng: random.Random) -> None:
        """config.json of a model, which is then adapted and computed."""
        path = self.model / "config.json"
        path.write_bytes(as_json(rng, json.loads(self.good[path])))
        lazy = load_lazily(read_checkpoint(self.model))
        add_lora(lazy.model, 1)
        checked_blocks(lazy.model)
        mx.eval(lazy.model(mx.zeros((1, 3), mx.int32)))
        held = {name: info.shape for name, (_, info) in lazy.checkpoint.tensors.items()}
        for array, place in lazy.raw.values():
            require(tuple(array.shape) == tuple(held[place.name]), f"another shape of {place.name}")

    def fuzz_tokenizer(self, rng: random.Random) -> None:
        """tokenizer.json, tokenizer_config.json and the chat template, with rows encoded."""
        path = self.model / rng.choice(["tokenizer.json", "tokenizer_config.json"])
        template = self.model / "chat_template.jinja"
        if rng.random() < 0.3:
            text = rng.choice(TEMPLATES)
            if rng.random() < 0.5:
                text = damage(rng, self.good[template]).decode("utf-8", "replace")
            template.write_text(text)
        else:
            path.write_bytes(as_json(rng, json.loads(self.good[path])))
        tokenizer = load_tokenizer_of(self.lazy)
        place = self.folder / "rows"
        place.mkdir(exist_ok=True)
        (place / "train.jsonl").write_text(json.dumps(rng.choice(ROWS)) + "\n")
        self._check_sets(tokenizer, place, rng)

    def fuzz_adapter_config(self, rng: random.Random) -> None:
        """adapter_config.json beside good weights."""
        path = self.adapter / "adapter_config.json"
        path.write_bytes(as_json(rng, json.loads(self.good[path])))
        base_model(self.adapter)
        note = check_adapter(self.adapter / "adapters.safetensors")
        require(note is None, "a checksum is not looked at")
        lazy = open_lazy(str(self.model), self.adapter, self.folder / "cache")
        saved, good = json.loads(path.read_bytes()), json.loads(self.good[path])
        same = saved["lora_parameters"]["scale"] == good["lora_parameters"]["scale"]
        require(same, f"another scale: {saved['lora_parameters']['scale']}")
        mx.eval(lazy.model(mx.zeros((1, 3), mx.int32)))

    def fuzz_adapter(self, rng: random.Random) -> None:
        """The file of an adapter's weights, with a checksum and without."""
        path = self.adapter / "adapters.safetensors"
        good = rng.choice([self.good[path], self.unchecked])
        content = self._header(rng, good)
        path.write_bytes(content)
        note = check_adapter(path)
        zeros = {name: mx.zeros(shape) for name, shape in self.shapes.items()}
        for name, array in read_adapter_weights(path, zeros):
            require(tuple(array.shape) == tuple(self.shapes[name]), "another shape")
        require(content == self.good[path] or note is not None, "damage in spite of a checksum")

    def fuzz_header_of_shard(self, rng: random.Random) -> None:
        """The header of a shard."""
        path = self.model / "model.safetensors"
        content = self._header(rng, self.good[path])
        path.write_bytes(content)
        tensors = read_checkpoint(self.model).tensors
        end = 8 + struct.unpack("<Q", content[:8])[0]
        for name, (_, info) in sorted(tensors.items(), key=lambda item: item[1][1].start):
            width = np.dtype(DTYPES[info.dtype][1]).itemsize
            require(info.start == end, f"a hole before {name}")
            require(info.stop - info.start == math.prod(info.shape) * width, f"bytes of {name}")
            end = info.stop
        require(end == len(content), "bytes after the last tensor")
        load_lazily(read_checkpoint(self.model))

    def _header(self, rng: random.Random, content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        header, rest = content[8 : 8 + length], content[8 + length :]
        if rng.random() < 0.2:
            return damage(rng, content)
        text = as_json(rng, json.loads(header), 4)
        length = (
            rng.choice([0, 2**63, 2**64 - 1, len(text) + 1, 10**8])
            if rng.random() < 0.1
            else len(text)
        )
        return struct.pack("<Q", length) + text + rest
