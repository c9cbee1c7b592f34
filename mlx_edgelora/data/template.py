"""A tokenizer's chat template: conversations to text, and text to tokens."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError

from mlx_edgelora.data.conversation import Message, RowError

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Template:
    """The chat template of a tokenizer.

    Attributes:
        stops: ids of the tokens at which generation ends.
        end: id of the end-of-sequence token, or None.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # mlx-lm wraps the tokenizer and does not hand out which tokens an assistant writes.
        self._inner = getattr(tokenizer, "_tokenizer", tokenizer)
        self.end = tokenizer.eos_token_id
        stops = getattr(tokenizer, "eos_token_ids", None) or [self.end]
        self.stops = {token for token in stops if token is not None}
        self._checked = False

    def text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        generate: bool = False,
    ) -> str:
        """The conversation as text; with `generate` it ends where an answer is to begin.

        Raises:
            RowError: there is no template, or it refuses the messages.
        """
        if not messages:  # which transformers refuses
            return ""
        options = {"add_generation_prompt": True} if generate else {}
        return self._applied(messages, tools, tokenize=False, **options)

    def tokens(self, text: str) -> list[int]:
        """The tokens of a conversation's text, without any that the text does not have."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def tokens_and_ends(self, text: str) -> tuple[list[int], list[int] | None]:
        """The tokens of a text, and where each ends in it; None where that is not known."""
        if getattr(self._inner, "is_fast", False):
            found = self._inner(text, add_special_tokens=False, return_offsets_mapping=True)
            ends = [end for _, end in found["offset_mapping"]]
            if all(a <= b for a, b in pairwise(ends)):
                return list(found["input_ids"]), ends
        return self.tokens(text), None

    def encoded(self, messages: Sequence[Message], tools: Sequence | None) -> list[int]:
        """The tokens of a conversation as the tokenizer itself makes them."""
        return list(self._applied(messages, tools, tokenize=True))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return self._tokenizer.decode(list(tokens))

    def check(self, messages: Sequence[Message], tools: Sequence | None, tokens: list[int]) -> None:
        """Raise `RowError` where the tokenizer makes other tokens of a conversation than `tokens`.

        Looks at the first conversation that it gets.
        """
        if self._checked:
            return
        self._checked = True
        if self.encoded(messages, tools) != tokens:
            raise RowError(
                "the tokenizer encodes a conversation otherwise than the text that its chat "
                "template writes, so its answers cannot be found; use --train-on everything"
            )

    def assistant_mask(
        self, messages: Sequence[Message], tools: Sequence | None, tokens: list[int]
    ) -> list[bool] | None:
        """Which tokens the template says an assistant writes (`{% generation %}`), or None.

        None too where the tokenizer cannot tell, or makes other tokens than `tokens`.
        """
        if not self._marks_answers(tools):
            return None
        options: dict[str, Any] = {}
        if getattr(self._tokenizer, "has_thinking", None) is not None:  # as mlx-lm's wrapper
            options["enable_thinking"] = self._tokenizer.has_thinking
        try:
            found = self._inner.apply_chat_template(
                list(messages),
                tools=tools,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **options,
            )
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError):
            return None  # slow tokenizers do not know where a token's text is
        if list(found["input_ids"]) != tokens:
            return None
        return [bool(value) for value in found["assistant_masks"]]

    def _marks_answers(self, tools: Sequence | None) -> bool:
        if getattr(self._tokenizer, "_chat_template", None) is not None:  # code of mlx-lm
            return False
        try:
            template = self._inner.get_chat_template(tools=tools)
        except (ValueError, AttributeError):
            return False
        return isinstance(template, str) and bool(_GENERATION.search(template))

    def _applied(self, messages: Sequence[Message], tools: Any, **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tools=tools, return_dict=False, **options
            )
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            if getattr(self._tokenizer, "has_chat_template", True) is False:
                raise RowError(
                    "the model's tokenizer has no chat template, which this format needs; use "
                    "the text format or an instruction-tuned model"
                ) from error
            raise RowError(f"the chat template refuses the messages ({error})") from error
