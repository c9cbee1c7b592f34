"""Convert messages, tool calls and tools of various formats to the form of chat templates."""

import json
from collections.abc import Mapping
from typing import Any

from mlx_edgelora.data.conversation import REASONING_KEYS, Message, RowError

# Aliases of roles in every kind of row. Roles that some chat templates know themselves
# (`ipython`, `observation`, `function`) are aliases only in messages of ShareGPT.
ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
}
SHAREGPT_ALIASES = {
    "observation": "tool",
    "ipython": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
# Roles of messages whose text is a tool call, as JSON.
CALLING_ROLES = ("function_call", "tool_call")
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("thinking", "reasoning")
# Largest depth of nesting of tool schemas and call arguments.
DEEPEST = 100
# First characters of text that is read as JSON, in tables whose columns contain no objects.
JSON_STARTS = ("[", "{")


def is_message(value: Any) -> bool:
    """Whether a value looks like a message: an object with a role."""
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def read_messages(place: str, value: Any) -> list[Message]:
    """Read messages in the form of `Conversation`.

    Args:
        place: name of the column, at the start of error messages.
        value: a list of objects with `role` and `content`, or `from` and `value`; or the same as
            JSON text, as in a CSV file.

    Raises:
        RowError: the value is something else, or a message has no role or content.
    """
    messages = _from_json(place, value)
    if not isinstance(messages, list) or not messages:
        raise RowError(f"{place}: got {short(messages)}, expected a list of messages")
    return [
        _read_message(f"{place}, message {number}", message)
        for number, message in enumerate(messages, start=1)
    ]


def read_tools(place: str, value: Any) -> list[Mapping[str, Any]] | None:
    """Read descriptions of tools from a list of objects or JSON text; None if there are none."""
    tools = _from_json(place, value)
    if is_empty(tools):
        return None
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, list):
        raise RowError(f"{place}: got {short(tools)}, expected a list of tool descriptions")
    tools = [_from_json(place, tool) for tool in tools]
    for number, tool in enumerate(tools, start=1):
        if not isinstance(tool, Mapping):
            raise RowError(f"{place}, tool {number}: got {short(tool)}, expected an object")
        _check_depth(f"{place}, tool {number}", tool)
    return tools or None


def read_content(place: str, value: Any) -> tuple[str, str | None]:
    """Read the text of a content, and the reasoning in its parts.

    Args:
        place: start of error messages.
        value: text, or a list of parts such as `{"type": "text", "text": "..."}`.

    Returns:
        The text, and the reasoning or None.

    Raises:
        RowError: the value is something else, or a part is not text, such as an image.
    """
    if isinstance(value, str):
        return value, None
    if not isinstance(value, list) or not all(isinstance(part, Mapping) for part in value):
        raise RowError(f"{place}: got {short(value)}, expected text")
    text: list[str] = []
    reasoning: list[str] = []
    for number, part in enumerate(value, start=1):
        _read_part(f"{place}, part {number}", part, text, reasoning)
    return "".join(text), "".join(reasoning) if reasoning else None


def with_reasoning(message: Message, reasoning: str | None) -> Message:
    """The message with its reasoning under all names that templates read."""
    return message if reasoning is None else message | dict.fromkeys(REASONING_KEYS, reasoning)


def is_empty(value: Any) -> bool:
    """Whether a value is that of an empty cell: null, NaN, empty text, list or object."""
    return value is None or value != value or value in ("", [], {})  # noqa: PLR0124, NaN


def short(value: Any) -> str:
    """A value as short text for an error message."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _read_part(place: str, part: Mapping, text: list[str], reasoning: list[str]) -> None:
    kind = part.get("type", "text")
    if kind in REASONING_PARTS:
        value, into = part.get(kind, part.get("text")), reasoning
    elif kind in TEXT_PARTS:
        value, into = part.get("text", part.get("content")), text
    else:
        raise RowError(f"{place}: is of type {short(kind)}, and only text is trained; leave it out")
    into.append(read_content(place, value)[0])


def _read_message(place: str, value: Any) -> Message:
    if not isinstance(value, Mapping):
        raise RowError(f"{place}: got {short(value)}, expected an object with role and content")
    fields = {key: part for key, part in value.items() if part is not None}
    from_sharegpt = "role" not in fields and "from" in fields
    role = fields.pop("from" if from_sharegpt else "role", None)
    if not isinstance(role, str):
        raise RowError(f"{place}: got the role {short(role)}, expected text")
    content = fields.pop("value" if "content" not in fields else "content", None)
    calls = fields.pop("tool_calls", None)
    legacy = fields.pop("function_call", None)
    if role in CALLING_ROLES:
        role, calls, content = "assistant", content, None
    calls = [] if is_empty(calls) else _read_calls(place, calls)
    if not calls and not is_empty(legacy):
        calls = _read_calls(place, legacy)
    reasoning = _reasoning(place, fields)
    # A message with only tool calls or reasoning may have no content.
    if content is None and (calls or reasoning is not None):
        content = ""
    if not isinstance(content, str | list):
        raise RowError(f"{place}: got the content {short(content)}, expected text")
    content, among_parts = read_content(place, content)
    message = {"role": _known_role(role, from_sharegpt), "content": content, **fields}
    if calls:
        message["tool_calls"] = calls
    return with_reasoning(message, among_parts if reasoning is None else reasoning)


def _known_role(role: str, from_sharegpt: bool) -> str:
    """The role without aliases; an unknown role is passed to the template unchanged."""
    name = role.strip().lower()
    name = ALIASES.get(name, name)
    if from_sharegpt:
        name = SHAREGPT_ALIASES.get(name, name)
    return name if name in KNOWN_ROLES else role


def _reasoning(place: str, fields: dict[str, Any]) -> str | None:
    """The reasoning of a message; its keys are removed from `fields`."""
    found = None
    for key in REASONING_KEYS:
        value = fields.pop(key, None)
        if value is None:
            continue
        text, among_parts = read_content(f"{place}, {key}", value)
        text = (among_parts or "") + text
        if found and text and text != found:
            raise RowError(f"{place}: has two kinds of reasoning, {key} among them; keep one")
        found = found or text
    return found


def _read_calls(place: str, value: Any) -> list[dict[str, Any]]:
    calls = _from_json(place, value)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list):
        raise RowError(f"{place}: got the tool calls {short(calls)}, expected a list of objects")
    return [
        _read_call(f"{place}, tool call {number}", call) for number, call in enumerate(calls, 1)
    ]


def _read_call(place: str, value: Any) -> dict[str, Any]:
    call = _from_json(place, value)
    nested = _from_json(place, call.get("function")) if isinstance(call, Mapping) else None
    function = call if nested is None else nested
    if not isinstance(function, Mapping):
        raise RowError(f"{place}: got {short(call)}, expected an object with name and arguments")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise RowError(f"{place}: got the name {short(name)}, expected text")
    arguments = function.get("arguments", function.get("parameters"))
    rest = call if nested is not None else {"id": call.get("id")}
    return (
        {"type": "function"}
        | {key: part for key, part in rest.items() if part is not None}
        | {"function": {"name": name, "arguments": _read_arguments(f"{place}, {name}", arguments)}}
    )


def _read_arguments(place: str, value: Any) -> Mapping[str, Any]:
    """The arguments of a call, from an object or JSON text; empty if there are none."""
    if is_empty(value):
        return {}
    if isinstance(value, str):
        value = parse_json(place, value)
        # Some data sets encode JSON text as JSON again.
        value = parse_json(place, value) if isinstance(value, str) else value
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RowError(f"{place}: got the arguments {short(value)}, expected an object")
    _check_depth(place, value)
    return value


def _from_json(place: str, value: Any) -> Any:
    """The value, parsed if it is JSON text of a list or an object."""
    if isinstance(value, str) and value.lstrip().startswith(JSON_STARTS):
        return parse_json(place, value)
    return value


def parse_json(place: str, text: str) -> Any:
    """Parse JSON text in a row; raises `RowError` if it is not JSON."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{place}: holds half of a surrogate pair, such as \\ud800") from error
    except ValueError as error:
        raise RowError(f"{place}: got {short(text)}, which is not JSON ({error})") from error
    except RecursionError as error:
        raise RowError(f"{place}: is nested too deeply") from error
    return value


def _check_depth(place: str, value: Any, depth: int = 0) -> None:
    """Refuse deep nesting, because templates and checks visit these values recursively."""
    if depth > DEEPEST:
        raise RowError(f"{place}: is nested more than {DEEPEST} deep")
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            _check_depth(place, part, depth + 1)
