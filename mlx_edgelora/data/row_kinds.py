"""Kinds of rows: how they are recognized by their columns, and how they are read.

The first three kinds are those of mlx-lm and take precedence, so that its data means the same
here. A kind is recognized from the columns of many rows, because the first row may lack optional
columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mlx_edgelora.data.cells import Cells, conversation_of, messages_of
from mlx_edgelora.data.conversation import (
    REASONING_KEYS,
    CanonicalRow,
    Message,
    PlainText,
    RowError,
)
from mlx_edgelora.data.messages import is_empty, read_messages, short, with_reasoning
from mlx_edgelora.data.preference_rows import read_judged, read_preferences
from mlx_edgelora.losses.preferences import KTO

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
            return _READERS[self.name](Cells(cells, columns, self.system_prompt))
        except RecursionError as error:
            raise RowError("is nested too deeply") from error


def find_kind(
    rows: Sequence[Row],
    features: Features = Features(),
    kind: str | None = None,
    system_prompt: str | None = None,
    preference_loss: str | None = None,
) -> RowKind:
    """The kind of most of the rows; of several kinds that fit equally, the first one.

    Args:
        rows: a sample of at least one row, large enough to contain every column.
        features: columns of prompts, completions, texts and messages. If one of them differs from
            mlx-lm's default, only kinds with these columns are considered.
        kind: a value of `--data-format`; other kinds are not considered.
        system_prompt: system prompt of conversations without one.
        preference_loss: name of a loss of preferences; only rows for that loss are considered.

    Raises:
        RowError: no kind fits, or `system_prompt` is given for plain text.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    found = _layouts(features, kind)
    if preference_loss is not None:
        found = _preference_layouts(features, preference_loss)
    layouts = [_resolved(layout, keys) for layout in found]
    fits = [_fit(layout, rows) for layout in layouts]
    best = max(range(len(layouts)), key=lambda index: fits[index])
    if not any(fits[best]):
        raise RowError(
            f"got the {_keys(rows[0])}, expected {_expected(layouts)}"
            f"{_hint(rows[0], preference_loss)}"
        )
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


def _preference_layouts(features: Features, loss: str) -> list[_Layout]:
    """The layouts of rows for a loss of preferences, in the order of preference."""
    if (features.text, features.chat) != (Features().text, Features().chat):
        raise RowError(
            f"text_feature and chat_feature name columns that the loss {loss} has no use for; "
            "leave them out"
        )
    both = {"system": SYSTEM, "tools": TOOLS}
    answers = {"chosen": "chosen", "rejected": "rejected"}
    pairs = _Layout("preferences", answers, both | {"prompt": (features.prompt,)})
    if loss != KTO:
        return [pairs]
    judged = {"prompt": features.prompt, "completion": features.completion, "label": "label"}
    return [_Layout("judged", judged, both), pairs]


def _hint(row: Row, preference_loss: str | None) -> str:
    """What to do about rows of preferences for another loss."""
    if preference_loss is None and {"chosen", "rejected"} <= row.keys():
        return "; train on pairs of answers with --loss dpo, orpo, simpo or kto"
    if preference_loss is not None and {"prompt", "completion", "label"} <= row.keys():
        return "; train on judged answers with --loss kto"
    return ""


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


def _read_text(cells: Cells) -> CanonicalRow:
    return PlainText(cells.content("text")[0])


def _read_chat(cells: Cells) -> CanonicalRow:
    messages = read_messages(cells.columns["messages"], cells.values["messages"])
    return conversation_of(cells, messages)


def _read_pair(cells: Cells) -> CanonicalRow:
    """Read a prompt and a completion, which are each text or messages."""
    prompt = messages_of(cells, "prompt", "user")
    completion = messages_of(cells, "completion", "assistant")
    if REASONING_KEYS[0] not in completion[0]:
        completion[0] = with_reasoning(completion[0], cells.optional_text("reasoning"))
    return conversation_of(cells, prompt + completion, len(prompt))


def _read_alpaca(cells: Cells) -> CanonicalRow:
    """Read an instruction, with its input after a blank line and earlier turns in `history`."""
    parts = cells.content("prompt")[0], cells.optional_text("input")
    question = {"role": "user", "content": "\n\n".join(part for part in parts if part)}
    content, reasoning = cells.content("completion")
    answer = {"role": "assistant", "content": content}
    prompt = [*_read_history(cells), question]
    answer = with_reasoning(answer, reasoning or cells.optional_text("reasoning"))
    return conversation_of(cells, [*prompt, answer], len(prompt))


def _read_history(cells: Cells) -> list[Message]:
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


_READERS: dict[str, Callable[[Cells], CanonicalRow]] = {
    "chat": _read_chat,
    "sharegpt": _read_chat,
    "text": _read_text,
    "completions": _read_pair,
    "qa": _read_pair,
    "alpaca": _read_alpaca,
    "preferences": read_preferences,
    "judged": read_judged,
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
