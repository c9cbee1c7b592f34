"""Where transformers, and so PEFT, keeps the layers of an mlx-lm model.

Most layers have the same name in both. What differs are mixtures of experts: mlx-lm has a
`SwitchLinear` for each of gate, up and down, transformers (5 and later) one parameter for gate and
up together and one for down, and a router that is no linear layer. PEFT adapts such parameters by
the names in `target_parameters`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from mlx_edgelora.errors import EdgeLoraError

# Architectures whose linear layers have the same names in transformers; a test compares them.
SAME_NAMES = frozenset(
    {
        "cohere",
        "cohere2",
        "ernie4_5",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "granite",
        "helium",
        "hunyuan_v1_dense",
        "llama",
        "ministral3",
        "mistral",
        "nemotron",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "seed_oss",
        "smollm3",
        "starcoder2",
    }
)


@dataclass(frozen=True)
class Experts:
    """Names of a mixture of experts, relative to a block.

    Attributes:
        block: the mixture's module in mlx-lm.
        renamed: the same module in transformers; it contains `experts` with the parameters
            `gate_up_proj` [experts, 2 x hidden, in] and `down_proj` [experts, out, hidden].
        names: the expert's gate, up and down matrices in a checkpoint that has one for each.
    """

    block: str
    renamed: str = "mlp"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


MIXTURES = {
    "mixtral": Experts("block_sparse_moe", names=("w1", "w3", "w2")),
    "olmoe": Experts("mlp"),
    "qwen2_moe": Experts("mlp"),
    "qwen3_moe": Experts("mlp"),
}
# mlx-lm's name of the module with the experts' matrices.
SWITCH = "switch_mlp"
PROJECTIONS = "gate_proj", "up_proj", "down_proj"
# In mixtures PEFT takes linear layers of these names for experts, and would not adapt them.
_TAKEN = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


@dataclass(frozen=True)
class Names:
    """The names of an architecture's layers in both libraries."""

    experts: Experts | None = None

    def theirs(self, name: str) -> str:
        """The name in transformers of a layer of mlx-lm, other than experts."""
        return (
            name if self.experts is None else _swap(name, self.experts.block, self.experts.renamed)
        )

    def ours(self, name: str) -> str:
        """The name in mlx-lm of a layer of transformers, other than experts."""
        return (
            name if self.experts is None else _swap(name, self.experts.renamed, self.experts.block)
        )

    def is_parameter(self, name: str) -> bool:
        """Whether PEFT must adapt a linear layer by the name of its parameter `weight`."""
        return self.experts is not None and name.rpartition(".")[2] in _TAKEN

    def split(self, name: str) -> tuple[str, str] | None:
        """Divide mlx-lm's name of an expert layer into its mixture in transformers and its own.

        Returns:
            Such as `model.layers.0.mlp.experts` and `gate_proj`, or None for other layers.
        """
        mixture, _, projection = name.rpartition(".")
        if self.experts is None or not mixture.endswith(f".{SWITCH}"):
            return None
        return f"{self.theirs(mixture.removesuffix(f'.{SWITCH}'))}.experts", projection

    def switch(self, mixture: str, projection: str) -> str:
        """Mlx-lm's name of an expert layer: the inverse of `split`."""
        return f"{self.ours(mixture.removesuffix('.experts'))}.{SWITCH}.{projection}"


def _swap(name: str, old: str, new: str) -> str:
    """Replace a module's name within a dotted name."""
    return f"{name}.".replace(f".{old}.", f".{new}.", 1)[:-1]


def names_of(model_type: str) -> Names:
    """The names of an architecture.

    Raises:
        EdgeLoraError: its names in transformers are not known here.
    """
    if model_type in MIXTURES:
        return Names(MIXTURES[model_type])
    if model_type in SAME_NAMES:
        return Names()
    raise EdgeLoraError(
        f"model: PEFT's names for the layers of {model_type} are not known here, expected one of "
        f"{', '.join(known())}; merge the adapter into the model with mlx-edgelora fuse"
    )


def known() -> Iterator[str]:
    """The architectures whose names are known, in order."""
    return iter(sorted(SAME_NAMES | set(MIXTURES)))
