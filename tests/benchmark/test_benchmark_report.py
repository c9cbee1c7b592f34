"""What the report of a comparison shows."""

from mlx_edgelora.benchmark.report import COLUMNS, BenchmarkReport, ContextResults
from mlx_edgelora.benchmark.results import Result, Step


def measured(name, peak, losses=(3.0, 2.5), **values):
    steps = [Step(1.0, loss, 10**6, 10**6, False) for loss in losses]
    return Result(name, peak=peak, footprint=2 * peak, bare=10**7, steps=steps, **values)


def report_of(*results, movement=0.5):
    context = ContextResults(512, 512, 0.3, movement, list(results))
    settings = {"model": "random smollm2-135m, 6 of 30 blocks", "dtype": "float32"}
    return BenchmarkReport("", "", {}, {}, None, settings, contexts=[context])


def test_multiples_come_first_and_notes_once_below():
    theirs = measured("mlx-lm", 10**9)
    narrow = "mlx-lm, checkpointing, narrow"
    others = [measured(narrow, 8 * 10**8, ratios=[1.2, 1.25, 1.3], adapter_gap=1e-5)]
    for name, budget, peak in (("25 %", 2 * 10**8, 1.9e8), ("min", "min", 123_456)):
        own = measured(f"mlx-edgelora, {name}", peak, (3.0, 2.500003), budget=budget)
        own.ratios, own.adapter_gap = [0.5, 0.55, 0.53], 2e-5
        others.append(own)
    report = report_of(theirs, *others)
    report.contexts *= 2
    lines = report.text().splitlines()
    assert lines[0] == (
        "random smollm2-135m, 6 of 30 blocks, float32; 512 tokens, 30 % of them labelled"
    )
    assert lines[2].split() == list(COLUMNS)
    assert lines[3].split()[:3] == ["mlx-lm", "1", "1"]
    assert lines[5].split()[2:6] == ["%", "0.19", "0.53", "200"]
    assert max(map(len, lines)) <= 100
    notes = " ".join(report.text().partition("\n- ")[2].split())
    assert (
        notes.count("as a multiple of mlx-lm") == 1
        and "none of which is more than 6 % off" in notes
    )
    assert "A budget in % is a share" in notes
    assert "within 1e-06 of mlx-lm's, trained adapters within 2e-05" in notes


def test_ratios_across_kernels_are_not_printed():
    own = measured("own", 10**9, ratios=[0.1] * 5, adapter_gap=0.0)
    report = report_of(measured("mlx-lm", 10**9), own)
    assert " 0.10 " in report.text()
    own.kernels = "it unpacks"
    assert "0.10" not in report.text() and "- own: no time, for it unpacks" in report.text()
    own.faults = ["its loss drifts"]
    assert "INVALID" in report.text() and "All train the same" not in report.text()


def test_a_movement_that_is_not_known_is_told():
    report = report_of(measured("mlx-lm", 10**9), movement=None)
    assert "No batch came twice" in report.text()
