"""Logs of runs, as a run writes them."""

import json
import math

MB = 10**6


def run_record(**changes):
    return {
        "run": {
            "model": "mlx-community/Llama-3.2-3B-Instruct-4bit",
            "started": "2026-11-27T02:30:00+00:00",
            "version": "0.1.0",
            "iters": 100,
            "facts": {
                "model": "mlx-community/Llama-3.2-3B-Instruct-4bit (28 blocks, 3.21 B parameters)",
                "data": "my_data: 800 rows for training, 64 rows for validation",
                "adapters": "rank 8 on all 28 blocks; trainable 0.38 % (12.2 M of 3.21 B)",
                "optimizer": "adamw, learning rate 0.0003; 100 steps of 4 rows",
            },
            "options": {},
        }
        | changes
    }


def plan_record(**changes):
    return {
        "plan": {
            "budget_bytes": 4000 * MB,
            "budget_reason": "as given",
            "expected_peak_bytes": 3700 * MB,
            "expected_seconds": 2.5,
            "phases": {"forward": 2000 * MB, "backward": 3700 * MB, "update": 900 * MB},
            "rows": {"weights": "from disk", "activations": "computed again"},
        }
        | changes
    }


def loss_record(step, kind="train_loss", loss=None, **changes):
    return {
        "iteration": step,
        kind: 3 * math.exp(-step / 40) + 0.3 if loss is None else loss,
        "learning_rate": 3e-4,
        "tokens_per_second": 400 + step % 7,
        "trained_tokens": 1000 * step,
        "peak_memory_bytes": 3650 * MB,
        "footprint_bytes": (4100 + 3 * (step % 9)) * MB,
        "disk_read_bytes": 0,
        "disk_write_bytes": 0,
        "time": 2.5 * step,
        "recent_peak_bytes": (3600 + step % 5) * MB,
    } | changes


def step_record(blocks=4):
    stretches = [("load", None, 300, 400)]
    stretches += [("forward", block, 400 + 40 * block, 1500) for block in range(blocks)]
    stretches += [("head", None, 560, 2100)]
    for block in reversed(range(blocks)):
        stretches += [
            ("recompute", block, 500, 1800),
            ("backward", block, 900, 3600 - 50 * (blocks - block)),
        ]
    stretches += [("update", None, 300, 700)]
    return {
        "step_memory": [
            {
                "phase": phase,
                "block": block,
                "start_bytes": start * MB,
                "peak_bytes": peak * MB,
                "seconds": 0.1,
            }
            for phase, block, start, peak in stretches
        ]
    }


ANSWERS = {
    "answers": {
        "prompt": "The red fox sees Ada.",
        "expected": '{"who": "fox"}',
        "before": "The fox runs.",
        "after": '{"who": "fox"}',
        "exact_match_before": 0.0,
        "exact_match_after": 0.95,
        "count": 40,
    }
}
END = {"end": {"status": "finished"}}


def whole_log():
    """Every kind of record."""
    records = [run_record(), plan_record(), loss_record(0, "val_loss")]
    records += [loss_record(step) for step in range(5, 101, 5)]
    records.insert(12, loss_record(49, "val_loss"))
    records += [step_record(), {"test": {"loss": 0.5, "tokens": 900}}, ANSWERS, END]
    return records


def lines_of(records):
    return [json.dumps(record).encode() + b"\n" for record in records]
