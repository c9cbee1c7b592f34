"""Scores of an answer beside the expected one."""

import re
from collections import Counter

WORD = re.compile(r"\w+")


def exact_match(answer: str, expected: str) -> bool:
    """Whether the answer is the expected one, apart from space around it."""
    return answer.strip() == expected.strip()


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall of words, as in SQuAD (arXiv 1606.05250).

    Words are compared in lower case and without punctuation, in any order.

    Returns:
        A number from 0 to 1. Texts without words are compared as they are.
    """
    found, wanted = (Counter(WORD.findall(text.lower())) for text in (answer, expected))
    if not found or not wanted:
        return float(exact_match(answer, expected))
    common = (found & wanted).total()
    return 2 * common / (found.total() + wanted.total())
