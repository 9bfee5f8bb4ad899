"""Every family against recorded outputs of its public reference code: the folders of $LADDPO_GOLDEN.

A folder holds config.json, model.safetensors, inputs.safetensors and expected.safetensors of a tiny random model.
Without the variable the folder golden/ of the shared files is read.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from laddpo.core.elbo import PackedSequences
from laddpo.evaluation.sampling import SamplerSettings, generate
from laddpo.models.adapters import attach_lora, save_adapter
from laddpo.models.denoiser import TransformerDenoiser
from laddpo.models.families import FAMILIES, family_of
from laddpo.models.loading import keep_original_fields, load_model, mask_token_id, save_model

PLACE = Path(os.environ.get("LADDPO_GOLDEN") or Path(__file__).resolve().parents[3] / "shared" / "golden")
FOLDERS = sorted(path.parent.name for path in PLACE.glob("*/config.json")) or ["none"]
CASES = ("full", "masked", "right_pad", "left_pad", "one_token", "packed")


class Golden:
    """A folder's model, its tensors, and the name of its architecture."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.architecture = self.config["architectures"][0]
        if self.architecture not in FAMILIES:
            pytest.skip(f"{self.architecture} is not supported")
        self.tensors = {**load_file(folder / "inputs.safetensors"), **load_file(folder / "expected.safetensors")}
        self.model = load_model(str(folder))
        self.mask = mask_token_id(self.model)

    def cases(self) -> list[str]:
        """The inputs of logits: full, masked.25, packed and so on."""
        names = [name.removesuffix(".input_ids") for name in self.tensors if name.endswith(".input_ids")]
        return sorted(name for name in names if name.startswith(CASES) and f"{name}.logits" in self.tensors)

    def close(self, found, wanted) -> None:
        torch.testing.assert_close(found, wanted, atol=5e-5 + 2e-6 * float(wanted.abs().max()), rtol=0)


@pytest.fixture(params=FOLDERS)
def either(request):
    """A folder of either kind of attention."""
    folder = PLACE / request.param
    if not (folder / "config.json").exists():
        pytest.skip(f"no folder of golden outputs is in {PLACE.name}/; name one by $LADDPO_GOLDEN")
    return Golden(folder)


@pytest.fixture
def golden(either):
    """A folder with cases of bidirectional attention."""
    if either.model.block_length:
        pytest.skip(f"{either.architecture} attends block-causally: its folder has block cases alone")
    return either


def check_logits(golden: Golden, model=None) -> None:
    assert len(golden.cases()) >= 6
    for case in golden.cases():
        named = {n: golden.tensors.get(f"{case}.{n}") for n in ("input_ids", "attention_mask", "position_ids")}
        real = golden.tensors.get(f"{case}.attention_mask", torch.ones_like(named["input_ids"])).bool()
        with torch.no_grad():
            logits = (model or golden.model)(**named).logits
        golden.close(logits[real], golden.tensors[f"{case}.logits"][real])


def draws_of(golden: Golden) -> tuple[PackedSequences, torch.Tensor]:
    """The fixed draws of a response, packed, and where they are masked."""
    tensors = golden.tensors
    prompt, response, noisy = tensors["ll.prompt"], tensors["ll.response"], tensors["ll.noisy_ids"]
    draws, length = noisy.shape
    masked = torch.zeros(draws, length, dtype=torch.bool)
    masked[:, len(prompt) :] = tensors["ll.masked"].bool()
    assert (noisy[masked] == golden.mask).all()
    truth = torch.cat([prompt, response]).expand(draws, length)[masked]
    rows, positions = masked.flatten().nonzero()[:, 0], torch.arange(length).repeat(draws)
    return PackedSequences(noisy.flatten(), positions, [length] * draws, rows, truth), masked[:, len(prompt) :]


def check_draws(golden: Golden) -> torch.Tensor:
    """The likelihood of each draw, read where the family reads it; returns their mean."""
    if "ll.response" not in golden.tensors:
        pytest.skip("the folder has no draws in this layout")
    packed, masked = draws_of(golden)
    logps = TransformerDenoiser(golden.model, golden.mask).token_logps(packed)
    tokens = torch.zeros(masked.shape).masked_scatter(masked, logps)
    golden.close(tokens.detach(), golden.tensors["ll.token_logps"])
    per_draw = tokens.double().sum(1) * masked.shape[1] / golden.tensors["ll.num_masked"]
    torch.testing.assert_close(per_draw.detach(), golden.tensors["ll.per_draw"].double(), atol=1e-3, rtol=2e-6)
    return per_draw.mean()


def check_gradients(golden: Golden) -> None:
    golden.model.requires_grad_(True)
    check_draws(golden).backward()
    compare_gradients(golden, "ll")


def compare_gradients(golden: Golden, case: str) -> None:
    """The gradients of all parameters against the recorded ones of a case."""
    for name, parameter in golden.model.named_parameters():
        wanted = golden.tensors[f"{case}.grad.{name}"]
        found = torch.zeros_like(wanted) if parameter.grad is None else parameter.grad
        scale = float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, atol=1e-4 * scale if scale else 1e-6, rtol=0, msg=name)


def test_logits_are_those_of_the_reference(golden):
    check_logits(golden)


def test_packed_by_lengths_is_as_if_alone(golden):
    tensors = golden.tensors
    with torch.no_grad():
        logits = golden.model(tensors["packed.input_ids"], lengths=tensors["packed.seq_lens"].tolist()).logits
    golden.close(logits, tensors["packed.logits"])


def test_draws_and_gradients_are_those_of_the_reference(golden):
    check_gradients(golden)


def test_values_under_recomputed_blocks_and_chunked_rows_have_the_same_gradients(golden):
    from laddpo.models.blocks import checkpoint_blocks

    checkpoint_blocks(golden.model)
    check_gradients(golden)


def test_generation_is_that_of_the_reference_token_for_token(golden):
    asked = [name for name in golden.tensors if name.startswith("gen.") and ".steps" in name and "block" not in name]
    if not asked:
        pytest.skip("the folder has no generations in this layout")
    prompt = golden.tensors["gen.prompt"][0].numpy()
    for name in asked:
        _, order, steps = name.split(".")
        wanted = golden.tensors[name][0, len(prompt) :].tolist()
        settings = SamplerSettings(
            gen_length=16, block_length=16, steps=int(steps.removeprefix("steps")), remasking=order, stop_early=False
        )
        assert generate(golden.model, [prompt], settings, golden.mask)[0].tolist() == wanted, name


@pytest.mark.parametrize("by", ["steps", "threshold"])
def test_generation_is_that_of_a_plain_loop(golden, by):
    """Low confidence and threshold, with blocks, against a loop that runs one sequence at a time."""
    model, mask, before = golden.model, golden.mask, golden.model.reads_before
    never = torch.tensor(sorted({mask, *range(model.config.vocab_size, model.config.embedding_size)}))
    prompt = torch.arange(20, 29)
    ids, taken, threshold = torch.cat([prompt, torch.full((8,), mask)]), [], None
    for block in (slice(9, 13), slice(13, 17)):
        while (ids[block] == mask).any():
            with torch.no_grad():
                logits = model(ids[None]).logits[0, block.start - before : block.stop - before]
            choice = logits.index_fill(1, never, -torch.inf).argmax(-1)
            sure = logits.log_softmax(-1).gather(1, choice[:, None])[:, 0].exp()
            if by == "threshold" and threshold is None:  # which three of the first four pass
                threshold = float(sure.sort().values[:2].mean())
            sure[ids[block] != mask] = -1
            count = 2 if threshold is None else max(1, int((sure > threshold).sum()))
            at = sure.topk(count).indices
            ids[block.start + at] = choice[at]
            taken.append(count)
    settings = SamplerSettings(gen_length=8, block_length=4, steps=4, confidence_threshold=threshold, stop_early=False)
    assert generate(model, [prompt.numpy()], settings, mask)[0].tolist() == ids[9:].tolist()
    assert max(taken) > 1


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_a_block_cache_changes_nothing_where_every_block_takes_one_step(golden, kind):
    prompts = [torch.arange(20, 29).numpy(), torch.arange(30, 35).numpy()]
    plain = SamplerSettings(gen_length=8, block_length=4, steps=2, stop_early=False)
    cached = SamplerSettings(gen_length=8, block_length=4, steps=2, stop_early=False, block_cache=kind)
    found, wanted = (generate(golden.model, prompts, settings, golden.mask) for settings in (cached, plain))
    assert [a.tolist() for a in found] == [a.tolist() for a in wanted]


def test_a_cached_step_reads_the_scores_of_its_block(golden):
    """At the second step of a block all that is kept is still true if nothing was committed: scores must be equal."""
    from laddpo.models.block_cache import BlockCache

    prompt, mask, model = torch.arange(20, 29), golden.mask, golden.model
    answer = torch.full((1, 8), mask)
    with torch.no_grad():
        whole = model(torch.cat([prompt, answer[0]])[None], rows=torch.arange(13, 17)).logits
        for kind in ("prefix", "dual"):
            cache = BlockCache(model, [prompt], 8, 4, kind)
            for is_first in (True, False):
                state = cache.hidden(torch.tensor([0]), answer, torch.tensor([4]), torch.tensor([is_first]))
                golden.close(cache.logits(state[0]), whole)


def test_adapters_are_on_every_linear_layer_of_the_blocks_and_on_nothing_else(either):
    family, config = family_of(either.model)[1], either.model.config
    assert sorted(attach_lora(either.model, r=2)) == sorted(family.layout.names(config))


def test_an_adapter_is_saved_under_hub_names_and_loads_in_peft_and_here(either, tmp_path):
    from peft import PeftModel

    matched = attach_lora(either.model, r=2, seed=1)
    with torch.no_grad():
        for name, parameter in either.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    save_adapter(either.model, tmp_path)
    names = {name for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == {f"base_model.model.{name}.lora_{part}.weight" for name in matched for part in "AB"}
    ids = torch.arange(30, 42)[None]
    with torch.no_grad():
        wanted = either.model(ids).logits
        again = load_model(str(either.folder))
        attach_lora(again, path=str(tmp_path))
        either.close(again(ids).logits, wanted)
        in_peft = PeftModel.from_pretrained(load_model(str(either.folder)), str(tmp_path))
        either.close(in_peft(input_ids=ids).logits, wanted)
        assert (wanted - load_model(str(either.folder))(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("storage", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_blocks_are_quantised_on_a_cpu_and_train_an_adapter(either, storage):
    model = load_model(str(either.folder), quantization=storage)
    ids = torch.arange(30, 62)[None]
    with torch.no_grad():
        near, exact = model(ids).logits, either.model(ids).logits
    assert 0 < (near - exact).pow(2).mean() < 0.5 * exact.pow(2).mean()
    attach_lora(model, r=2)
    rows = torch.arange(5, 12)
    model(ids, rows=rows, targets=ids[0, rows]).token_logps.sum().backward()
    slopes = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert any(slope.abs().max() > 0 for name, slope in slopes.items() if "lora_B" in name)
    assert all(torch.isfinite(slope).all() for slope in slopes.values())


def test_what_is_saved_loads_with_equal_bytes_and_every_key_of_the_config(either, tmp_path):
    save_model(either.model, tmp_path)
    keep_original_fields(tmp_path, either.folder)
    saved, given = load_file(tmp_path / "model.safetensors"), load_file(either.folder / "model.safetensors")
    assert saved.keys() == given.keys()
    assert all(torch.equal(saved[name], given[name]) for name in given)
    written = json.loads((tmp_path / "config.json").read_text())
    changed = {n: (v, written.get(n, "lost")) for n, v in either.config.items() if written.get(n, "lost") != v}
    assert changed.keys() <= {"auto_map", "transformers_version"}, changed
    again, ids = load_model(str(tmp_path)), torch.arange(30, 42)[None]
    assert again.block_length == either.model.block_length
    with torch.no_grad():
        assert torch.equal(again(ids).logits, either.model(ids).logits)


def test_a_golden_value_that_is_off_fails(golden, tmp_path):
    shutil.copytree(golden.folder, tmp_path / "off")
    expected = load_file(golden.folder / "expected.safetensors")
    checks = {"full.logits": check_logits, "packed.logits": check_logits, "ll.token_logps": check_draws}
    for name, check in checks.items():
        if name not in expected:
            continue
        off = {key: tensor.clone() for key, tensor in expected.items()}
        off[name].view(-1)[off[name].abs().argmax()] += 1e-2
        save_file(off, tmp_path / "off" / "expected.safetensors")
        with pytest.raises(AssertionError):
            check(Golden(tmp_path / "off"))
