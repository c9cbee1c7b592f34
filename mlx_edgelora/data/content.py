"""Find contents of a conversation that are missing from its rendered text.

Chat templates trim, escape and reorder contents. They are therefore searched for without
whitespace, in plain form and as escaped by JSON or Python. A content may be found by chance (`a`
in `assistant`, or reasoning that repeats the answer). So an unlikely word is rendered in its place
as well, once for all conversations of the same form, to see whether the template writes it.
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

# Contents with fewer characters than this may be found by chance.
SHORT = 12
# A word that no template writes by itself.
WORD = "zqxjkvzqxjkv"
# A function that renders messages and tools to text.
Render = Callable[[Sequence[Message], Sequence[Mapping[str, Any]] | None], str]


@dataclass(frozen=True)
class Part:
    """A part of a message that the text of its conversation must contain.

    Attributes:
        kind: kind of the finding if the part is missing.
        message: index of the message.
        texts: texts of the part, all of which must be found.
        place: place in the message; templates treat parts with the same place alike.
        replaced: returns the message with `words` in place of this part.
        words: words that a rendering of `replaced` contains if the template writes the part.
    """

    kind: Kind
    message: int
    texts: tuple[str, ...]
    place: str
    replaced: Callable[[], Message]
    words: tuple[str, ...] = (WORD,)

    @property
    def is_short(self) -> bool:
        """Whether the part is so short that it may be found by chance."""
        return sum(map(len, self.texts)) < SHORT


def squeezed(text: str) -> str:
    """Text without whitespace, in the normal form of some tokenizers (NFKC)."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def parts_of(messages: Sequence[Message], number: int) -> Iterator[Part]:
    """The parts of message `number`, in the order in which templates write them."""
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
    """Reasoning before `</think>`, with or without an opening tag, and the rest of the content."""
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
    """The names and values of a call's arguments, as text."""
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
    """The names in descriptions of tools."""
    found = []
    for tool in tools or ():
        described = tool.get("function") if isinstance(tool.get("function"), Mapping) else tool
        if isinstance(described.get("name"), str):
            found.append(described["name"])
    return found


class Search:
    """Finds missing contents; remembers which parts the template writes in which form."""

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
        """The parts of a conversation that are missing from its text.

        Args:
            messages: all messages that the text should contain.
            tools: descriptions of tools that the text should contain; None without.
            text: rendered text of the conversation.
            render: the function that rendered the text.
            how: name of this way of rendering, which distinguishes remembered results.
            first: index of the first message to search for.
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
                elif not is_there and part.kind is not TOOL_CALLS:  # it may be at another place
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
            except RowError:  # the template checks contents; assume that it writes the part
                self._written[key] = True
        return self._written[key]


def holds(parts: Sequence[Part], text: str) -> list[Part]:
    """The parts that are missing from a text; only the text itself is searched."""
    squeeze = squeezed(text)
    return [part for part in parts if _found(part.texts, squeeze, 0) is None]


def _found(texts: Sequence[str], squeeze: str, start: int) -> int | None:
    """The end of the last of the texts in `squeeze` from `start` on; None if one is missing."""
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
    """A text in plain form, and as escaped in strings of JSON and Python."""
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    inner = json.dumps(text)[1:-1]
    yield inner
    yield json.dumps(inner)[1:-1]
    yield repr(text)[1:-1]


def _surroundings(messages: Sequence[Message], part: Part) -> tuple:
    """Everything except its text that may decide whether a template writes a part."""
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
