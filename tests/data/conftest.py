"""A tokenizer of words with a chat template, and JSONL files; nothing is downloaded."""

import json

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% if tools %}tools {% for tool in tools %}{{ tool.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
WORDS = ["[PAD]", "[UNK]", "</s>", "<user>", "<assistant>", "<system>", "tools", "search", "hmm"]


@pytest.fixture(scope="session")
def make_tokenizer():
    def _make(template=TEMPLATE):
        words = WORDS + [f"w{i}" for i in range(100)]
        inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        outer = PreTrainedTokenizerFast(
            tokenizer_object=inner, eos_token="</s>", pad_token="[PAD]", unk_token="[UNK]"
        )
        outer.chat_template = template
        return TokenizerWrapper(outer)

    return _make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def folder(tmp_path):
    """folder(train=[...], valid="raw text") -> path of a folder with these JSONL files."""

    def _folder(**splits):
        for name, rows in splits.items():
            text = rows if isinstance(rows, str) else "".join(json.dumps(r) + "\n" for r in rows)
            (tmp_path / f"{name}.jsonl").write_text(text)
        return str(tmp_path)

    return _folder


def words(*numbers):
    """Text of so many words, as `w3 w4`."""
    return " ".join(f"w{number}" for number in numbers)
