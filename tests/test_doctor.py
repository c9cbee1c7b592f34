"""`python -m mlx_edgelora.doctor`: what it tells, and that no failure, name or folder spoils it."""

import errno
import json
import os
import pwd
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_edgelora import doctor
from mlx_edgelora.checkup import probes, report, system, training
from mlx_edgelora.checkup.job import Checkup, Sizes, default_sizes
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.layers.fused import Backend

SMALL = Sizes(
    head_sizes=(64, 128),
    heads=2,
    tokens=32,
    dtypes=("float32",),
    disk_bytes=2**20,
    shape="small",
    blocks=2,
    row_tokens=32,
    steps=2,
)
STEP = {
    *("name", "budget_bytes", "expected_bytes", "needs_bytes", "measured_bytes"),
    *("expected_seconds", "seconds", "footprint_bytes", "plan", "shape", "phases"),
}
# Names in the report by section, and by the name of a table those of its rows: files of other
# machines are read by them. Raise `report.VERSION` if one goes.
NAMES = {
    "versions": {
        *("system", "version", "architecture", "rosetta", "model", "chip", "cores"),
        *("memory_bytes", "blas", "python", "mlx", "mlx-metal", "mlx-lm", "mlx-edgelora"),
        *("numpy", "transformers", "tokenizers", "commit", "settings"),
    },
    "device": {"default", "metal", "cuda", "info"},
    "memory": {
        "free_bytes",
        "budget_bytes",
        "budget_why",
        "pressure",
        "free_percent",
        "system_says",
    },
    "precision": {"relative_error", "tf32"},
    "wrap": {"page_bytes", "mapping_is_read_back", "wraps"},
    "disk": {"free_bytes", "file_bytes", "calls", "times"},
    "caches": {"folder", "clean_removes_bytes", "caches"},
    "verify": {"comparisons", "largest_error", "wrong"},
    "steps": {"model", "batch", "dtype", "steps"},
    "attention": {"rows", "heads", "tokens", "itemsize", "calls"},
    "rates": {"evaluation_seconds", "rates"},
    "footprint": {"before_bytes", "after_bytes", "active_bytes", "cache_bytes"},
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The whole command with small sizes: status, lines, report; there is no network."""

    def refuse(*args, **rest):
        raise AssertionError("the network is used")

    folder, lines = tmp_path_factory.mktemp("doctor"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr("builtins.print", lambda text="", **rest: lines.append(text))
        patch.chdir(folder)
        status = doctor.main(["--report", "--spill-dir", str(folder)], SMALL)
    found = sorted(path.name for path in folder.iterdir())
    assert found == [doctor.FILE]  # scratch files are gone
    return status, "\n".join(lines), json.loads((folder / doctor.FILE).read_text())


def test_all_is_told(ran):
    status, text, written = ran
    assert status == 0 and "Nothing failed." in text
    assert {
        name: section["error"] for name, section in written["sections"].items()
    } == dict.fromkeys(NAMES)
    assert written["complete"] and written["seconds"] > 0
    assert max(map(len, text.splitlines())) <= 80
    assert text.index("versions (") < text.index("footprint (")
    assert f"The report is in {doctor.FILE}\nPlease paste it into an issue" in text


def test_names_are_those_of_the_version(ran):
    _, _, written = ran
    assert (written["schema"], written["version"]) == ("mlx-edgelora-report", 1)
    assert {name: set(part["found"]) for name, part in written["sections"].items()} == NAMES
    found = {name: part["found"] for name, part in written["sections"].items()}
    assert [set(row) for row in found["steps"]["steps"]] == [STEP] * 3
    assert [row["name"] for row in found["steps"]["steps"]] == ["least", "twice", "plenty"]
    for row in found["steps"]["steps"]:
        assert {"kind", "way", "load", "bytes", "seconds"} in [set(p) for p in row["phases"]]
    call = {"head_size", "block", "gradient", "peak_bytes", "seconds"}
    assert [set(row) for row in found["attention"]["calls"]] == [call] * (
        8 if probes.on_gpu() else 4
    )
    assert [row["dtype"] for row in found["rates"]["rates"]] == ["float32"]
    assert found["rates"]["rates"][0]["flops"] > 0
    assert {"what", "seconds", "bytes_per_second"} == set(found["disk"]["times"][0])
    assert all({"start", "bytes"} <= set(row) for row in found["wrap"]["wraps"])


def test_figures_are_those_of_the_machine(ran):
    sections = {name: part["found"] for name, part in ran[2]["sections"].items()}
    assert sections["versions"]["mlx"] == mx.__version__
    assert sections["verify"]["comparisons"] >= 4 and sections["verify"]["wrong"] == []
    assert 0 < sections["precision"]["relative_error"] < 1e-2
    least, twice, plenty = sections["steps"]["steps"]
    assert twice["budget_bytes"] == 2 * least["needs_bytes"] < plenty["budget_bytes"]
    assert least["measured_bytes"] < plenty["measured_bytes"]
    assert least["plan"]["head"] == "streamed" and plenty["plan"]["tile_tokens"] is None
    gradients = {row["gradient"]: row["peak_bytes"] for row in sections["attention"]["calls"]}
    assert gradients[True] > gradients[False] > 0


@pytest.fixture
def run_command(tmp_path, monkeypatch, capsys):
    """run_command(section=function, ...) -> status, text and report, of these sections."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, sizes=SMALL, **sections):
        monkeypatch.setattr(report, "SECTIONS", sections)
        status = doctor.main(["--report", "r.json", "--spill-dir", str(tmp_path), *flags], sizes)
        file = tmp_path / "r.json"
        return status, capsys.readouterr(), json.loads(file.read_text()) if file.exists() else None

    return run


@pytest.mark.parametrize(
    ("name", "failure"),
    [
        ("first", RuntimeError),
        ("second", ValueError),
        ("third", OSError),
        ("second", AttributeError),
        ("second", MemoryError),
    ],
)
def test_what_fails_is_told_and_the_others_go_on(run_command, name, failure):
    def fails(job):
        raise failure("[METAL] Command buffer execution failed:\n Caused GPU Timeout Error")

    sections = dict.fromkeys(["first", "second", "third"], lambda job: {"figure": 1})
    status, printed, found = run_command(**sections | {name: fails})
    assert status == 1
    sentence = (
        f"{failure.__name__}: [METAL] Command buffer execution failed: Caused GPU Timeout Error"
    )
    for other in sections:
        wanted = ({}, sentence) if other == name else ({"figure": 1}, None)
        part = found["sections"][other]
        assert (part["found"], part["error"]) == wanted
    assert f" {name}: {sentence} " in " ".join(printed.out.split())


def test_a_part_that_fails_leaves_the_others_of_its_section(run_command, monkeypatch):
    own = mx.fast.scaled_dot_product_attention

    def fails(q, *args, **rest):
        if q.shape[-1] == 128:
            raise RuntimeError("no kernel")
        return own(q, *args, **rest)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", fails)
    monkeypatch.setattr(probes, "on_gpu", lambda: False)
    status, printed, found = run_command(attention=probes.attention)
    calls = found["sections"]["attention"]["found"]["calls"]
    assert [row.get("error") for row in calls] == [None] * 2 + ["RuntimeError: no kernel"] * 2
    assert status == 1 and "attention: RuntimeError: no kernel" in printed.out


def test_a_table_that_is_too_wide_is_told_row_by_row(run_command):
    row = {f"figure_{number}": 1.5 for number in range(12)}
    _, printed, _ = run_command(rates=lambda job: {"rates": [row, row]})
    assert max(map(len, printed.out.splitlines())) <= 80
    assert printed.out.count("figure 11 1.5") == 2


def test_without_the_least_plenty_is_still_tried(run_command, monkeypatch):
    own = training.open_planned

    def fails(config, notify):
        if config.memory_budget == "min":
            raise EdgeLoraError("too small")
        return own(config, notify)

    monkeypatch.setattr(training, "open_planned", fails)
    _, _, found = run_command(steps=training.steps)
    least, twice, plenty = found["sections"]["steps"]["found"]["steps"]
    assert least == {"name": "least", "error": "too small"}
    assert twice["error"] == "skipped: the smallest budget is not known"
    assert plenty["measured_bytes"] > 0


def test_a_report_is_left_if_the_process_dies(run_command):
    def dies(job):
        raise KeyboardInterrupt

    status, _, found = run_command(first=lambda job: {"figure": 1}, second=dies)
    assert (status, found["complete"], list(found["sections"])) == (130, False, ["first"])


def test_what_is_slow_is_left_out_when_the_time_is_over(run_command):
    sections = {"verify": training.verify, "rates": probes.rates, "precision": probes.precision}
    _, _, found = run_command(sizes=replace(SMALL, seconds=-1.0), **sections)
    left_out = "skipped: the limit of -1 seconds was reached"
    assert found["sections"]["verify"]["error"] == left_out
    assert found["sections"]["rates"]["found"]["rates"][0]["error"] == left_out
    assert found["sections"]["precision"]["error"] is None


def test_nothing_private_is_in_it(run_command, tmp_path, monkeypatch):
    home = tmp_path / "Users" / "zaphod.b"
    work = home / "Secret Project"
    work.mkdir(parents=True)
    account = SimpleNamespace(pw_gecos="Zaphod Beeblebrox,,,", pw_name="zaphod.b", pw_dir=str(home))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "zbeeble")
    monkeypatch.setenv("MLX_METALLIB", f"{home}/kernels")
    monkeypatch.setattr(pwd, "getpwuid", lambda number: account)
    monkeypatch.setattr(socket, "gethostname", lambda: "heart-of-gold.local")
    monkeypatch.setattr("platform.node", lambda: "golden")

    def careless(job):
        raise OSError(
            f"{home}/Library/x and {work}/y and {job.folder}/z of Zaphod Beeblebrox, zaphod.b "
            "(zbeeble@golden, heart-of-gold.local alias heart-of-gold)"
        )

    cheap = {name: report.SECTIONS[name] for name in ("versions", "device", "memory", "wrap")}
    monkeypatch.chdir(work)
    _, printed, _ = run_command("--report", str(tmp_path / "r.json"), careless=careless, **cheap)
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text)["sections"]["careless"]["error"] == (
        "OSError: ~/Library/x and <here>/y and <scratch>/z of <user>, <user> "
        "(<user>@<host>, <host> alias <host>)"
    )
    assert json.loads(text)["sections"]["versions"]["found"]["settings"]["MLX_METALLIB"] == (
        "~/kernels"
    )
    for private in (
        "zaphod",
        "zbeeble",
        "Beeblebrox",
        "heart-of",
        "golden",
        "Secret",
        str(tmp_path),
    ):
        assert private.lower() not in text.lower()
        assert private.lower() not in printed.out.partition("\nThe report is in")[0].lower()


@pytest.fixture
def metal(monkeypatch):
    """metal(function) -> the wraps, where MLX wraps mapped memory as the function does."""

    def run(asarray, folder):
        monkeypatch.setattr(mx, "asarray", asarray)
        return probes.wrap(Checkup(folder, SMALL, 0))["wraps"]

    return run


def test_refused_wraps_are_recorded(metal, tmp_path):
    def whole_pages(region, copy):
        if region.ctypes.data % probes.mmap.PAGESIZE or region.size % probes.mmap.PAGESIZE:
            raise ValueError("[metal::make_buffer] no whole pages")
        return mx.array(region)

    rows = metal(whole_pages, tmp_path)
    assert [row.get("right") for row in rows] == [True, None, None, None, True]
    assert {row.get("error") for row in rows[1:4]} == {
        "ValueError: [metal::make_buffer] no whole pages"
    }


def test_wrong_wraps_are_told(metal, tmp_path, run_command):
    page = probes.mmap.PAGESIZE
    metal(lambda region, copy: mx.zeros(region.shape, mx.uint8), tmp_path)
    status, printed, found = run_command(wrap=probes.wrap)
    assert [row["right"] for row in found["sections"]["wrap"]["found"]["wraps"]] == [False] * 5
    assert status == 1 and f"wrap: WRONG: {page + 512} bytes from {page}" in printed.out


def test_kernels_of_cuda_have_time_to_be_compiled(monkeypatch):
    for name, seconds in (("cpu", 90), ("metal", 90), ("cuda", 500)):
        here = Backend(name, (0, 32, 4), 9)
        monkeypatch.setattr(Backend, "here", classmethod(lambda cls, here=here: here))
        assert default_sizes().seconds == seconds


def test_on_a_gpu_both_blocks_are_set_and_taken_back(monkeypatch, tmp_path):
    seen, own = [], mx.fast.scaled_dot_product_attention

    def spy(q, *args, **rest):
        seen.append((os.environ[probes.BLOCK], q.shape[-1], q.dtype))
        return own(q, *args, **rest)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(probes, "on_gpu", lambda: True)
    monkeypatch.setenv(probes.BLOCK, "77")
    found = probes.attention(Checkup(tmp_path, SMALL, 0))
    wanted = {(block, size, mx.bfloat16) for block in ("1024", "256") for size in (64, 128)}
    assert set(seen) == wanted and os.environ[probes.BLOCK] == "77"
    assert [row["block"] for row in found["calls"][:4]] == [1024, 1024, 256, 256]
    assert found["itemsize"] == 2


def test_products_in_fewer_bits_are_named(monkeypatch, tmp_path):
    assert probes.precision(Checkup(tmp_path, SMALL, 0))["tf32"] is False
    make = mx.array

    def coarse(values, *args):  # ten bits of mantissa, as matrix units have
        bits = np.asarray(values).view(np.uint32) & np.uint32(0xFFFFE000)
        return make(bits.view(np.float32))

    monkeypatch.setattr(mx, "array", coarse)
    found = probes.precision(Checkup(tmp_path, SMALL, 0))
    assert found["tf32"] is True and 1e-4 < found["relative_error"] < 1e-2


def test_macs_sync_to_the_medium(run_command, monkeypatch):
    def refuses(descriptor, command):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(probes.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(probes.fcntl, "fcntl", refuses)
    _, printed, found = run_command(disk=probes.disk)
    times = {row["what"]: row for row in found["sections"]["disk"]["found"]["times"]}
    assert list(times) == ["write", "fsync", "full sync", "read"]
    assert "Operation not supported" in times["full sync"]["error"]
    assert times["read"]["seconds"] > 0 and "F_FULLFSYNC" in printed.out


def test_macs_are_asked_in_their_own_words(run_command, monkeypatch):
    texts = {
        ("sysctl", "-n", "machdep.cpu.brand_string"): "Apple M4 Max",
        ("sysctl", "-n", "hw.model"): "Mac16,5",
        ("sysctl", "-n", "kern.memorystatus_vm_pressure_level"): "2",
        ("vm_stat",): "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free: 1.",
    }

    def run(command, **rest):
        if command not in texts:
            raise FileNotFoundError(2, "No such file", command[0])
        return SimpleNamespace(stdout=texts[command] + "\n")

    monkeypatch.setattr(system.subprocess, "run", run)
    monkeypatch.setattr(system, "commit", lambda: None)
    monkeypatch.setattr("platform.mac_ver", lambda: ("26.3", ("", "", ""), "arm64"))
    monkeypatch.setattr(system, "default_budget", lambda: (10**9, "as the test says"))
    _, _, found = run_command(versions=system.versions, memory=system.memory)
    versions, memory = (found["sections"][name]["found"] for name in ("versions", "memory"))
    assert (versions["chip"], versions["model"]) == ("Apple M4 Max", "Mac16,5")
    assert versions["version"] == "26.3"
    assert (memory["pressure"], memory["free_percent"]) == ("2", None)
    assert memory["system_says"] == texts["vm_stat",].splitlines()


def test_too_much_memory_and_wrong_gradients_are_told(run_command):
    row = {"name": "least", "budget_bytes": 10**6, "measured_bytes": 2 * 10**6}
    status, printed, found = run_command(
        steps=lambda job: {"steps": [row, row | {"measured_bytes": 10**6}]},
        verify=lambda job: {"wrong": ["TransformerBlock 0, whole: scaled"]},
        endless=lambda job: {"figure": float("nan")},
    )
    assert status == 1
    assert [line for line in printed.out.splitlines() if "took" in line] == [
        "  steps: least took 2.00 MB of 1.00 MB"
    ]
    assert "verify: WRONG: TransformerBlock 0, whole: scaled" in printed.out
    assert found["sections"]["endless"]["found"] == {"figure": "nan"}  # JSON has no such number


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--repor", "x"], "error: command line: unrecognized arguments: --repor x; --help"),
        (["--report", "nowhere/r.json"], "error: --report: nowhere is not a folder; choose a"),
        (["--report", "."], "error: --report: . is a folder, expected a file; name one in it"),
        (["--spill-dir", "nowhere"], "error: --spill-dir: nowhere cannot be written (No such file"),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path, monkeypatch, capsys, flags, sentence):
    monkeypatch.chdir(tmp_path)
    assert doctor.main(flags, SMALL) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(sentence) and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_a_file_it_prints_only(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "SECTIONS", {"precision": probes.precision})
    cache = os.environ["XDG_CACHE_HOME"]
    assert doctor.main([], SMALL) == 0
    assert "relative error" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [] and os.environ["XDG_CACHE_HOME"] == cache


def test_what_earlier_runs_measured_is_not_used(run_command):
    places = []
    run_command(one=lambda job: places.append((os.environ["XDG_CACHE_HOME"], job.folder)) or {})
    assert Path(places[0][0]) == places[0][1] and not places[0][1].exists()
