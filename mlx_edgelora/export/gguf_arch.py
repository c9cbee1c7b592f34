"""What llama.cpp has to be told of a model: architecture, settings, names and row orders."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.export.peft_names import PROJECTIONS, SWITCH

_NEEDED = "fuse it with mlx-edgelora fuse and convert it with llama.cpp's convert_hf_to_gguf.py"


@dataclass(frozen=True)
class Architecture:
    """How an architecture of mlx-lm differs in llama.cpp.

    Attributes:
        name: llama.cpp's name.
        interleaved: whether rows of q and k are paired as (0, 1), not as (0, half).
        offset_norms: whether norms are stored without the 1 that is added to them.
        experts: names of an expert's gate, up and down matrices in the `gguf` library's map.
    """

    name: str
    interleaved: bool = False
    offset_norms: bool = False
    experts: tuple[str, str, str] = PROJECTIONS


ARCHITECTURES = {
    "gemma": Architecture("gemma", offset_norms=True),
    "gemma2": Architecture("gemma2", offset_norms=True),
    "gemma3_text": Architecture("gemma3", offset_norms=True),
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "mixtral": Architecture("llama", interleaved=True, experts=("w1", "w3", "w2")),
    "olmoe": Architecture("olmoe"),
    "phi3": Architecture("phi3"),
    "qwen2": Architecture("qwen2"),
    "qwen2_moe": Architecture("qwen2moe"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
}


def gguf_library() -> ModuleType:
    """The `gguf` library.

    Raises:
        EdgeLoraError: it is not installed.
    """
    try:
        import gguf  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise EdgeLoraError(
            "export: needs the gguf library; install it with pip install 'mlx-edgelora[gguf]'"
        ) from error
    return gguf


class Converter:
    """Names, settings and row orders of one model.

    Args:
        model_type: mlx-lm's architecture.
        arguments: mlx-lm's `ModelArgs` of the model.
        blocks: number of blocks.

    Raises:
        EdgeLoraError: llama.cpp computes this model differently, or it is not known here.
    """

    def __init__(self, model_type: str, arguments: Any, blocks: int) -> None:
        if model_type not in ARCHITECTURES:
            raise EdgeLoraError(
                f"model: {model_type} is not known here as GGUF, expected one of "
                f"{', '.join(ARCHITECTURES)}; {_NEEDED}"
            )
        self.architecture = ARCHITECTURES[model_type]
        self._args, self._blocks = arguments, blocks
        library = gguf_library()
        kinds = {name: kind for kind, name in library.MODEL_ARCH_NAMES.items()}
        self._names = library.get_tensor_name_map(kinds[self.architecture.name], blocks)
        self.heads = arguments.num_attention_heads
        self.kv_heads = getattr(arguments, "num_key_value_heads", None) or self.heads
        self.head_dim = getattr(arguments, "head_dim", None) or arguments.hidden_size // self.heads
        self._check(model_type)

    def _check(self, model_type: str) -> None:
        """Refuse settings that llama.cpp has no counterpart for."""
        args = self._args
        normed = getattr(args, "norm_topk_prob", None)
        fixed = {"qwen3_moe": True, "qwen2_moe": False, "olmoe": False}
        if model_type in fixed and normed is not None and bool(normed) != fixed[model_type]:
            raise EdgeLoraError(
                f"model: norm_topk_prob is {normed}, which llama.cpp does not compute for "
                f"{model_type}; {_NEEDED}"
            )
        if getattr(args, "mlp_only_layers", None) or getattr(args, "decoder_sparse_step", 1) != 1:
            raise EdgeLoraError(
                f"model: has blocks without experts, which llama.cpp does not compute for "
                f"{model_type}; {_NEEDED}"
            )
        kind = self._rope_scaling().get("kind")
        if kind not in (None, "default", "linear", "llama3"):
            raise EdgeLoraError(f"model: rope scaling {kind!r} is not known here; {_NEEDED}")

    def _rope_scaling(self) -> dict[str, Any]:
        scaling = getattr(self._args, "rope_scaling", None) or {}
        return scaling | {"kind": scaling.get("rope_type") or scaling.get("type")}

    def name(self, ours: str) -> str:
        """llama.cpp's name of a tensor.

        Args:
            ours: mlx-lm's name, such as `model.layers.0.self_attn.q_proj.weight`.

        Raises:
            EdgeLoraError: the `gguf` library knows no name for it.
        """
        theirs = ours
        if f".{SWITCH}." in ours:
            place, _, rest = ours.partition(f".{SWITCH}.")
            projection, _, leaf = rest.partition(".")
            own = self.architecture.experts[PROJECTIONS.index(projection)]
            theirs = f"{place}.experts.{own}.{leaf}"
        found = self._names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise EdgeLoraError(f"model: llama.cpp has no tensor like {ours}; {_NEEDED}")
        return found

    def order(self, ours: str, array: mx.array) -> mx.array:
        """Bring rows [out, ...] of a layer's output into llama.cpp's order."""
        if not self.architecture.interleaved:
            return array
        for layer, heads in (("q_proj", self.heads), ("k_proj", self.kv_heads)):
            if f".self_attn.{layer}." in ours:
                split = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
                return split.swapaxes(1, 2).reshape(array.shape)
        return array

    def convert(self, ours: str, array: mx.array) -> mx.array:
        """A parameter as llama.cpp stores it, unevaluated."""
        array = self.order(ours, array)
        if self.architecture.offset_norms and ours.endswith("norm.weight"):
            return array.astype(mx.float32) + 1
        if ours.endswith("shared_expert_gate.weight"):
            return array.reshape(-1)
        return array

    def extra_tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Tensors that llama.cpp has and the checkpoint has not: frequencies of Llama 3."""
        scaling = self._rope_scaling()
        if scaling["kind"] != "llama3":
            return
        factor, low = scaling["factor"], scaling.get("low_freq_factor", 1.0)
        high, old = (
            scaling.get("high_freq_factor", 4.0),
            scaling["original_max_position_embeddings"],
        )
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        wavelengths = 2 * math.pi * self._args.rope_theta**exponents
        smooth = np.clip((old / wavelengths - low) / (high - low), 0, 1)
        factors = 1 / ((1 - smooth) / factor + smooth)
        yield "rope_freqs.weight", factors.astype(np.float32)

    def write_settings(self, writer: Any) -> None:
        """Write the model's settings to a `GGUFWriter`."""
        args = self._args
        hidden = getattr(args, "moe_intermediate_size", None)
        writer.add_context_length(getattr(args, "max_position_embeddings", None) or 4096)
        writer.add_embedding_length(args.hidden_size)
        writer.add_block_count(self._blocks)
        writer.add_feed_forward_length(args.intermediate_size)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(args.rms_norm_eps)
        writer.add_rope_freq_base(args.rope_theta)
        dimensions = self.head_dim * getattr(args, "partial_rotary_factor", 1.0)
        writer.add_rope_dimension_count(int(dimensions))
        writer.add_vocab_size(args.vocab_size)
        scaling = self._rope_scaling()
        if scaling["kind"] == "linear":
            writer.add_rope_scaling_type(gguf_library().RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(scaling["factor"])
        settings: dict[str, Callable] = {
            "num_experts": writer.add_expert_count,
            "num_local_experts": writer.add_expert_count,
            "num_experts_per_tok": writer.add_expert_used_count,
            "shared_expert_intermediate_size": writer.add_expert_shared_feed_forward_length,
            "sliding_window": writer.add_sliding_window,
            "attn_logit_softcapping": writer.add_attn_logit_softcapping,
            "final_logit_softcapping": writer.add_final_logit_softcapping,
        }
        if hidden:
            writer.add_expert_feed_forward_length(hidden)
        for name, add in settings.items():
            value = getattr(args, name, None)
            if value:
                add(value)
