"""Hostile inputs are refused in a sentence or read rightly; `dev/fuzz.py` makes more of them."""

import pytest
from fuzzing import Fuzzer

# The same inputs as the first of the script.
COUNT = 300


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


def test_inputs_are_refused_in_a_sentence_or_read_rightly(fuzzer):
    outcomes: dict[str, set[str]] = {}
    for number in range(COUNT):
        name, outcome = fuzzer.run(number)
        assert outcome in ("accepted", "refused"), f"input {number} of {name}: {outcome}"
        outcomes.setdefault(name, set()).add(outcome)
    assert outcomes.keys() == fuzzer.targets.keys()
    # A target that accepts or refuses everything tests nothing.
    assert all("accepted" in found for found in outcomes.values()), outcomes
    assert sum("refused" in found for found in outcomes.values()) >= len(outcomes) - 2, outcomes
