"""Checks of the options of losses: each belongs to one loss or a few."""

from typing import TYPE_CHECKING

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.losses.preferences import DPO, KTO, ORPO, SIMPO, PreferenceLoss

if TYPE_CHECKING:
    from mlx_edgelora.config.train_config import TrainConfig

APPROXIMATE = "approximate"
# The losses that have a use for an option.
USES = {
    "loss_k": (APPROXIMATE,),
    "loss_max_subset": (APPROXIMATE,),
    "loss_tail_correction": (APPROXIMATE,),
    "beta": (DPO, ORPO, SIMPO, KTO),
    "simpo_gamma": (SIMPO,),
    "desirable_weight": (KTO,),
    "undesirable_weight": (KTO,),
}
BETA = {DPO: 0.1, ORPO: 0.1, SIMPO: 2.0, KTO: 0.1}
GAMMA = 0.5


def check_loss_options(config: "TrainConfig") -> None:
    """Check that options fit the loss.

    Raises:
        EdgeLoraError: an option belongs to another loss, or cannot be used with this one.
    """
    for name, losses in USES.items():
        value = getattr(config, name)
        if value is not None and config.loss not in losses:
            raise EdgeLoraError(
                f"{name}: got {value!r} with the {config.loss} loss, which has no use for it; "
                f"leave it out, or set loss to {' or '.join(losses)}"
            )
    if config.label_smoothing and config.loss != "exact":
        raise EdgeLoraError(
            f"label_smoothing: got {config.label_smoothing} with the {config.loss} loss, expected "
            "0: a target over the whole vocabulary needs the exact one"
        )
    if config.compares_answers:
        _check_preferences(config)


def _check_preferences(config: "TrainConfig") -> None:
    loss = config.loss
    if config.packing:
        raise EdgeLoraError(
            f"packing: got true with the {loss} loss, which compares whole rows; leave it out"
        )
    if config.data_format is not None:
        raise EdgeLoraError(
            f"data_format: got {config.data_format!r} with the {loss} loss, whose rows are "
            "preferences; leave it out"
        )
    if config.train_on in ("everything", "answers"):
        raise EdgeLoraError(
            f"train_on: got {config.train_on!r} with the {loss} loss, which trains the answers "
            "that are compared; leave it out"
        )
    if loss in (DPO, KTO) and not config.train and not config.adapter_path:
        raise EdgeLoraError(
            f"adapter_path: got no adapter to test with the {loss} loss, which compares a model "
            "with and without one; name its folder, or test with orpo or simpo"
        )
    if loss in (DPO, KTO) and config.fine_tune_type != "lora":
        raise EdgeLoraError(
            f"fine_tune_type: got {config.fine_tune_type!r} with the {loss} loss, whose reference "
            "is the model without its adapter; use lora, or a loss without a reference (orpo, "
            "simpo)"
        )


def check_processes(config: "TrainConfig", count: int) -> None:
    """Check that a run of several processes gives what one would.

    Raises:
        EdgeLoraError: it does not with KTO, whose term is the mean over a whole batch.
    """
    if count > 1 and config.loss == KTO:
        raise EdgeLoraError(
            f"loss: got kto in a run of {count} processes, but it compares with the answers of a "
            "whole batch, which one process must hold; start it without mlx.launch"
        )


def preference_loss(config: "TrainConfig") -> PreferenceLoss:
    """The loss of the answers that the options describe."""
    loss = config.loss
    return PreferenceLoss(
        loss,
        BETA[loss] if config.beta is None else config.beta,
        (GAMMA if config.simpo_gamma is None else config.simpo_gamma) if loss == SIMPO else 0.0,
        1.0 if config.desirable_weight is None else config.desirable_weight,
        1.0 if config.undesirable_weight is None else config.undesirable_weight,
    )
