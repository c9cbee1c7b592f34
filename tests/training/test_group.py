"""Several processes train as one does: gradients, files, failures."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from harness import engine, random_batch, save
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from tiny import make_data, make_model, words, write_rows

from mlx_edgelora import TrainConfig, finetune
from mlx_edgelora.data import Batch
from mlx_edgelora.engine.adapter_state import ResidentAdapterState
from mlx_edgelora.engine.paged_adapters import PagedAdapterState
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.training import finetune as finetuning
from mlx_edgelora.training import group as module
from mlx_edgelora.training.group import Group
from mlx_edgelora.training.sharing import SharedSums, Shares

# A process that waits for another ends within this many seconds.
ENDS = 60


class Second(Group):
    """The second of two processes, whose first one adds the given messages."""

    def __init__(self, messages=()):
        super().__init__()
        self.rank, self.size, self.messages = 1, 2, list(messages)

    def all_sum(self, array):
        return array + self.messages.pop(0)


def batch_of(rows, labels=True):
    tokens = np.arange(rows * 6, dtype=np.int32).reshape(rows, 6)
    return Batch(tokens, np.full((rows, 5), labels), tuple(range(rows)))


def shares_of(rank, size=2, batch_size=4, balance=True):
    group = Group()
    group.rank, group.size = rank, size
    return Shares(group, batch_size, balance)


def rows_of(pieces):
    return [[int(row[0]) // 6 for row in piece.tokens] for piece in pieces]


def test_every_row_is_in_one_share():
    whole = batch_of(5)
    assert rows_of(shares_of(0, batch_size=5).pieces(whole)) == [[0, 2, 4]]
    assert rows_of(shares_of(1, batch_size=5).pieces(whole)) == [[1, 3]]
    assert Shares(Group(), 5).pieces(whole) == [whole]
    assert shares_of(1).pieces(batch_of(1)) == []  # no row
    assert shares_of(1).pieces(batch_of(4, labels=False)) == []  # no label
    packed = replace(whole, starts=np.arange(25).reshape(5, 5))
    (mine,) = shares_of(1, batch_size=5).pieces(packed)
    assert mine.starts[:, 0].tolist() == [5, 15]


def test_a_faster_process_gets_more_rows_in_pieces_that_fit_its_plan():
    fast, slow = shares_of(0), shares_of(1)
    for shares in (fast, slow):
        shares.measured([1.0, 90.0])  # of the step that compiles
        for _ in range(3):
            shares.measured([30.0, 10.0])
    whole = batch_of(4)
    assert rows_of(fast.pieces(whole)) == [[0, 2], [1]]  # two are its even share
    assert rows_of(slow.pieces(whole)) == [[3]]
    assert fast.news() == "rows of a batch by process: 3, 1" and fast.news() is None
    even = shares_of(0, balance=False)
    even.measured([30.0, 10.0])
    assert even.speeds() == [] and even.news() is None
    assert rows_of(even.pieces(whole)) == [[0, 2]]


def test_a_speed_is_of_the_rows_and_without_the_waiting():
    shares = shares_of(1)
    with shares.timed(shares.pieces(batch_of(4))):
        shares._group.waited += 1e6
    assert shares.speeds() == [0, 1]  # nothing is known: more was waited for than spent
    shares._group.waited = 0.0
    with shares.timed(shares.pieces(batch_of(4))):
        time.sleep(0.02)
    zero, own = shares.speeds()
    assert zero == 0 and 1 < own < 2 / 0.02


def test_sums_are_one_message_and_keep_shapes_and_dtypes():
    group = Second([mx.arange(10, dtype=mx.float32)])
    arrays = {"b": mx.ones((2, 3)), "a": mx.ones((4,), mx.bfloat16)}
    sums = group.send(arrays).sums()
    assert sums["a"].tolist() == [1, 2, 3, 4] and sums["a"].dtype == mx.bfloat16
    assert sums["b"].tolist() == [[5, 6, 7], [8, 9, 10]]
    assert not group.messages


@pytest.mark.parametrize("paged", [False, True])
def test_messages_have_one_order_whatever_the_plan(tmp_path, paged):
    """Blocks that come late, all at once, or not at all; what a process lacks is zero."""
    model = adapted()
    specs = {name: value.shape for name, value in tree_flatten(model.trainable_parameters())}
    state = PagedAdapterState(model, tmp_path) if paged else ResidentAdapterState(model)
    state.start(optimizers.SGD(0.1))
    blocks = {}
    for name in specs:
        blocks.setdefault(name.split(".")[1], []).append(name)
    sizes = {key: sum(math.prod(specs[n]) for n in names) for key, names in blocks.items()}
    last, first = sorted(blocks, reverse=True)
    assert sizes[last] != sizes[first]  # by which the order is seen
    group = Second([mx.ones(sizes[last]), mx.ones(sizes[first])])
    sums = SharedSums(state, model, group)
    state.add({name: mx.full(specs[name], 2.0) for name in specs})
    sums.add(list(specs))  # not before `begin`
    assert len(group.messages) == 2
    sums.begin()
    sums.add(blocks[first])
    assert len(group.messages) == 2  # its turn has not come
    sums.add(blocks[last])
    assert not group.messages
    sums.finish()
    assert all((value == 3).all().item() for value in dict(state.gradients()).values())
    entries = sum(sizes.values())
    assert sums.magnitudes.norm() == pytest.approx(3 * math.sqrt(entries))
    # Nothing of its own: the sums are those of the others.
    state.start(optimizers.SGD(0.1))
    group.messages = [mx.ones(sizes[last]), mx.ones(sizes[first])]
    sums.begin()
    sums.finish()
    assert len(state.gradients()) == len(specs)
    assert all((value == 1).all().item() for value in dict(state.gradients()).values())
    state.close()


def adapted():
    """Two blocks with adapters of different sizes."""
    model = nn.Module()
    model.layers = [nn.Module(), nn.Module()]
    for index, layer in enumerate(model.layers):
        layer.freeze()
        layer.up = LoRALinear(8, 6 + index, r=2)
        layer.up.linear.freeze()
    return model


def test_a_failure_elsewhere_is_an_error_here():
    group = Second([mx.array([1.0, 0.0])])
    with pytest.raises(Exception, match="another process of this run has failed"):
        group.exchange([3.0])
    told = Second([mx.zeros(3)])
    with pytest.raises(ZeroDivisionError), told.failing_together(2):
        _ = 1 / 0
    assert not told.messages  # the others were told
    told, calls = Second([mx.zeros(3)]), []
    with pytest.raises(ZeroDivisionError), told.failing_together(2, lambda: calls.append(1)):
        _ = 1 / 0
    assert calls == [1]  # the messages of gradients come first


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Run:
    """Processes of `mlx-edgelora train`, joined as `mlx.launch` joins them."""

    def __init__(self, folder, count, options, own=None):
        hosts = folder / f"hosts-{count}.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
        self.processes = []
        for rank in range(count):
            environment = os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
            if count == 1:
                environment = {k: v for k, v in os.environ.items() if not k.startswith("MLX_HOST")}
            flags = [
                f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}")
                for k, v in (options | (own or {}).get(rank, {})).items()
            ]
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "mlx_edgelora.train", *flags],
                    env=environment,
                    cwd=folder,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def end(self, seconds=120):
        """Exit statuses and standard errors."""
        ends = [process.communicate(timeout=seconds) for process in self.processes]
        self.outputs = [output for output, _ in ends]
        return [process.returncode for process in self.processes], [error for _, error in ends]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    make_model(folder / "model")
    data = make_data(folder / "data", rows=9)
    rng = np.random.default_rng(1)
    write_rows(  # ragged
        data / "train.jsonl",
        [{"text": words(rng.integers(0, 100, n))} for n in rng.integers(3, 29, 11)],
    )
    return folder


def options_of(place, name, **changes):
    return {
        "model": place / "model",
        "data": place / "data",
        "adapter_path": place / name,
        "batch_size": 3,
        "iters": 5,
        "grad_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "learning_rate": 0.05,
        "num_layers": 2,
        "steps_per_report": 1,
        "val_batches": 2,
        "verify": "off",
        "optimizer": "sgd",
        "log": place / f"{name}.jsonl",
    } | changes


def adapter(place, name):
    return mx.load(str(place / name / "adapters.safetensors"))


def reported(place, name, *kinds):
    """Values of the given kinds in every report."""
    records = map(json.loads, (place / f"{name}.jsonl").read_text().splitlines())
    return [record[kind] for record in records for kind in kinds if record.get(kind) is not None]


def assert_same_run(place, one, other):
    kinds = "train_loss", "val_loss"
    expected = reported(place, one, *kinds)
    assert len(expected) > 5
    np.testing.assert_allclose(reported(place, other, *kinds), expected, rtol=1e-5)
    norms = (reported(place, name, "grad_norm") for name in (other, one))
    np.testing.assert_allclose(*norms, rtol=1e-3)  # Adam blows up what rounds differently


@pytest.mark.slow
@pytest.mark.alone
def test_two_processes_learn_what_one_does(place):
    """Batches that do not divide, ragged rows, accumulation, clipping; two budgets."""
    one = Run(place, 1, options_of(place, "one"))
    statuses, errors = one.end()
    assert statuses == [0], errors
    two = Run(place, 2, options_of(place, "two"), {1: {"memory_budget": "min"}})
    statuses, errors = two.end()
    assert statuses == [0, 0], errors
    assert "processes  2, which share the rows of every batch" in two.outputs[0]
    assert two.outputs[1] == ""
    assert_same_run(place, "one", "two")
    # SGD moves parameters by gradients, where Adam would blow up what rounds differently.
    ours, theirs = adapter(place, "one"), adapter(place, "two")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert mx.abs(value - theirs[name]).max().item() < 2e-6, name
    assert (
        max(mx.abs(value).max().item() for name, value in ours.items() if "lora_b" in name) > 1e-3
    )


@pytest.mark.parametrize("parts", [1, 3])
def test_what_is_sent_is_the_sum_of_all_micro_batches(tmp_path, parts):
    with closing(engine(save(tmp_path, "llama", True), micro_batches=parts)) as ours:
        state = ours.adapters
        state.start(optimizers.SGD(0.1))
        group = Second()
        group.all_sum = lambda array: array  # the others have nothing
        sums, sent = SharedSums(state, ours.model, group), {}
        replace_sums = state.replace
        state.replace = lambda some, look: (sent.update(some), replace_sums(some, look))
        sums.begin()

        def sink(gradients):
            names = list(gradients)
            state.add(gradients)
            if ours.in_last_part:
                sums.add(names)
                assert sum(map(len, sums._order[: sums._sent])) > 0  # sent on the way

        ours.backward(random_batch(4), sink)
        sums.finish()
        sent = {name: mx.array(value) for name, value in sent.items()}
        state.start(optimizers.SGD(0.1))
        ours.backward(random_batch(4), state.add)
        expected = dict(state.gradients())
        assert sent.keys() == expected.keys()
        assert all(mx.array_equal(sent[name], value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.alone
def test_a_slow_process_gets_fewer_rows(place):
    """Each with its own budget and speed; learned is what one process learns."""
    more = {"batch_size": 8, "iters": 8, "val_batches": 1}
    statuses, errors = Run(place, 1, options_of(place, "alone", **more)).end()
    assert statuses == [0], errors
    own = {1: {"memory_budget": "min", "duty": 0.1}}
    run = Run(place, 2, options_of(place, "balanced", balance=True, **more), own)
    statuses, errors = run.end()
    assert statuses == [0, 0], errors
    lines = [x for x in run.outputs[0].splitlines() if "rows of a batch by process" in x]
    divided = [tuple(map(int, line.split(":")[1].split(","))) for line in lines]
    assert all(sum(rows) == 8 for rows in divided)
    assert max(fast for fast, _ in divided) > 5  # whatever else the machine does at the last step
    assert_same_run(place, "alone", "balanced")


@pytest.mark.slow
@pytest.mark.alone
def test_two_processes_compare_what_one_does(place):
    """Pairs of different lengths, in batches that do not divide; rewards are of all processes."""
    rng, data = np.random.default_rng(1), place / "pairs"
    data.mkdir(exist_ok=True)
    for split in ("train", "valid"):
        texts = [
            [words(rng.integers(0, 100, n)) for n in row] for row in rng.integers(1, 6, (7, 3))
        ]
        parts = ("prompt", "chosen", "rejected")
        write_rows(data / f"{split}.jsonl", [dict(zip(parts, t, strict=True)) for t in texts])
    for count in (1, 2):
        more = {"loss": "orpo", "data": data, "iters": 6}
        statuses, errors = Run(place, count, options_of(place, f"pairs-{count}", **more)).end()
        assert statuses == [0] * count, errors
    assert_same_run(place, "pairs-1", "pairs-2")
    for kind in ("reward_margin", "accuracy"):
        one, two = (reported(place, f"pairs-{count}", kind) for count in (1, 2))
        np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.alone
def test_four_processes_of_which_one_has_no_row(place):
    # Adam divides gradients near zero by themselves, so that rounding decides their sign; with this
    # eps it does not.
    file = place / "eps.yaml"
    file.write_text("optimizer_config: {adamw: {eps: 1.0e-5}}")
    more = {"iters": 20, "grad_accumulation_steps": 1, "optimizer": "adamw", "learning_rate": 1e-3}
    more["config"] = file
    for count in (1, 4):
        statuses, errors = Run(place, count, options_of(place, f"many-{count}", **more)).end(300)
        assert statuses == [0] * count, errors
    assert_same_run(place, "many-1", "many-4")


@pytest.mark.slow
@pytest.mark.alone
def test_a_resumed_run_of_two_processes_ends_with_the_same_bits(place):
    """Dropout included: all processes go on from the random key of the checkpoint."""
    file = place / "dropout.yaml"
    file.write_text("lora_parameters: {rank: 4, scale: 8.0, dropout: 0.3}")
    common = {"config": file, "grad_accumulation_steps": 1, "max_grad_norm": 9}
    ends = []
    for name, stops in (("straight", [6]), ("in-parts", [4, 6])):
        for iters in stops:
            resumes = {"resume": place / name} if iters != stops[0] else {}
            more = common | {"iters": iters} | resumes
            statuses, errors = Run(place, 2, options_of(place, name, **more)).end()
            assert statuses == [0, 0], errors
        ends.append(adapter(place, name))
    assert all(mx.array_equal(a, ends[1][name]).item() for name, a in ends[0].items())


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(
    ("own", "what"),
    [({"learning_rate": 2e-3}, "options"), ({"data": "other"}, "data"), ({"model": "m"}, "model")],
)
def test_processes_with_other_inputs_are_refused(place, own, what):
    if "data" in own:
        own = {"data": make_data(place / "other", rows=5)}
    if "model" in own:
        own = {"model": make_model(place / "m", name="llama")}
    run = Run(place, 2, options_of(place, f"refused-{what}"), {1: own})
    statuses, errors = run.end(ENDS)
    assert statuses == [2, 2], errors
    assert f"process 1 of 2: its {what} differs from that of process 0" in errors[0]
    assert not (place / f"refused-{what}").exists()


@pytest.mark.slow
@pytest.mark.alone
def test_a_killed_process_ends_the_others_and_the_checkpoint_stands(place):
    options = options_of(place, "killed", iters=4000, save_every=2, steps_per_report=2)
    run = Run(place, 2, options)
    saved = place / "killed" / "checkpoints"
    deadline = time.monotonic() + ENDS
    while len(list(saved.glob("[0-9]*"))) < 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    run.processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    statuses, errors = run.end(ENDS)
    assert time.monotonic() - began < ENDS
    assert statuses == [2, -signal.SIGKILL]
    assert "another process of this run has ended or cannot be reached" in errors[0]
    step = max(int(folder.name) for folder in saved.glob("[0-9]*"))
    # It goes on alone, and twice in the same way.
    results = []
    for name in ("again", "more"):
        copied = place / name
        subprocess.run(["cp", "-r", place / "killed", copied], check=True)
        alone = Run(
            place,
            1,
            options
            | {
                "adapter_path": copied,
                "iters": step + 3,
                "resume": copied,
                "accept_changes": "iters",
            },
        )
        statuses, errors = alone.end()
        assert statuses == [0], errors
        results.append(adapter(place, name))
    assert all(mx.array_equal(a, results[1][name]).item() for name, a in results[0].items())


@pytest.mark.slow
@pytest.mark.alone
def test_a_signal_to_one_stops_all_after_the_same_step(place):
    run = Run(place, 2, options_of(place, "stopped", iters=4000))
    line = run.processes[0].stdout.readline()
    while not line.lstrip().startswith("2/4000"):
        line = run.processes[0].stdout.readline()
    run.processes[1].send_signal(signal.SIGTERM)
    statuses, errors = run.end(ENDS)
    assert statuses == [0, 143], errors
    assert "another process was asked to stop: ended after step" in run.outputs[0]
    assert (place / "stopped" / "adapters.safetensors").exists()


def test_a_process_that_finds_no_other_does_not_train_alone(place, monkeypatch):
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.delenv("MLX_HOSTFILE", raising=False)
    monkeypatch.setattr(module, "JOINING", 0)
    with pytest.raises(
        EdgeLoraError, match=r"^process 0: the other processes .* cannot be reached"
    ):
        Group.joined()


def test_versions_are_compared(place, monkeypatch):
    seen = []

    def check_same(self, facts):
        seen.append(facts)
        raise EdgeLoraError("enough")

    monkeypatch.setattr(Group, "check_same", check_same)
    options = {name: str(place / name) for name in ("model", "data")}
    for version in ("1", "2"):
        monkeypatch.setattr(finetuning, "package_versions", lambda v=version: {"mlx": v})
        with pytest.raises(EdgeLoraError, match="enough"):
            finetune(TrainConfig(**options, adapter_path=str(place / "none"), num_layers=2))
    one, other = seen
    assert [name for name in one if one[name] != other[name]] == ["set of package versions"]


def test_one_process_has_nobody_to_share_with(place):
    with pytest.raises(EdgeLoraError, match=r"^balance: got true in a run by one process"):
        finetune(TrainConfig(model=str(place / "model"), data=str(place / "data"), balance=True))


def test_a_run_alone_is_a_group_of_one():
    group = Group()
    assert (group.rank, group.size, group.leads) == (0, 1, True)
    assert group.total([1.5]) == [1.5] and group.exchange([2.0]) == [2.0]
    group.check_same({"model": "00"})
