"""The reasons why a model cannot be trained block by block, for every command and the docs."""

from enum import Enum

import mlx.nn as nn

from mlx_edgelora.errors import EdgeLoraError


class Refusal(Enum):
    """The reasons, as sentences about a block (`NO_LIST` and `LORA`: about the model).

    `docs/architectures.md` lists them, with the architectures that each concerns.
    """

    NO_LIST = "no list of blocks was found, expected one list that holds what model.layers returns"
    LORA = "mlx-lm's LoRA layers cannot be added to it ({error})"
    NOT_CALLED = "the model does not call it from its list of blocks"
    ORDER = "it is called where block {due} is due"
    INPUT = "its input is not what the block before returned"
    CHANGED_INPUT = "the model changes what the block before returned"
    HIDDEN = "its input has shape {shape}, not [batch, tokens, width]"
    SEVERAL_OUTPUTS = "the model cannot go on with one array from it ({error})"
    CROSSING = "another block reads what it computes or what is trained in it"
    SHARED_STATE = "it shares state with earlier blocks"
    ENTRY = "trained parameters outside the blocks reach it"
    TAIL = "what the model makes of its output cannot be differentiated ({error})"
    USED_LATER = "its output is used behind the last block too"
    OTHER_CALL = "it is called with another {name} where the blocks before it return other values"
    OWNERS = "{name} is trained {where} too"
    SET = "the model's loop sets attributes of it"
    FAILS = "it cannot be called ({error})"
    NO_GRADIENT = "it cannot be differentiated ({error})"
    TOKENS = "what follows the blocks is not computed token by token"
    NO_ARRAY = "it returns a {kind}, not one array"
    OTHER_SHAPE = "it maps {shape} to {other}"
    MUTATES = "it changes its own attributes or arguments when called"
    RANDOM = "it draws random numbers, other ones at recomputation"


def refusal_error(
    model: nn.Module, reason: Refusal, index: int | None = None, block: object = None, **values: str
) -> EdgeLoraError:
    """The error for a model that cannot be trained block by block.

    Args:
        model: the model, whose architecture is named.
        reason: the reason; `values` fill its placeholders.
        index, block: the block concerned, if it is a single one.
    """
    architecture = type(model).__module__.rpartition(".")[2]
    what = "the model" if index is None else f"block {index} ({type(block).__name__})"
    return EdgeLoraError(
        f"{architecture}: {what} cannot be trained block by block: "
        f"{reason.value.format(**values)}; train this architecture with mlx_lm.lora"
    )
