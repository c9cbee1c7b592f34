"""What a conversation holds, and whether its text holds it.

Chat templates trim, escape and reorder what they write, so contents are looked for without their
whitespace, as they are or as JSON or Python writes them. A content could be found by chance (`a` in
`assistant`, reasoning that says what the answer says). So the template is asked as well, once for
conversations of a form, whether it writes an unlikely word in that place.
"""

import copy
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_edgelora.data.conversation import REASONING_KEYS, SYSTEM_ROLES, Message, RowError
from mlx_edgelora.data.findings import REASONING, SYSTEM, TEXT, TOOL_CALLS, TOOLS, Kind

# Contents of fewer characters than this are found by chance.
SHORT = 12
# What no template writes by itself.
WORD = "zqxjkvzqxjkv"
# Renders changed messages and tools to text.
Render = Callable[[Sequence[Message], Sequence[Mapping[str, Any]] | None], str]


@dataclass(frozen=True)
class Part:
    """A piece of a message that its conversation's text has to hold.

    Attributes:
        kind: of what is lost without it.
        message: number of its message.
        texts: all have to be found.
        place: which part of the message; parts with equal places are written alike.
        replaced: the message with `words` in place of this part.
        words: what of `replaced` has to be found where the template writes the part.
    """

    kind: Kind
    message: int
    texts: tuple[str, ...]
    place: str
    replaced: Callable[[], Message]
    words: tuple[str, ...] = (WORD,)

    @property
    def is_short(self) -> bool:
        """Whether it could be found by chance."""
        return sum(map(len, self.texts)) < SHORT


def squeezed(text: str) -> str:
    """Text without its whitespace, in the form that tokenizers may give it (NFKC)."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def parts_of(messages: Sequence[Message], number: int) -> Iterator[Part]:
    """The parts of a message, in the order in which templates write them."""
    message = messages[number]
    content = message.get("content") or ""
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), "")
    if squeezed(reasoning):
        yield Part(
            REASONING, number, (reasoning,), "reasoning", lambda: message | _all_reasoning(WORD)
        )
    if message["role"] == "assistant":
        yield from _parts_of_answer(message, number, content)
    elif squeezed(content):
        kind = SYSTEM if message["role"] in SYSTEM_ROLES else TEXT
        yield Part(kind, number, (content,), "content", lambda: message | {"content": WORD})
    for call in range(len(message.get("tool_calls") or ())):
        yield _part_of_call(message, number, call)


def _parts_of_answer(message: Message, number: int, content: str) -> Iterator[Part]:
    """Reasoning in `<think>` and the rest; in a template's eyes it may begin before the content."""
    head, end, tail = content.rpartition("</think>")
    if not end:
        head, tail = "", content
    thoughts = tuple(piece for piece in re.split("</?think>", head) if squeezed(piece))
    if thoughts:
        opening = "<think>\n" if "<think>" in head else ""
        changed = f"{opening}{WORD}\n</think>{tail}"
        yield Part(REASONING, number, thoughts, "thinking", lambda: message | {"content": changed})
    if squeezed(tail):
        yield Part(
            TEXT, number, (tail,), "content", lambda: message | {"content": f"{head}{end}{WORD}"}
        )


def _part_of_call(message: Message, number: int, call: int) -> Part:
    function = message["tool_calls"][call].get("function") or message["tool_calls"][call]
    with_arguments = bool(function.get("arguments")) and isinstance(function["arguments"], Mapping)
    words = tuple(f"{WORD}{end}" for end in ("nkv" if with_arguments else "n"))

    def replaced() -> Message:
        changed = copy.deepcopy(message)
        called = changed["tool_calls"][call]
        called = called.get("function") or called
        called["name"] = words[0]
        if with_arguments:
            called["arguments"] = {words[1]: words[2]}
        return changed

    texts = (str(function.get("name", "")), *_leaves(function.get("arguments")))
    return Part(TOOL_CALLS, number, texts, "call", replaced, words)


def _all_reasoning(text: str) -> dict[str, str]:
    return dict.fromkeys(REASONING_KEYS, text)


def _leaves(value: Any) -> Iterator[str]:
    """The names and values of arguments as text."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def tool_names(tools: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """The names of the tools that a conversation describes."""
    found = []
    for tool in tools or ():
        described = tool.get("function") if isinstance(tool.get("function"), Mapping) else tool
        if isinstance(described.get("name"), str):
            found.append(described["name"])
    return found


class Search:
    """Looks for contents in texts; remembers what the template does with parts in a form."""

    def __init__(self) -> None:
        self._written: dict[Any, bool] = {}

    def missing(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        text: str,
        render: Render,
        how: str = "",
        first: int = 0,
    ) -> list[Part]:
        """The parts of a conversation that its text lacks.

        Args:
            messages: all that the text should hold.
            tools: described to the model.
            text: of the conversation.
            render: what wrote the text, for changed messages or tools.
            how: tells one way of rendering from another.
            first: number of the first message to look for.
        """
        squeeze, place, found = squeezed(text), 0, []
        form = (how, bool(tools), messages[-1]["role"])
        for number in range(first, len(messages)):
            begin = place
            for part in parts_of(messages, number):
                end = _found(part.texts, squeeze, begin)
                is_there = end is not None
                if is_there and part.kind is TEXT and not part.is_short:
                    place = max(place, end)
                elif not is_there and part.kind is not TOOL_CALLS:  # it may be written elsewhere
                    is_there = _found(part.texts, squeeze, 0) is not None
                if not is_there or not self._is_written(part, messages, tools, form, render):
                    found.append(part)
        if tools and not self._tools_written(messages, tools, squeeze, form, render):
            names = tuple(tool_names(tools))
            found.append(Part(TOOLS, 0, names, "tools", lambda: messages[0]))
        return found

    def _is_written(
        self, part: Part, messages: Sequence[Message], tools: Any, form: Any, render: Render
    ) -> bool:
        def probe() -> bool:
            changed = list(messages)
            changed[part.message] = part.replaced()
            text = render(changed, tools)
            return all(word in text for word in part.words)

        return self._remembered((*form, *_surroundings(messages, part)), probe)

    def _tools_written(
        self, messages: Sequence[Message], tools: Any, squeeze: str, form: Any, render: Render
    ) -> bool:
        names = tool_names(tools)
        if not names:
            return self._remembered(
                (*form, "tools"), lambda: render(messages, tools) != render(messages, None)
            )
        if not all(squeezed(name) in squeeze for name in names):
            return False

        def probe() -> bool:
            changed = copy.deepcopy(list(tools))
            for tool in changed:
                described = tool.get("function")
                described = described if isinstance(described, dict) else tool
                described["name"] = WORD
            return WORD in render(messages, changed)

        return self._remembered((*form, "tools"), probe)

    def _remembered(self, key: Any, probe: Callable[[], bool]) -> bool:
        if key not in self._written:
            try:
                self._written[key] = probe()
            except RowError:  # a template that looks into contents; nothing is known of it
                self._written[key] = True
        return self._written[key]


def holds(parts: Sequence[Part], text: str) -> list[Part]:
    """Those parts that a text lacks."""
    squeeze = squeezed(text)
    return [part for part in parts if _found(part.texts, squeeze, 0) is None]


def _found(texts: Sequence[str], squeeze: str, start: int) -> int | None:
    """Behind which place all of the texts have been found, none before `start`, or None."""
    end = start
    for text in texts:
        for way in map(squeezed, _written_ways(text)):
            if (at := squeeze.find(way, start)) >= 0:
                end = max(end, at + len(way))
                break
        else:
            return None
    return end


def _written_ways(text: str) -> Iterator[str]:
    """As it is, and as JSON and Python write it in a string."""
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    inner = json.dumps(text)[1:-1]
    yield inner
    yield json.dumps(inner)[1:-1]
    yield repr(text)[1:-1]


def _surroundings(messages: Sequence[Message], part: Part) -> tuple:
    """What may decide whether a template writes a part, other than its text."""
    number, last = part.message, len(messages) - 1
    role = messages[number]["role"]
    return (
        part.place,
        role,
        tuple(other.place for other in parts_of(messages, number)),
        number == 0,
        number == last,
        all(message["role"] != role for message in messages[number + 1 :]),
        messages[max(0, number - 1)]["role"],
        messages[min(last, number + 1)]["role"],
    )
