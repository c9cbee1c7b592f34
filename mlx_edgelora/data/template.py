"""A tokenizer's chat template: renders conversations as text, and encodes text as tokens."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from mlx_edgelora.data.conversation import Message, RowError
from mlx_edgelora.data.template_limits import TEMPLATE_ERRORS, limited_templates
from mlx_edgelora.errors import shortened

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Template:
    """The chat template of a tokenizer.

    Attributes:
        stops: ids of the tokens that end generation.
        end: id of the end-of-sequence token; None if there is none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # mlx-lm's wrapper does not return the mask of the assistant's tokens.
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
        """Render a conversation as text.

        Args:
            messages: the messages.
            tools: descriptions of tools; None without.
            generate: end with the opening of an answer, as for generation.

        Raises:
            RowError: there is no template, or it refuses the messages.
        """
        if not messages:  # transformers refuses an empty list
            return ""
        options = {"add_generation_prompt": True} if generate else {}
        return self._applied(messages, tools, tokenize=False, **options)

    def tokens(self, text: str) -> list[int]:
        """The tokens of a conversation's text, without added special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def tokens_and_ends(self, text: str) -> tuple[list[int], list[int] | None]:
        """The tokens of a text, and the end of each in characters, or None if unknown."""
        if getattr(self._inner, "is_fast", False):
            found = self._inner(text, add_special_tokens=False, return_offsets_mapping=True)
            ends = [end for _, end in found["offset_mapping"]]
            if all(a <= b for a, b in pairwise(ends)):
                return list(found["input_ids"]), ends
        return self.tokens(text), None

    def encoded(self, messages: Sequence[Message], tools: Sequence | None) -> list[int]:
        """The tokens of a conversation, rendered and encoded by the tokenizer itself."""
        return list(self._applied(messages, tools, tokenize=True))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, including special tokens."""
        return self._tokenizer.decode(list(tokens))

    def check(self, messages: Sequence[Message], tools: Sequence | None, tokens: list[int]) -> None:
        """Check that the tokenizer itself encodes a conversation as `tokens`.

        Only the first call checks; later calls do nothing.

        Raises:
            RowError: the tokens differ.
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
        """The mask of the assistant's tokens that the template marks with `{% generation %}`.

        Returns:
            A mask of `tokens`; None if the template marks nothing, the tokenizer does not support
            masks, or the tokenizer's own tokens differ from `tokens`.
        """
        if not self._marks_answers(tools):
            return None
        options: dict[str, Any] = {}
        if getattr(self._tokenizer, "has_thinking", None) is not None:  # as mlx-lm's wrapper does
            options["enable_thinking"] = self._tokenizer.has_thinking
        try:
            with limited_templates():
                found = self._inner.apply_chat_template(
                    list(messages),
                    tools=tools,
                    return_dict=True,
                    return_assistant_tokens_mask=True,
                    **options,
                )
        except TEMPLATE_ERRORS:
            return None  # slow tokenizers do not know the positions of tokens in the text
        if list(found["input_ids"]) != tokens:
            return None
        return [bool(value) for value in found["assistant_masks"]]

    def _marks_answers(self, tools: Sequence | None) -> bool:
        if getattr(self._tokenizer, "_chat_template", None) is not None:  # mlx-lm's own code
            return False
        try:
            template = self._inner.get_chat_template(tools=tools)
        except (ValueError, AttributeError):
            return False
        return isinstance(template, str) and bool(_GENERATION.search(template))

    def _applied(self, messages: Sequence[Message], tools: Any, **options: Any) -> Any:
        try:
            with limited_templates():
                return self._tokenizer.apply_chat_template(
                    list(messages), tools=tools, return_dict=False, **options
                )
        except TEMPLATE_ERRORS as error:
            if getattr(self._tokenizer, "has_chat_template", True) is False:
                raise RowError(
                    "the model's tokenizer has no chat template, which this format needs; use "
                    "the text format or an instruction-tuned model"
                ) from error
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RowError(
                f"the chat template refuses the messages ({shortened(reason, 300)})"
            ) from error
