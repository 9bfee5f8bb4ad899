"""How the blocks of a model are executed: recomputed in the backward pass, or compiled. Neither changes a result.

Checkpointing is exact; compilation fuses the token-wise parts and agrees to rounding.
"""

from __future__ import annotations

import torch


def checkpoint_blocks(model, enabled: bool = True) -> None:
    """Keep only each block's input and recompute the rest for gradients: a third more work, far less memory.

    Puts the model in training mode, without which transformers' layers do not checkpoint; nothing else depends on the
    mode here, for there is no dropout. Works when no input needs a gradient, as under LoRA.
    """
    if not enabled:
        off = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
        return off()
    model.train()
    settings = {"use_reentrant": False, "preserve_rng_state": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    if hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()  # a hook that only reentrant checkpoints need
    assert all(block.gradient_checkpointing for block in model.blocks), "checkpointing did not switch on"


def compile_blocks(model) -> None:
    """Compile what is done token by token in every block, for any number of tokens; attention stays as it is.

    A compilation serves all packings and all blocks, because no sequence length enters the compiled parts and the
    weights are inputs of theirs. Several are made: with and without gradients, adapter on and off. Values move by
    rounding: log-likelihoods by about 1e-7 relative, gradients by 1e-6.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_COMPILATIONS)
    for experts in model.modules():
        if hasattr(experts, "run_experts"):  # how many tokens each has is known at every call alone
            experts.run_experts = torch.compiler.disable(experts.run_experts)
    for block in model.blocks:
        block.project = torch.compile(block.project, dynamic=True)
        block.finish = torch.compile(block.finish, dynamic=True)


MOST_COMPILATIONS = 64  # beyond torch's own limit of 8 blocks would silently run uncompiled
