"""A tokenizer of bytes with a few merges, of a kind that llama.cpp has."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 288  # more rows than tokens, as in many models


def write_tokenizer(folder: Path, splitter=None, template=None) -> Path:
    """Replace the tokenizer of a model's folder; the last of 260 tokens ends an answer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    merges = [("h", "e"), ("t", "he")]
    vocabulary |= {"he": 256, "the": 257}
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    outer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", bos_token="<|im_start|>"
    )
    outer.chat_template = template
    outer.save_pretrained(folder)
    return folder
