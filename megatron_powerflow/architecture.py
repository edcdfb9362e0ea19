"""What is a model, as far as its computation goes? These classes hold what its config.json says, as numbers.

Left out: reading it (`hf/config.py`), building it (`model/build.py`). This module imports nothing of ours and no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotary position embedding as the model's config.json states it."""

    theta: float
    # "default", "linear", "llama3", "longrope" or "yarn"; the readers refuse every other kind
    scaling: str = "default"
    factor: float = 1.0
    # llama3 only: wavelengths above `original_max_positions / low_freq_factor` are stretched by `factor`
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    # longrope only, up to original_max_positions: what each wavelength is multiplied by
    factors: tuple[float, ...] = ()
    # yarn only: pairs that turn more than beta_fast times in original_max_positions are kept, below beta_slow divided
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    whole_pairs: bool = True  # yarn only: the range between the two is widened to whole pairs
    attention_factor: float = 1.0  # longrope and yarn: what cosines and sines are multiplied by
    # yarn with Mla only: attention scores are multiplied by (0.1 mscale_all_dim ln(factor) + 1)^2
    mscale_all_dim: float = 0.0
    fraction: float = 1.0  # of each head's dimensions, from the first, that are rotated; the others stay as they are

    def rotated(self, head_dim: int) -> int:
        """Return the number of dimensions of a head that are rotated, of head_dim."""
        return int(head_dim * self.fraction)


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts, which replaces a layer's MLP; Architecture.ffn_hidden_size is that of one expert.

    Each of a layer's `num` experts is an MLP. A token goes to the per_token experts with the highest scores, and their
    weights are these scores (normalized False), or the scores divided by their sum over the chosen experts (True),
    times scaling.
    Example: Mixtral-8x7B 8, 2, True. DeepSeek-V3 256, 8, True, "sigmoid", True, 8, 4, 2.5, 3, 18432, 2048.
    """

    num: int
    per_token: int
    normalized: bool
    score: Literal["softmax", "sigmoid"] = "softmax"  # of the router's logits: over all experts, or of each
    choice_bias: bool = False  # a number for each expert is added to its score for the choice, not for the weight
    # the experts stand in groups, and a token's come from its groups_per_token best groups, which are those with the
    # largest sum of their two best scores
    num_groups: int = 1
    groups_per_token: int = 1
    scaling: float = 1.0
    first_layer: int = 0  # the layers before it have one MLP each, of dense_ffn_hidden_size
    dense_ffn_hidden_size: int | None = None
    shared_ffn_hidden_size: int | None = None  # of an MLP that every token goes through beside its experts; None: none


@dataclass(frozen=True, slots=True)
class Mla:
    """Multi-head latent attention: keys and values are made of one short vector per token, queries of another.

    Architecture.head_dim is that of queries and keys, nope_head_dim + rope_head_dim. Only the latter part is rotated,
    and that part of a key is the same for all heads. Example (DeepSeek-V3): 1536, 512, 128, 64, 128.
    """

    q_lora_rank: int | None  # None: queries are made of the hidden state itself
    kv_lora_rank: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """Everything about a model that decides its computation, read from its own config.json.

    Example (SmolLM2-135M): 30 layers, hidden 576, ffn 1536, 9 heads in 3 query groups of head_dim 64,
    vocabulary 49152, tied embeddings.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int  # of one expert, where there are experts
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    norm_epsilon: float
    rope: Rope
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    max_positions: int
    # tokens a position may look back, itself included; None: no limit
    sliding_window: int | None
    experts: Experts | None = None  # None: one MLP per layer
    mla: Mla | None = None  # None: every head has keys and values of its own, or its group's
    windowed_layers: tuple[bool, ...] | None = None  # the layers that have the sliding window; None: all of them
    qk_norm_over_heads: bool = False  # qk_norm is over all heads of a token together, not over each by itself
    pre_norm: bool = True  # RMS norms before attention and MLP
    post_norm: bool = False  # and behind them, before the residual is added
    zero_centered_norms: bool = False  # norms multiply by 1 + weight
    activation: Literal["silu", "gelu_tanh"] = "silu"  # of the MLP's gate
    embedding_scale: float | None = None  # what embeddings are multiplied by, rounded to their dtype; None: 1
    softmax_scale: float | None = None  # of attention scores; None: 1 / sqrt(head_dim)
    # s becomes softcap * tanh(s / softcap): scaled attention scores; logits, before the temperature. None: no cap
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    @property
    def positions_field(self) -> str:
        """The name of the config.json field that max_positions comes from."""
        rope = self.rope
        if rope.scaling == "longrope" and rope.original_max_positions == self.max_positions:
            return "original_max_position_embeddings"
        if rope.scaling == "yarn" and int(rope.factor * rope.original_max_positions) == self.max_positions:
            return "original_max_position_embeddings x factor"
        return "max_position_embeddings"

    @property
    def query_width(self) -> int:
        """The size of all queries of a token together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """The size of all keys of a token together."""
        return self.num_query_groups * self.head_dim
