"""What a training step will need: bytes by part, from plain numbers, before any weight is loaded. No torch.

`predict_memory(setup, load)` gives the peak of a micro-step of so many tokens; `largest_token_budget` turns that round;
`explain` says why something does not fit and which two settings help most. Counted are the tensors that autograd keeps
and the largest moment on top of them, as laddpo/models/llada.py makes them; verified on the CPU by counting allocated
bytes (tests/core/test_memory.py). On CUDA the same count is arithmetic: the allocator rounds and the context is extra.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from laddpo.core.optim import OPTIMIZERS
from laddpo.hardware.shape import Shape
from laddpo.models.linears import ROLES

GIB = 2**30
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**25}  # logits held at once: laddpo/models/head.py
MOST_TOKENS = 16384  # larger micro-steps gain no speed on any GPU tried by us or reported
BUDGET_STEP = 64  # tokens


@dataclass(frozen=True)
class Setup:
    """What decides about memory, except how much is computed at once.

    `rank` None: all weights are trained. `quantization`: "none", or a name of STORED_BYTES.
    `gradient_groups`: buffers that a pair larger than a micro-step needs in `stream` (coefficient_groups of the loss).
    `shards`: processes among which weights, gradients and optimizer are divided; the prediction is for one of them.
    """

    shape: Shape
    device: str = "cuda"
    precision: str = "bf16"
    quantization: str = "none"
    rank: int | None = 16
    targets: tuple[str, ...] = ROLES
    optimizer: str = "adamw"
    checkpointing: bool = False
    offload: bool = False
    embeddings_on_cpu: bool = False
    backward: str = "stream"
    gradient_groups: int = 1
    shards: int = 1

    @property
    def is_full(self) -> bool:
        return self.rank is None

    @property
    def trained(self) -> int:
        """Trained parameters, all float32."""
        if self.is_full:
            return self.shape.parameters
        shape = self.shape
        return self.rank * sum(sum(shape.linear(role)) * shape.count(role) for role in self.targets)

    @property
    def active_trained(self) -> int:
        """Those of an adapter that one token goes through."""
        shape = self.shape
        passed = {role: shape.experts_chosen if shape.copies(role) > 1 else 1 for role in self.targets}
        return self.rank * sum(sum(shape.linear(role)) * shape.layers(role) * passed[role] for role in self.targets)


@dataclass(frozen=True)
class Load:
    """One micro-step: `tokens`, of which `rows` are masked (None: half), in sequences of `mixed` lengths or of one.

    `exceeds`: pairs larger than a micro-step occur, so that `stream` needs its buffers. `alone`: a step is one pair.
    Of draws that share a context, for each token of the micro-step: `keys` that attention copies, `seen` entries of its
    masks.
    """

    tokens: int
    rows: int | None = None
    mixed: bool = True
    exceeds: bool = True
    alone: bool = False
    keys: float = 0.0
    seen: float = 0.0


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part at the moment of the peak. `resident` parts are there all the time."""

    setup: Setup
    load: Load
    resident: dict[str, int]
    passing: dict[str, int]

    @property
    def parts(self) -> dict[str, int]:
        return {**self.resident, **self.passing}

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def largest_part(self) -> str:
        return max(self.parts, key=self.parts.__getitem__)


def predict_memory(setup: Setup, load: Load) -> MemoryPlan:
    """Bytes by part when a training step is at its largest."""
    resident = {
        "weights": _weights(setup) // setup.shards,
        "adapter": 0 if setup.is_full else 4 * setup.trained // setup.shards,
        "optimizer": _optimizer(setup) // setup.shards,
        "gradient": 4 * setup.trained // setup.shards,
        "gradient buffers": 4 * setup.trained * _buffers(setup, load),
        "gathered weights": _gathered(setup),
    }
    saved = _saved_activations(setup, load)
    moments = [_in_head(setup, load), _in_last_norm(setup, load), _in_block(setup, load)]
    passing = max(({"activations": saved, **moment} for moment in moments), key=lambda moment: sum(moment.values()))
    update = {"activations": 0, "logits": 0, "workspace": _update_workspace(setup)}
    return MemoryPlan(setup, load, resident, max(passing, update, key=lambda moment: sum(moment.values())))


def largest_token_budget(setup: Setup, available: int, load: Load | None = None, most: int = MOST_TOKENS) -> int:
    """The most tokens of a micro-step whose peak fits `available` bytes; 0 when not even the smallest does."""
    load = load or Load(0)

    def fits(tokens: int) -> bool:
        return predict_memory(setup, dataclasses.replace(load, tokens=tokens, rows=None)).peak <= available

    low, high = 0, most // BUDGET_STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * BUDGET_STEP) else (low, middle - 1)
    return low * BUDGET_STEP


def explain(plan: MemoryPlan, available: int, what: str) -> str:
    """Why `what` does not fit: predicted, available, the largest part, and the two settings that save most; or that
    all of them together would not do."""
    part = plan.largest_part
    ranked = sorted(_remedies(plan.setup), key=lambda remedy: predict_memory(remedy[1], plan.load).peak)
    helpful = [
        f"{text} (saves {gib(plan.peak - predict_memory(setup, plan.load).peak)})"
        for text, setup in ranked
        if predict_memory(setup, plan.load).peak < plan.peak
    ][:2]
    helpful += ["data.max_length lower (with data.truncation=drop)", "a smaller adapter.r"][: 2 - len(helpful)]
    why = (
        f"{what} does not fit: predicted {gib(plan.peak)}, available {gib(available)}. The largest part is "
        f"{part} ({gib(plan.parts[part])}). "
    )
    few = dataclasses.replace(plan.load, tokens=min(plan.load.tokens, BUDGET_STEP), rows=None)
    least = predict_memory(_most_sparing(plan.setup), few).peak
    if least > available:
        return (
            f"{why}With every setting that saves memory a micro-step of {few.tokens} tokens takes {gib(least)}: use a "
            "smaller model or a larger device."
        )
    return f"{why}What helps most: {', or '.join(helpful)}."


def gib(size: float) -> str:
    """1.25 GiB, or MiB below 0.1 GiB."""
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"


def _weights(setup: Setup) -> int:
    """Blocks as they are stored; embedding, head and norms in the compute dtype. Full fine-tuning: float32 masters."""
    shape, element = setup.shape, ELEMENT_BYTES[setup.precision]
    if setup.is_full:
        return 4 * shape.parameters
    blocks = shape.linear_parameters
    stored = blocks * (element if setup.quantization == "none" else STORED_BYTES[setup.quantization])
    if setup.quantization == "int8":  # one float32 scale for each row
        stored += 4 * sum(shape.linear(role)[1] * shape.count(role) for role in shape.roles)
    is_on_cpu = setup.embeddings_on_cpu and not shape.is_tied
    outside = shape.parameters - blocks - (shape.vocab_size * shape.d_model if is_on_cpu else 0)
    return round(stored + outside * element)


def _gathered(setup: Setup) -> int:
    """Bytes of sharded weights: what is outside the blocks, two blocks (one is fetched while one computes) and,
    if all weights are trained, their gradients before they are divided."""
    if setup.shards == 1:
        return 0
    shape = setup.shape
    outside, block = shape.vocabulary_parameters, shape.block_parameters
    element = 4 if setup.is_full else ELEMENT_BYTES[setup.precision]
    return element * (outside + 2 * block) + (4 * (outside + block) if setup.is_full else 0)


def _optimizer(setup: Setup) -> int:
    """The moments, two as a rule. 8-bit ones keep small tensors, and one scale for 256 values, in float32."""
    kind = OPTIMIZERS[setup.optimizer]
    if not kind.is_8bit:
        in_blocks = setup.shape.linear_parameters if setup.is_full else setup.trained
        return 8 * setup.trained - 4 * (2 - kind.matrix_moments) * in_blocks
    small = 0
    if not setup.is_full:
        shape = setup.shape
        sizes = [(setup.rank * n, shape.count(role)) for role in setup.targets for n in shape.linear(role)]
        small = sum(size * count for size, count in sizes if size < 4096)
    return round(8 * small + 2 * (setup.trained - small) * (1 + 4 / 256))


def _buffers(setup: Setup, load: Load) -> int:
    """Gradients beside the step's own. A step's first pair finds none there: one of its buffers becomes the step's."""
    if setup.backward != "stream" or not load.exceeds:
        return 0
    return setup.gradient_groups - load.alone


def _saved_activations(setup: Setup, load: Load) -> int:
    """What autograd keeps until the backward pass, and the rotary angles, which all blocks share."""
    shape = setup.shape
    rotation = 4 * shape.head_width + 3 * 8  # cos and sin, half a head each; ids, positions, their order
    inputs = (shape.n_layers + 1) * shape.d_model * _stream_bytes(setup)
    per_token = inputs if setup.checkpointing else shape.n_layers * _block_bytes(setup, load)
    kept = 0 if setup.offload else round(per_token * load.tokens)
    casts = 0 if setup.checkpointing else shape.n_layers * _block_casts(setup)
    return kept + rotation * load.tokens + casts


def _block_bytes(setup: Setup, load: Load) -> float:
    """Bytes that one block keeps for each token."""
    shape, element = setup.shape, ELEMENT_BYTES[setup.precision]
    width, mlp, query = shape.d_model, shape.active_mlp, shape.query_width
    wide = 4 if setup.device == "cpu" else _stream_bytes(setup)  # without a fused kernel a norm's input is kept wide
    norms = 2 * width * wide + 2 * 4 + (2 * width * wide if setup.is_full else 0)
    is_widened = setup.device == "cpu" and setup.is_full and setup.precision != "fp32"  # models/attention.py
    kept = wide if is_widened else element
    attention = 2 * (query + shape.kv_width) * kept + 4 * shape.n_heads
    # under a mask each query head has its own copy of the keys
    attention += 2 * shape.query_width * kept * load.keys + element * load.seen
    if shape.has_head_norms:
        norms += (query + shape.kv_width) * wide * (2 if setup.is_full else 1) + 4 * (shape.n_heads + shape.n_kv_heads)
    if setup.device == "cpu" and load.mixed:  # outputs of runs of equal lengths are joined into a copy
        attention += query * element
    trained = shape.roles if setup.is_full else setup.targets
    into_attention = width * element * bool({"q", "k", "v", "qkv"} & set(trained))
    into_mlp = width * element * bool({"gate", "up"} & set(trained))
    gated = mlp * element * 2 + ("down" in trained) * element * (mlp - shape.shared_experts * shape.mlp_hidden_size)
    passes = {role: shape.experts_chosen if shape.copies(role) > 1 else 1 for role in trained}
    low_rank = 0 if setup.is_full else setup.rank * sum(passes[role] for role in setup.targets) * element
    if shape.n_experts:  # what is routed, probabilities and choices; each expert's input, and its unweighted output
        into_mlp *= shape.experts_chosen
        into_mlp += width * element * bool({"shared_gate", "shared_up"} & set(trained))
        gated += shape.shared_experts * shape.mlp_hidden_size * element * ("shared_down" in trained)
        routing = 4 * shape.n_experts + 28 * shape.experts_chosen
        gated += (shape.experts_chosen + (2 if setup.is_full else 1)) * width * element + routing
    return norms + attention + into_attention + into_mlp + gated + low_rank


def _stream_bytes(setup: Setup) -> int:
    """Bytes of a number between blocks: float32 weights that are trained in mixed precision keep it in float32."""
    return 4 if setup.is_full else ELEMENT_BYTES[setup.precision]


def _block_casts(setup: Setup) -> int:
    """Copies of float32 trained weights in a narrower compute dtype, kept for the backward pass."""
    if setup.precision == "fp32":
        return 0
    element = ELEMENT_BYTES[setup.precision]
    if setup.is_full:
        return element * setup.shape.linear_parameters // setup.shape.n_layers
    return element * setup.trained // setup.shape.n_layers


def _in_block(setup: Setup, load: Load) -> dict[str, int]:
    """The backward pass of a block's gated product: its gradients, unpacked weights, what is recomputed."""
    shape, element = setup.shape, ELEMENT_BYTES[setup.precision]
    width, mlp = shape.d_model, shape.mlp_hidden_size
    # experts come one after the other; what goes in and out of all chosen ones is there at once
    gradients = 3 * shape.experts_chosen * width if shape.n_experts else 2 * mlp
    workspace = load.tokens * gradients * element
    if setup.checkpointing or setup.offload:  # the block's own activations are back
        recomputed = _block_bytes(setup, load)
        if _stream_bytes(setup) == 4 and setup.checkpointing and not setup.offload:
            recomputed -= width * 4  # its input is what was kept
        workspace += round(load.tokens * recomputed) + (_block_casts(setup) if setup.checkpointing else 0)
    if setup.quantization != "none":  # experts are unpacked together, except those of 8 bits
        workspace += width * mlp * element * (shape.n_experts or 1 if "4bit" in setup.quantization else 1)
    if setup.is_full:
        workspace += 4 * width * mlp
    return {"logits": 0, "workspace": workspace}


def _in_last_norm(setup: Setup, load: Load) -> dict[str, int]:
    """The backward pass of the norm before the head, when every activation is still kept."""
    width = setup.shape.d_model
    per_token = 5 * width * 4 if setup.device == "cpu" else 3 * width * ELEMENT_BYTES[setup.precision]
    return {"logits": 0, "workspace": load.tokens * per_token}


def _in_head(setup: Setup, load: Load) -> dict[str, int]:
    """Forward and backward of the head on the masked rows, a chunk of logits at a time."""
    shape, element = setup.shape, ELEMENT_BYTES[setup.precision]
    rows = load.tokens // 2 if load.rows is None else load.rows
    chunk_rows = min(rows, max(64, CHUNK_ELEMENTS[setup.device] // shape.vocab_size))
    logits = (4 if element == 4 else 6) * chunk_rows * shape.vocab_size  # float32, and a copy in a narrower dtype
    workspace = 2 * rows * shape.d_model * element  # hidden states, and the slope of every row
    if setup.is_full:  # gradient of the head, and one chunk's share of it
        workspace += 2 * 4 * shape.vocab_size * shape.d_model
        if setup.precision != "fp32":
            workspace += element * shape.vocab_size * shape.d_model
    return {"logits": logits, "workspace": workspace}


def _update_workspace(setup: Setup) -> int:
    """The optimizer's own temporaries: on CUDA all tensors at once, on the CPU one after the other."""
    if not OPTIMIZERS[setup.optimizer].has_workspace:
        return 0
    if setup.device == "cuda":
        return 4 * setup.trained // setup.shards
    linears = map(setup.shape.linear, setup.shape.roles)
    largest = max(a * b for a, b in linears) if setup.is_full else setup.rank * max(map(max, linears))
    return 8 * max(largest, setup.shape.vocab_size * setup.shape.d_model if setup.is_full else 0)


def _remedies(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Settings that could help, as written on the command line, and what they would change."""
    for applies, text, changes in REMEDIES:
        if applies(setup):
            yield text, dataclasses.replace(setup, **changes)


def _most_sparing(setup: Setup) -> Setup:
    """With everything that _remedies knows, one after the other."""
    for applies, _, changes in REMEDIES:
        if applies(setup):
            setup = dataclasses.replace(setup, **changes)
    return setup


STORED_BYTES = {  # per weight of a block
    "int8": 1.0,
    "4bit": 0.5 + 4 / 64,  # one float32 scale for 64 values
    "4bit_double": 0.5 + 1 / 64 + 4 / (64 * 256),  # scales in 8 bits, with scales of their own
}

REMEDIES: tuple[tuple[Callable[[Setup], bool], str, dict], ...] = (
    (lambda s: not s.checkpointing, "hardware.gradient_checkpointing=true", {"checkpointing": True}),
    (lambda s: not s.is_full and "4bit" not in s.quantization, "quantization=nf4", {"quantization": "4bit_double"}),
    (lambda s: s.is_full, "adapter=lora", {"rank": 16}),
    (lambda s: s.optimizer == "adamw", "optim=adamw_8bit", {"optimizer": "adamw_8bit"}),
    (lambda s: s.device == "cuda" and not s.offload, "hardware.offload_activations=true", {"offload": True}),
    (
        lambda s: s.device == "cuda" and not s.is_full and not s.embeddings_on_cpu and not s.shape.is_tied,
        "hardware.embeddings_on_cpu=true",
        {"embeddings_on_cpu": True},
    ),
    (lambda s: s.precision == "fp32" and s.device == "cuda", "hardware.precision=bf16", {"precision": "bf16"}),
    (lambda s: not s.is_full and s.rank > 8, "adapter.r=8", {"rank": 8}),
    (lambda s: s.backward == "stream" and s.is_full, "hardware.backward=two_pass", {"backward": "two_pass"}),
)
