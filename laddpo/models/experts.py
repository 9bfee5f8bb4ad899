"""A layer of experts: the router's choice, the chosen experts, and the fast product over all of them.

Every expert is a module of its own, under the hub's names, so that adapters, 4 bits and files see plain linear layers.
Their frozen weights lie one behind the other in memory (`stack`), so that one grouped product reads them all: LLaDA2
would need 15,360 products a pass otherwise. Where that cannot be (trained or sharded weights, float64, 8 bits, DoRA)
the experts run one after the other, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from laddpo.models.lora import ADAPTER
from laddpo.models.tokenwise import gated

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


class Router(nn.Module):
    """Chooses experts for each token. No nn.Linear: it is never quantised and carries no adapter."""

    def __init__(self, width: int, n_experts: int, chosen: int):
        super().__init__()
        self.chosen = chosen
        self.weight = nn.Parameter(torch.empty(n_experts, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of the chosen experts, the weights float32 or wider. [T, D] -> [T, k] each"""
        raise NotImplementedError


class SoftmaxRouter(Router):
    """An expert's weight is its probability among all experts: not renormalised, as LLaDA-MoE."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = nn.functional.linear(x, self.weight)
        scores = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        return scores.topk(self.chosen, dim=-1)


class Expert(GatedMLP):
    """One of many. `changes` counts the layers that were ever put into any of them, as attaching an adapter does."""

    changes = 0

    def __setattr__(self, name: str, value) -> None:
        Expert.changes += isinstance(value, nn.Module)
        super().__setattr__(name, value)


class Experts(nn.Module):
    """The sum of the chosen experts, each times its weight, and of the shared expert if there is one.

    A token's experts depend on the token alone, so packing changes nothing. Auxiliary losses are of pretraining: none
    is used here.
    """

    def __init__(self, width: int, inner: int, n_experts: int, router: Router, shared: int = 0):
        super().__init__()
        self.gate = router
        self.experts = nn.ModuleList(Expert(width, inner) for _ in range(n_experts))
        self.shared_experts = GatedMLP(width, shared) if shared else None
        self._found: tuple | None = None  # the fast products, and what must still be so for them to hold

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        weights, chosen = self.gate(flat)  # [T, k] each
        order = chosen.flatten().argsort(stable=True)  # the choices, expert by expert
        tokens = order // self.gate.chosen
        counts = chosen.flatten().bincount(minlength=len(self.experts))
        outputs = self.run_experts(flat[tokens], counts) * weights.to(flat.dtype).flatten()[order, None]
        by_token = outputs[order.argsort()].unflatten(0, (-1, self.gate.chosen))  # a scattered sum has no fixed order
        out = by_token.sum(1).view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x)

    def run_experts(self, inputs: Tensor, counts: Tensor) -> Tensor:
        """Each expert on its tokens, which lie one behind the other. inputs [T * k, D], counts [experts]"""
        products = self._products(inputs.dtype)
        if products is None:
            return self.run_one_by_one(inputs, counts)
        ends = counts.cumsum(0, dtype=torch.int32)
        gate, up, down = (lambda x, times=times: times(x, ends) for times in products)
        return down(gated(gate(inputs), up(inputs)))

    def run_one_by_one(self, inputs: Tensor, counts: Tensor) -> Tensor:
        parts = zip(self.experts, inputs.split(counts.tolist()), strict=True)
        # An expert without tokens runs where it is trained: every process then has a gradient for every weight.
        return torch.cat([expert(part) for expert, part in parts if len(part) or _trains(expert)])

    def stack(self) -> None:
        """Put the experts' weights one behind the other. They stay parameters of their own."""
        for name in PROJECTIONS:
            layers = [_base(getattr(expert, name)) for expert in self.experts]
            if _kind(layers) == "4bit":
                _stack_4bit(layers)
            elif _kind(layers) == "plain":
                _lay_together([layer.weight for layer in layers])
        self._found = None

    def _apply(self, fn, *args, **kwargs):
        super()._apply(fn, *args, **kwargs)  # moved or cast, each weight has memory of its own
        self.stack()
        return self

    def _products(self, dtype: torch.dtype) -> list[Callable[[Tensor, Tensor], Tensor]] | None:
        """For each projection the product of all experts at once, or None where they must run one by one."""
        first, last = (_base(self.experts[place].gate_proj).weight for place in (0, -1))
        state = (Expert.changes, id(first), first.data_ptr(), last.data_ptr(), first.requires_grad, dtype)
        if self._found is None or self._found[0] != state:
            products = [_grouped_linear([getattr(e, name) for e in self.experts], dtype) for name in PROJECTIONS]
            self._found = (state, None if None in products else products)
        return None if torch.is_autocast_enabled(first.device.type) else self._found[1]


def stack_experts(model: nn.Module) -> None:
    """Lay together the experts of every layer. Call it when the weights are where they stay."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.stack()


def _grouped_linear(layers: list[nn.Module], dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The product of like layers, one for each group of rows, as (rows, ends of the groups) -> outputs; or None."""
    bases = [_base(layer) for layer in layers]
    adapted = [layer for layer, base in zip(layers, bases, strict=True) if layer is not base]
    kind, weight = _kind(bases), bases[0].weight
    if adapted and (len(adapted) != len(layers) or not all(map(_is_plain_lora, adapted))):
        return None
    sizes = (bases[0].in_features, bases[0].out_features, *([adapted[0].r[ADAPTER]] if adapted else []))
    fits = dtype in GROUPED_DTYPES and all(n % 8 == 0 for n in sizes)  # the kernel wants rows of 16 bytes
    if not fits or kind == "other" or weight.requires_grad or (kind == "plain" and weight.dtype != dtype):
        return None
    if _together([base.weight for base in bases]) is None:
        return None

    def read() -> Tensor:
        return _together([bases[0].weight], len(bases)) if kind == "plain" else _unpacked(bases)

    def times(x: Tensor, ends: Tensor) -> Tensor:
        compute = x.dtype if kind == "plain" else bases[0].compute_dtype or x.dtype
        out = _FrozenProduct.apply(x.to(compute), read, ends).to(x.dtype)
        if adapted and not adapted[0].disable_adapters:
            down = torch.stack([layer.lora_A[ADAPTER].weight for layer in adapted]).to(x.dtype)
            up = torch.stack([layer.lora_B[ADAPTER].weight for layer in adapted]).to(x.dtype)
            low = _TrainedProduct.apply(x, down, ends)
            out = torch.add(out, _TrainedProduct.apply(low, up, ends), alpha=adapted[0].scaling[ADAPTER])
        return out

    return times


class _FrozenProduct(torch.autograd.Function):
    """x @ weight[expert].T, of which nothing is kept: `read` gives the weights [experts, out, in] again."""

    @staticmethod
    def forward(ctx, x: Tensor, read: Callable[[], Tensor], ends: Tensor) -> Tensor:
        ctx.read = read
        ctx.save_for_backward(ends)
        return nn.functional.grouped_mm(x, read().to(x.dtype).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (ends,) = ctx.saved_tensors
        return nn.functional.grouped_mm(grad.contiguous(), ctx.read().to(grad.dtype), offs=ends), None, None


class _TrainedProduct(torch.autograd.Function):
    """x @ weight[expert].T for small trained weights [experts, out, in]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, ends = ctx.saved_tensors
        grad, slope = grad.contiguous(), torch.zeros_like(weight)
        # one by one: a grouped product over rows wants groups of a multiple of 16 bytes on CUDA
        start = 0
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                slope[expert] = grad[start:end].t() @ x[start:end]
            start = end
        return nn.functional.grouped_mm(grad, weight, offs=ends), slope, None


def _is_plain_lora(layer: nn.Module) -> bool:
    """Whether an adapted layer adds two matrices of this program's adapter and nothing else. DoRA does more."""
    return layer.active_adapters == [ADAPTER] and not layer.lora_variant and not layer.merged


def _base(layer: nn.Module) -> nn.Module:
    """The layer below an adapter."""
    return getattr(layer, "base_layer", layer)


def _kind(layers: Sequence[nn.Module]) -> str:
    """How all of these store their weights: "plain", "4bit" or "other"."""
    kinds = {type(layer) for layer in layers}
    if kinds == {nn.Linear}:
        return "plain"
    return "4bit" if {kind.__name__ for kind in kinds} == {"Linear4bit"} else "other"


def _together(tensors: Sequence[Tensor], count: int | None = None) -> Tensor | None:
    """Equal tensors that lie one behind the other as one, without a copy; None where they do not. `count`: how many
    follow the one that is given. # [count, *shape]"""
    first, count = tensors[0].detach(), count or len(tensors)
    places = [tensor.data_ptr() - first.data_ptr() for tensor in tensors]
    room = first.untyped_storage().nbytes() - first.storage_offset() * first.element_size()
    if not first.is_contiguous() or places != [i * first.nbytes for i in range(len(tensors))]:
        return None
    if room < count * first.nbytes:
        return None
    return first.as_strided((count, *first.shape), (first.numel(), *first.stride()))


def _lay_together(tensors: Sequence[Tensor]) -> Tensor:
    """Give equal tensors memory one behind the other, and return it. # [count, *shape]"""
    whole = torch.stack([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, whole, strict=True):
        tensor.data = part
    return whole


def _stack_4bit(layers: Sequence[nn.Module]) -> None:
    """The packed numbers and their scales, laid together. Scales that are quantised in blocks over the end of a weight
    are unpacked: float32 scales."""
    from bitsandbytes.functional import dequantize_blockwise

    states = [layer.weight.quant_state for layer in layers]
    if states[0].nested and states[0].absmax.numel() % states[0].state2.blocksize:
        for state in states:
            state.absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
            state.nested, state.state2, state.offset = False, None, None
    _lay_together([layer.weight for layer in layers])
    _lay_together_in(states, "absmax")
    if states[0].nested:
        _lay_together_in([state.state2 for state in states], "absmax")
        _lay_together_in(states, "offset")


def _lay_together_in(holders: Sequence, name: str) -> None:
    whole = torch.stack([getattr(holder, name) for holder in holders])
    for holder, part in zip(holders, whole, strict=True):
        setattr(holder, name, part)


def _unpacked(layers: Sequence[nn.Module]) -> Tensor:
    """The weights of 4-bit layers that were laid together. # [layers, out, in]"""
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    count, weight = len(layers), layers[0].weight
    state, inner = weight.quant_state, weight.quant_state.state2
    scales = _together([state.absmax], count)
    if state.nested:
        nested = QuantState(
            absmax=_together([inner.absmax], count).flatten(),
            blocksize=inner.blocksize,
            code=inner.code,
            dtype=inner.dtype,
        )
        scales = dequantize_blockwise(scales.flatten(), nested).view(count, -1)
        scales = scales + _together([state.offset], count)[:, None]
    whole = QuantState(
        absmax=scales.flatten(),
        shape=torch.Size((count * state.shape[0], *state.shape[1:])),
        blocksize=state.blocksize,
        code=state.code,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    packed = _together([weight.data], count).flatten(0, 1)
    return dequantize_4bit(packed, whole).view(count, *state.shape)


def _trains(module: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
