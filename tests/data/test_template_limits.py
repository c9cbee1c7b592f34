"""Chat templates that never end, or make gigabytes, end in a sentence within seconds."""

import threading
import time

import pytest
from tiny import make_model

from mlx_edgelora.data import template_limits
from mlx_edgelora.data.conversation import RowError
from mlx_edgelora.data.template import Template
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.inference.generating import encode
from mlx_edgelora.model.checkpoint import load_lazily, read_checkpoint
from mlx_edgelora.model.tokenizer import load_tokenizer_of

MESSAGES = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = BODY %}{% endfor %}"
HOSTILE = [
    LOOP,
    "{% macro f() %}" + LOOP + "{% endmacro %}{{ f() }}",
    "{% generation %}" + LOOP + "{% endgeneration %}",
    "{{ 2 ** (10 ** 9) }}",
    "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ (['x'] * 10 ** 10) | length }}",
    "{{ 'x' | center(10 ** 10) }}",
    "{{ 'x'.ljust(10 ** 10) }}",
    "{{ '{:99999999999}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=10 ** 10) }}",
    "{{ '%99999999999d' % 1 }}",
    "{{ '%99999999999d' | format(1) }}",
    "{{ 'x\n' | indent(10 ** 10) }}",
    "{{ lipsum(n=99999) }}",
    DOUBLE.replace("BODY", "n.x ~ n.x"),
    DOUBLE.replace("BODY", "n.x + n.x"),
    DOUBLE.replace("BODY", "n.x.replace('x', 'xx')"),
    DOUBLE.replace("BODY", "n.x | replace('x', 'xx')"),
    DOUBLE.replace("BODY", "n.x.join([n.x, n.x])"),
    "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "{{ 1 / 0 }}{{ [][1] }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("hostile") / "model")


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer_of(load_lazily(read_checkpoint(folder)))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(template_limits, "MOST_SECONDS", 0.3)
    monkeypatch.setattr(template_limits, "MOST_SIZE", 10_000_000)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:40])
def test_a_hostile_template_ends_in_a_sentence(tokenizer, text):
    tokenizer._tokenizer.chat_template = text
    began = time.perf_counter()
    with pytest.raises(RowError, match="the chat template refuses the messages") as caught:
        Template(tokenizer).text(MESSAGES, None)
    assert time.perf_counter() - began < 3
    assert len(str(caught.value)) < 400


def test_a_thread_is_stopped_too(tokenizer):
    tokenizer._tokenizer.chat_template = LOOP
    found = []

    def run():
        try:
            Template(tokenizer).text(MESSAGES, None)
        except RowError as error:
            found.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert "more than 0.3 seconds" in found[0]


def test_prompts_are_limited_too(folder):
    path = folder / "chat_template.jinja"
    before = path.read_text()
    path.write_text(LOOP)
    try:
        tokenizer = load_tokenizer_of(load_lazily(read_checkpoint(folder)))
        with pytest.raises(EdgeLoraError, match=r"more than 0\.3 seconds"):
            encode(tokenizer, MESSAGES)
    finally:
        path.write_text(before)


USUAL = (
    "{{ bos_token }}{% for m in messages if m.content is defined %}{% if loop.first %}S{% endif %}"
    "{{ '<' + m['role'] + '>' }}{{ m.content | trim | replace('w1', 'w9') }}{{ m | tojson(indent=2)"
    " }}{{ ('%s-%d' % ('a', 3)) ~ loop.index * 2 }}{% generation %}{{ m.content.split(' ')[-1] }}"
    "{% endgeneration %}{{ [1, 2] | join(', ') }}{% if loop.last %}{{ 2 ** 3 }}{% break %}{% endif "
    "%}{{ '{:>5}'.format(7) }}{% endfor %}{{ tools | length if tools else strftime_now('%Y')[:0] }}"
)


def test_other_templates_give_what_transformers_gives(tokenizer):
    tokenizer._tokenizer.chat_template = USUAL
    options = {"tools": [{"type": "function", "function": {"name": "f"}}], "tokenize": False}
    expected = tokenizer.apply_chat_template(MESSAGES, **options)
    assert "a-34w31, 281" in expected
    with template_limits.limited_templates():
        assert tokenizer.apply_chat_template(MESSAGES, **options) == expected
