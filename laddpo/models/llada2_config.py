"""The config of a LLaDA2 checkpoint. In: the content of a hub config.json. Out: `LLaDA2MoeConfig`, or a `UserError`."""

from __future__ import annotations

from types import MappingProxyType

from laddpo.errors import UserError
from laddpo.models.families import LLADA2_NAMES
from laddpo.models.foreign import number, only, optional, whole
from laddpo.models.llama_config import BLOCK_LENGTH, FIELDS, LlamaLikeConfig

_NO, _YES, _NONE_OR_0 = only(None, False), only(None, True), only(None, 0.0)
LLADA2_FIELDS = {
    **FIELDS,
    "moe_intermediate_size": whole(1, 2**20),
    "num_experts": whole(1, 2**12),
    "num_experts_per_tok": whole(1, 2**12),
    "num_shared_experts": optional(whole(0, 2**12)),
    "first_k_dense_replace": whole(0, 2**10),
    "n_group": whole(1, 2**12),
    "topk_group": whole(1, 2**12),
    "routed_scaling_factor": number(0, 1e3),
    "partial_rotary_factor": number(0, 1),
    "block_length": optional(BLOCK_LENGTH),
    **dict.fromkeys(("use_bias", "use_qkv_bias", "norm_head", "norm_softmax"), _NO),
    "using_split_qkv_in_self_attention": _NO,
    **dict.fromkeys(("use_qk_norm", "use_rmsnorm", "norm_topk_prob", "moe_router_enable_expert_bias"), _YES),
    **dict.fromkeys(("embedding_dropout", "output_dropout"), _NONE_OR_0),
    "score_function": only(None, "sigmoid"),
    "router_dtype": only(None, "fp32"),
}


class LLaDA2MoeConfig(LlamaLikeConfig):
    """LLaDA2.0 and 2.1: dense first blocks (`intermediate_size`), then experts (`moe_intermediate_size`).

    The defaults are the original's. Its files do not say `block_length`; ours do.
    """

    model_type = "llada2_moe"
    fields = LLADA2_FIELDS
    inert = MappingProxyType({"model_type": "llada2_moe"})  # its files say this or llada2_moe_veomni
    attribute_map = {**LLADA2_NAMES, "init_std": "initializer_range"}  # noqa: RUF012
    has_head_norms = True

    def __init__(
        self,
        *,
        moe_intermediate_size: int = 48,
        num_experts: int = 16,
        num_experts_per_tok: int = 2,
        num_shared_experts: int | None = 0,
        first_k_dense_replace: int = 0,
        n_group: int = 8,
        topk_group: int = 4,
        routed_scaling_factor: float = 2.5,
        partial_rotary_factor: float = 0.5,
        block_length: int | None = None,
        **kwargs,
    ):
        self.moe_intermediate_size = moe_intermediate_size
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.num_shared_experts, self.first_k_dense_replace = num_shared_experts or 0, first_k_dense_replace
        self.n_group, self.topk_group, self.routed_scaling_factor = n_group, topk_group, routed_scaling_factor
        self.block_length = 32 if block_length is None else block_length
        super().__init__(**kwargs)
        self.partial_rotary_factor = partial_rotary_factor

    @property
    def rotary_width(self) -> int:
        """How much of each head is rotated."""
        return int(self.head_dim * self.partial_rotary_factor)


def refuse_impossible_experts(config: LLaDA2MoeConfig) -> None:
    """Raise `UserError` for groups of experts, or a rotation, that there cannot be."""
    experts, groups, rest = config.num_experts, config.n_group, config.num_experts % config.n_group
    problems = []
    if rest or experts < 2 * groups:
        problems.append(
            f"model config: num_experts {experts} in n_group {groups} groups; expected groups of one size, at least 2 "
            "experts each. Change one of them."
        )
    elif config.topk_group > groups or config.num_experts_per_tok > config.topk_group * (experts // groups):
        problems.append(
            f"model config: topk_group {config.topk_group} of {groups} groups, each of {experts // groups} experts, do "
            f"not hold num_experts_per_tok {config.num_experts_per_tok}. Raise topk_group or choose fewer experts."
        )
    if config.rotary_width % 2:
        problems.append(
            f"model config: partial_rotary_factor {config.partial_rotary_factor:g} of head_dim {config.head_dim} is "
            f"{config.rotary_width}; expected an even number. Change one of them."
        )
    if problems:
        raise UserError(*problems)
