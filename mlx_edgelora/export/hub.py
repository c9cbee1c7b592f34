"""Publish an exported folder on the Hugging Face Hub, with a model card made from the run."""

import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model.checkpoint import error_text
from mlx_edgelora.storage.files import write_atomically
from mlx_edgelora.training.adapters import read_adapter_config
from mlx_edgelora.training.checkpoints import RUN_FILE, newest_checkpoint

CARD = "README.md"
# Options of a run that say how it was trained, and nothing of the machine it ran on.
_OPTIONS = (
    "fine_tune_type",
    "num_layers",
    "iters",
    "epochs",
    "batch_size",
    "grad_accumulation_steps",
    "max_seq_length",
    "packing",
    "mask_prompt",
    "train_on",
    "optimizer",
    "learning_rate",
    "lr_schedule",
    "max_grad_norm",
    "label_smoothing",
    "loss",
    "quantize",
    "seed",
)
# OSError and that of the HTTP library, which differs between versions of huggingface_hub.
_NETWORK = HfHubHTTPError.__bases__
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_USE = {
    "peft": "A LoRA adapter for [PEFT](https://huggingface.co/docs/peft).",
    "gguf": "A GGUF file for [llama.cpp](https://github.com/ggml-org/llama.cpp).",
    "ollama": "A GGUF file and a Modelfile: `ollama create my-model -f Modelfile`.",
}


class Publisher:
    """Uploads a folder to a repository, with the user's own token.

    Args:
        repo: name of the repository, such as `me/my-adapter`.
        api: an `HfApi`; None for one with the token that the user is logged in with.

    Raises:
        EdgeLoraError: the name is none, or the user is not logged in. Nothing was sent.
    """

    def __init__(self, repo: str, api: HfApi | None = None) -> None:
        self._repo = repo
        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise EdgeLoraError(
                f"--push-to-hub: got {repo!r} ({error_text(error)}), expected a name such as "
                "me/my-adapter"
            ) from error
        if api is None and not get_token():
            raise EdgeLoraError(
                "--push-to-hub: needs your token of the Hugging Face Hub; log in with hf auth "
                "login, or set HF_TOKEN"
            )
        self._api = api or HfApi()

    def push(self, folder: Path, card: str) -> str:
        """Write the model card into a folder and upload all of it, to a private repository if new.

        Returns:
            The repository's address.

        Raises:
            EdgeLoraError: the upload failed; the folder is complete.
        """
        write_atomically({folder / CARD: lambda file: file.write(card.encode())})
        try:
            url = self._api.create_repo(self._repo, private=True, exist_ok=True)
            self._api.upload_folder(
                repo_id=self._repo, folder_path=folder, commit_message="Upload with mlx-edgelora"
            )
        except _NETWORK as error:
            raise EdgeLoraError(
                f"--push-to-hub: {self._repo} cannot be written ({error_text(error)}); {folder} is "
                f"complete, upload it later with hf upload {self._repo} {folder}"
            ) from error
        return str(url)


def model_card(
    adapter: str | os.PathLike, kind: str, base: str | None = None, repo: str = "adapter"
) -> str:
    """The text of a model card, from an adapter's configuration and its newest checkpoint.

    It names no file or folder of this machine and contains no data.

    Args:
        adapter: folder of the adapter.
        kind: "peft", "gguf" or "ollama".
        base: name of the base model; None for the one that the adapter names.
        repo: name of the repository.

    Raises:
        EdgeLoraError: the folder is not that of an adapter.
    """
    config = read_adapter_config(Path(adapter))
    base = public_name(base) or public_name(config.get("model"))
    data = ModelCardData(
        base_model=base,
        library_name="peft" if kind == "peft" else None,
        tags=["lora", "mlx", "mlx-edgelora", *([] if kind == "peft" else ["gguf"])],
        pipeline_tag="text-generation",
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {repo.rpartition('/')[2]}\n",
        f"{_USE[kind]}\n",
        f"Base model: {f'[{base}](https://huggingface.co/{base})' if base else 'not published'}\n",
        f"## Data\n\n{_table(_data_facts(config, Path(adapter)))}",
        f"## Training\n\n{_table(_options(config))}",
    ]
    if losses := _losses(Path(adapter)):
        parts.append(f"## Losses\n\n{_table(losses)}")
    versions = {name: version(name) for name in ("mlx-edgelora", "mlx-lm", "mlx")}
    parts.append(f"## Versions\n\n{_table(versions)}")
    return "\n".join(parts)


def public_name(name: object) -> str | None:
    """A model's or a data set's name on the Hub; None for a folder of this machine."""
    if not isinstance(name, str) or not _HUB_NAME.fullmatch(name) or os.path.exists(name):
        return None
    return name


def _data_facts(config: dict[str, Any], adapter: Path) -> dict[str, Any]:
    facts = {"source": public_name(config.get("data")) or "local files, not published"}
    prints = _newest_state(adapter).get("fingerprints")
    if isinstance(prints, dict) and re.fullmatch(r"[0-9a-f]{64}", str(prints.get("data"))):
        facts["SHA-256 of the tokens"] = prints["data"]
    return facts


def _options(config: dict[str, Any]) -> dict[str, Any]:
    found = {name: config[name] for name in _OPTIONS if config.get(name) is not None}
    lora = config.get("lora_parameters")
    if isinstance(lora, dict):
        found |= {f"lora {name}": value for name, value in lora.items() if value is not None}
    return found


def _losses(adapter: Path) -> dict[str, Any]:
    state = _newest_state(adapter)
    names = "step", "trained_tokens", "train_loss", "val_loss", "best_val_loss"
    values = {name: state.get(name) for name in names}
    return {
        name.replace("_", " "): f"{value:.4g}" if isinstance(value, float) else value
        for name, value in values.items()
        if isinstance(value, int | float)
    }


def _newest_state(adapter: Path) -> dict[str, Any]:
    """What the newest checkpoint says of the run; empty if there is none."""
    newest = newest_checkpoint(adapter)
    try:
        state = json.loads((newest / RUN_FILE).read_bytes()) if newest else {}
    except (OSError, ValueError, RecursionError):  # a card needs no losses
        return {}
    return state if isinstance(state, dict) else {}


def _table(rows: dict[str, Any]) -> str:
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        escaped = re.sub(r"([|<>\[\]`*\\])", r"\\\1", " ".join(text.split()))
        lines.append(f"| {name} | {escaped} |")
    return "\n".join(lines) + "\n"
