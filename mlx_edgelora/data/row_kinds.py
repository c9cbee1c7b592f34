"""Kinds of rows: how they are recognized by their columns, and how they are read.

The first three kinds are those of mlx-lm and take precedence, so that its data means the same
here. A kind is recognized from the columns of many rows, because the first row may lack optional
columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mlx_edgelora.data.conversation import (
    REASONING_KEYS,
    SYSTEM_ROLES,
    CanonicalRow,
    Conversation,
    Message,
    PlainText,
    RowError,
)
from mlx_edgelora.data.messages import (
    is_empty,
    is_message,
    read_content,
    read_messages,
    read_tools,
    short,
    with_reasoning,
)

Row = Mapping[str, Any]
# Pairs of columns of a question and its answer.
QUESTIONS = (
    ("question", "answer"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
    ("input", "output"),
)
SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
# Largest number of columns named in an error or in the line about the rows.
NAMED = 8


@dataclass(frozen=True)
class Features:
    """Names of the columns of mlx-lm's kinds of rows; the defaults are mlx-lm's.

    Attributes:
        prompt: column of prompts.
        completion: column of completions.
        text: column of plain text.
        chat: column of messages.
    """

    prompt: str = "prompt"
    completion: str = "completion"
    text: str = "text"
    chat: str = "messages"


class _Layout(NamedTuple):
    """The columns of a kind of rows.

    Attributes:
        kind: name of the kind.
        needed: column of each part that every row has.
        optional: possible columns of each part that a row may have.
    """

    kind: str
    needed: dict[str, str]
    optional: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class RowKind:
    """The kind of the rows of a data set.

    Attributes:
        name: a value of `--data-format`.
        needed: column of each part (such as `prompt`) that every row has.
        optional: possible columns of each optional part; the first one with a value is used.
        found: columns that are read, of the rows examined.
        unused: the other columns of the rows examined.
        system_prompt: system prompt of conversations without one; None for none.
    """

    name: str
    needed: Mapping[str, str]
    optional: Mapping[str, tuple[str, ...]]
    found: tuple[str, ...]
    unused: tuple[str, ...] = ()
    system_prompt: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """The kind as in the header of a run: `alpaca (instruction, output); not used: id`."""
        unused = f"; not used: {_named(self.unused, quote=str)}" if self.unused else ""
        return f"{self.name} ({', '.join(self.found)}){unused}"

    def read(self, row: Row) -> CanonicalRow:
        """Convert a row to its canonical form.

        Raises:
            RowError: a column is missing, or has a value of the wrong type.
        """
        for column in self.needed.values():
            if column not in row:
                raise RowError(f"got the {_keys(row)}, expected {column!r} as in other rows")
        columns = dict(self.needed)
        for part, names in self.optional.items():
            column = next((name for name in names if not is_empty(row.get(name))), None)
            if column is not None:
                columns[part] = column
        cells = {part: row[column] for part, column in columns.items()}
        try:
            return _READERS[self.name](_Cells(cells, columns, self.system_prompt))
        except RecursionError as error:
            raise RowError("is nested too deeply") from error


@dataclass(frozen=True)
class _Cells:
    """The values of a row by part, with their columns for error messages."""

    values: Mapping[str, Any]
    columns: Mapping[str, str]
    system_prompt: str | None

    def content(self, part: str) -> tuple[str, str | None]:
        """The text of a part, and its reasoning or None."""
        return read_content(self.columns[part], self.values[part])

    def optional_text(self, part: str) -> str | None:
        """The text of an optional part; None if the row does not have it."""
        return self.content(part)[0] if part in self.values else None


def find_kind(
    rows: Sequence[Row],
    features: Features = Features(),
    kind: str | None = None,
    system_prompt: str | None = None,
) -> RowKind:
    """The kind of most of the rows; of several kinds that fit equally, the first one.

    Args:
        rows: a sample of at least one row, large enough to contain every column.
        features: columns of prompts, completions, texts and messages. If one of them differs from
            mlx-lm's default, only kinds with these columns are considered.
        kind: a value of `--data-format`; other kinds are not considered.
        system_prompt: system prompt of conversations without one.

    Raises:
        RowError: no kind fits, or `system_prompt` is given for plain text.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    layouts = [_resolved(layout, keys) for layout in _layouts(features, kind)]
    fits = [_fit(layout, rows) for layout in layouts]
    best = max(range(len(layouts)), key=lambda index: fits[index])
    if not any(fits[best]):
        raise RowError(f"got the {_keys(rows[0])}, expected {_expected(layouts)}")
    layout = layouts[best]
    if layout.kind == "text" and system_prompt is not None:
        raise RowError(
            "is plain text, which has no conversation that --system-prompt could begin; leave it "
            "out or use another kind of rows"
        )
    optional = {name for names in layout.optional.values() for name in names}
    read = [*layout.needed.values(), *(key for key in keys if key in optional)]
    unused = tuple(key for key in keys if key not in read)
    return RowKind(layout.kind, layout.needed, layout.optional, tuple(read), unused, system_prompt)


def _layouts(features: Features, kind: str | None) -> list[_Layout]:
    """All possible layouts in the order of preference."""
    both = {"system": SYSTEM, "tools": TOOLS}
    pair = both | {"reasoning": REASONING_KEYS}
    alpaca = pair | {"input": ("input", "context"), "history": ("history",)}
    named = {"prompt": features.prompt, "completion": features.completion}
    chat = {"messages": features.chat}
    layouts = [
        _Layout("completions", named, pair),
        _Layout("chat", chat, both),
        _Layout("text", {"text": features.text}, {}),
    ]
    is_mapped = features != Features()
    if is_mapped:
        others = [
            _Layout("sharegpt", chat, both),
            _Layout("alpaca", named, alpaca),
            _Layout("qa", named, pair),
        ]
        layouts += others if kind else []
    else:
        layouts += [
            _Layout("sharegpt", {"messages": name}, both)
            for name in ("conversations", "conversation")
        ]
        layouts += [
            _Layout("alpaca", {"prompt": "instruction", "completion": name}, alpaca)
            for name in ("output", "response")
        ]
        layouts += [
            _Layout("qa", {"prompt": prompt, "completion": completion}, pair)
            for prompt, completion in QUESTIONS
        ]
    return [layout for layout in layouts if kind in (None, layout.kind)]


def _resolved(layout: _Layout, keys: Sequence[str]) -> _Layout:
    """The layout with the spelling of the rows' columns, ignoring case and spaces."""
    simple = {key.strip().casefold(): key for key in reversed(keys)}

    def find(name: str) -> str | None:
        return name if name in keys else simple.get(name.casefold())

    needed = {part: find(name) or name for part, name in layout.needed.items()}
    optional = {
        part: tuple(found for name in names if (found := find(name) or name) not in needed.values())
        for part, names in layout.optional.items()
    }
    return _Layout(layout.kind, needed, optional)


def _fit(layout: _Layout, rows: Sequence[Row]) -> tuple[int, bool, int]:
    """How well a layout fits.

    Returns:
        The number of rows with all needed values, whether the first row has them, and the number
        of rows with all needed columns, nulls included.
    """
    columns = layout.needed.values()
    full = [all(row.get(column) is not None for column in columns) for row in rows]
    return sum(full), full[0], sum(all(column in row for column in columns) for row in rows)


def _read_text(cells: _Cells) -> CanonicalRow:
    return PlainText(cells.content("text")[0])


def _read_chat(cells: _Cells) -> CanonicalRow:
    messages = read_messages(cells.columns["messages"], cells.values["messages"])
    return _conversation(cells, messages)


def _read_pair(cells: _Cells) -> CanonicalRow:
    """Read a prompt and a completion, which are each text or messages."""
    prompt = _messages_of(cells, "prompt", "user")
    completion = _messages_of(cells, "completion", "assistant")
    if REASONING_KEYS[0] not in completion[0]:
        completion[0] = with_reasoning(completion[0], cells.optional_text("reasoning"))
    return _conversation(cells, prompt + completion, len(prompt))


def _read_alpaca(cells: _Cells) -> CanonicalRow:
    """Read an instruction, with its input after a blank line and earlier turns in `history`."""
    parts = cells.content("prompt")[0], cells.optional_text("input")
    question = {"role": "user", "content": "\n\n".join(part for part in parts if part)}
    content, reasoning = cells.content("completion")
    answer = {"role": "assistant", "content": content}
    prompt = [*_read_history(cells), question]
    answer = with_reasoning(answer, reasoning or cells.optional_text("reasoning"))
    return _conversation(cells, [*prompt, answer], len(prompt))


def _read_history(cells: _Cells) -> list[Message]:
    turns = cells.values.get("history", [])
    messages = []
    for turn in turns if isinstance(turns, list) else [turns]:
        if not (
            isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn)
        ):
            raise RowError(
                f"{cells.columns['history']}: got {short(turn)}, expected pairs of question and "
                "answer"
            )
        messages += [
            {"role": "user", "content": turn[0]},
            {"role": "assistant", "content": turn[1]},
        ]
    return messages


def _messages_of(cells: _Cells, part: str, role: str) -> list[Message]:
    place, value = cells.columns[part], cells.values[part]
    if is_message(value):
        return read_messages(place, [value])
    if isinstance(value, list) and value and all(map(is_message, value)):
        return read_messages(place, value)
    content, reasoning = cells.content(part)
    return [with_reasoning({"role": role, "content": content}, reasoning)]


def _conversation(
    cells: _Cells, messages: list[Message], prompt_messages: int | None = None
) -> Conversation:
    """A conversation with the row's own system prompt, or else that of the run."""
    own = cells.optional_text("system")
    has_system = any(message["role"] in SYSTEM_ROLES for message in messages)
    if own is not None and has_system and messages[0]["content"] != own:
        raise RowError(
            f"{cells.columns['system']}: has a system prompt, and so have its messages; keep one"
        )
    system = cells.system_prompt if own is None else own
    if system is not None and not has_system:
        messages = [{"role": "system", "content": system}, *messages]
        prompt_messages = None if prompt_messages is None else prompt_messages + 1
    tools = None
    if "tools" in cells.values:
        tools = read_tools(cells.columns["tools"], cells.values["tools"])
    return Conversation(messages, tools, prompt_messages)


_READERS: dict[str, Callable[[_Cells], CanonicalRow]] = {
    "chat": _read_chat,
    "sharegpt": _read_chat,
    "text": _read_text,
    "completions": _read_pair,
    "qa": _read_pair,
    "alpaca": _read_alpaca,
}


def _keys(row: Row) -> str:
    return f"keys {_named(tuple(row))}" if row else "keys of an empty object"


def _named(names: Sequence[str], quote: Callable[[str], str] = repr) -> str:
    shown = ", ".join(map(quote, names[:NAMED]))
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"


def _expected(layouts: Sequence[_Layout]) -> str:
    """The most common columns of each kind, for an error message."""
    usual = {layout.kind: layout for layout in reversed(layouts)}
    kinds = dict.fromkeys(layout.kind for layout in layouts)
    return ", or ".join(" and ".join(map(repr, usual[kind].needed.values())) for kind in kinds)
