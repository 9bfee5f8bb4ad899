"""Answers of block models: recorded generations token for token, and a plain loop over whole sequences without a cache.

The recorded ones lie in the folders that $LADDPO_GOLDEN names; see tests/models/test_conformance.py.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from laddpo.errors import UserError
from laddpo.evaluation import passes, sampling
from laddpo.evaluation.orders import REMASKING
from laddpo.evaluation.sampling import GridSettings, SamplerSettings, generate, settings_for, until_stop
from laddpo.models import block_cache
from laddpo.models.families import FAMILIES
from laddpo.models.llama import A2DQwen3Config
from laddpo.models.loading import load_model, mask_token_id, new_model

PLACE = Path(os.environ.get("LADDPO_GOLDEN") or Path(__file__).resolve().parents[3] / "shared" / "golden")
MASK, STOP, SIZE = 39, 38, 4
GEN = 14  # no multiple of the block


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    sizes["initializer_range"] = 0.3  # answers vary; some tokens are sure, others are not
    config = A2DQwen3Config(**sizes, head_dim=12, vocab_size=40, mask_token_id=MASK, block_length=SIZE)
    return new_model(config, 4, "A2DQwen3LMHeadModel").double()


def prompts():
    """Shorter than a block, whole blocks, and ends inside a block."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 37, size=size).astype(np.int32) for size in (2, 8, 9, 11, 1)]


def sample(model, items, stops=(), keys=None, **settings):
    settings = {"gen_length": GEN, "steps": GEN, "block_length": SIZE, "stop_early": False, **settings}
    return generate(model, items, GridSettings(**settings), MASK, stops, keys, eos_token_id=STOP)


@torch.no_grad()
def plain_loop(model, prompt, steps=GEN, remasking="low_confidence", threshold=None):
    """One prompt, everything up to the block's end in every step; and the most tokens that a step committed."""
    order, most = REMASKING[remasking], 0
    ends = range((len(prompt) // SIZE + 1) * SIZE, len(prompt) + GEN + SIZE, SIZE)
    x = torch.cat([torch.as_tensor(prompt).long(), torch.full((ends[-1] - len(prompt),), MASK)])
    for end in ends:
        commits = iter(order.commits(SIZE, steps * SIZE // GEN))
        while (at := end - SIZE + (x[end - SIZE : end] == MASK).nonzero()[:, 0]).numel():
            logits = model(x[None, :end]).logits[0, at]
            if order.top_k:
                logits[logits < logits.topk(min(order.top_k, 40)).values[:, -1:]] = -torch.inf
            tokens = logits.index_fill(1, torch.tensor([MASK]), -torch.inf).argmax(-1)
            sure = order.confidence(logits, tokens, [], [len(at)])
            above = 0 if threshold is None else int((sure.exp() > threshold).sum())
            count = min(max(above, next(commits)), len(at))
            best = sure.argsort(descending=True, stable=True)[:count]
            x[at[best]] = tokens[best]
            most = max(most, count)
    return x[len(prompt) : len(prompt) + GEN].tolist(), most


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 7},
        {"remasking": "sequential"},
        {"remasking": "sequential", "steps": 7},
        {"remasking": "certainty", "steps": 7},
        {"remasking": "entropy", "steps": 7},
        {"threshold": 0.3},
        {"threshold": 0.3, "steps": 7},
    ],
)
def test_kept_blocks_give_the_tokens_of_whole_sequences_alone_and_in_a_batch(model, monkeypatch, options):
    monkeypatch.setattr(block_cache, "PREFILL", SIZE)  # several parts of the longer prompts
    wanted = [plain_loop(model, prompt, **options) for prompt in prompts()]
    least = REMASKING[options.get("remasking", "low_confidence")].commits(SIZE, options.get("steps", GEN) * SIZE // GEN)
    most = max(count for _, count in wanted)
    assert most > max(least) if "threshold" in options else most == max(least)  # more passed the threshold
    settings = {name.replace("threshold", "confidence_threshold"): value for name, value in options.items()}
    together = sample(model, prompts(), **settings)
    alone = [sample(model, [prompt], **settings)[0] for prompt in prompts()]
    assert [a.tolist() for a in together] == [a.tolist() for a in alone] == [tokens for tokens, _ in wanted]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8},
        {"remasking": "random"},
        {"suppress_eos": "confidence", "temperature": 0.8, "steps": 7},
        {"suppress_eos": "logits", "confidence_threshold": 0.3},
        {"temperature": 1.0, "stop_early": True},
    ],
)
def test_an_answer_does_not_depend_on_its_batch(model, options):
    keys, stops = list("abcde"), range(20, 39)
    together = sample(model, prompts(), stops, keys, **options)
    by_two = sample(model, prompts()[::-1], stops, keys[::-1], batch_size=2, **options)[::-1]
    assert [a.tolist() for a in together] == [a.tolist() for a in by_two]
    assert all(len(answer) == GEN and MASK not in answer for answer in together)


def test_sharded_weights_run_whole_sequences_and_write_the_same(model, monkeypatch):
    kept = sample(model, prompts(), confidence_threshold=0.3)
    monkeypatch.setattr(passes, "is_sharded", lambda model: True)
    monkeypatch.setattr(passes, "KeptBlocks", None)
    whole = sample(model, prompts(), confidence_threshold=0.3)
    assert [a.tolist() for a in kept] == [a.tolist() for a in whole]


def test_an_item_that_stopped_leaves_and_a_stop_token_of_the_prompt_stops_nothing(model, monkeypatch):
    stops = list(range(20, 38))
    items = [np.array([*prompt[:-1], 25], dtype=np.int32) for prompt in prompts()]
    full = sample(model, items, stops)
    run, sizes = block_cache.GridCache.run, []

    def counting(cache, items, ids, starts):
        sizes.append(len(items))
        return run(cache, items, ids, starts)

    monkeypatch.setattr(block_cache.GridCache, "run", counting)
    early = sample(model, items, stops, stop_early=True)
    assert [until_stop(a, stops).tolist() for a in early] == [until_stop(a, stops).tolist() for a in full]
    lengths = [len(until_stop(a, stops)) for a in early]
    assert max(lengths) > 0 and min(lengths) < GEN
    assert min(sizes) < max(sizes) == len(items)


def test_a_step_runs_the_open_block_of_every_item_and_nothing_else(model, monkeypatch):
    run, seen = block_cache.KeptLayers.run, []

    def counting(kept, items, ids, *args, **kwargs):
        seen.append(tuple(ids.shape))
        return run(kept, items, ids, *args, **kwargs)

    monkeypatch.setattr(block_cache.KeptLayers, "run", counting)
    sample(model, [prompts()[3]])  # 11 tokens: two whole blocks, then one place of the third is open
    steps, blocks = 1 + 3 * SIZE + SIZE, 5
    assert seen == [(1, 8)] + [(1, SIZE)] * (steps + blocks - 1)


def test_what_means_nothing_for_a_block_model_is_refused(model):
    asked = {
        "cfg_scale": ({"cfg_scale": 1.0}, "set evaluation.cfg_scale=0"),
        "cache": ({"block_cache": "dual"}, "leave evaluation.block_cache out"),
        "steps": ({"steps": 10}, "set evaluation.steps=7 or 14"),
        "order": ({"remasking": "sequential", "confidence_threshold": 0.9}, "confidence_threshold=null"),
    }
    for settings, cure in asked.values():
        with pytest.raises(UserError, match=cure):
            sample(model, prompts(), **settings)
    with pytest.raises(UserError, match=r"in blocks of 4 \(model\.block_length\); leave evaluation\.block_length out"):
        generate(model, prompts(), SamplerSettings(gen_length=14, steps=14, block_length=7), MASK)
    whole = SamplerSettings(gen_length=12, steps=12, block_length=4, stop_early=False)
    assert [a.tolist() for a in generate(model, prompts(), whole, MASK)] == [
        a.tolist() for a in sample(model, prompts(), gen_length=12, steps=12)
    ]
    assert settings_for(None, gen_length=8, block_length=4, steps=8) == SamplerSettings(8, 8, 4)


def test_stages_take_the_blocks_of_the_loaded_model_whatever_a_yaml_chose_for_others():
    from laddpo.benchmarking.speed import ways_of
    from laddpo.evaluation.answering import sampler_settings
    from laddpo.settings.schema import EvaluationSettings

    asked = EvaluationSettings(gen_length=14, steps=14, block_length=16, block_cache="dual")
    found = sampler_settings(asked, 3, SIZE)
    assert found.is_on_grid and (found.block_length, found.block_cache, found.seed) == (SIZE, "none", 3)
    assert not [name for name in ways_of(found, 2) if "cache" in name]  # it is always there


def test_greedy_is_what_the_sampler_writes_where_the_answer_ends_with_a_block(model):
    from laddpo.evaluation.likelihoods import Likelihoods
    from laddpo.models.denoiser import TransformerDenoiser

    prompt = prompts()[3]
    (written,) = sample(model, [prompt], gen_length=13, steps=13)
    likelihoods = Likelihoods(model, TransformerDenoiser(model, MASK), 2, 0, 100)
    assert likelihoods.is_greedy(prompt, written)
    written[7] = (written[7] + 1) % 37
    assert not likelihoods.is_greedy(prompt, written)


@pytest.fixture(params=["sdar_tiny", "llada2_moe_tiny"])
def golden(request):
    folder = PLACE / request.param
    if not (folder / "config.json").exists():
        pytest.skip(f"no {request.param} is in {PLACE.name}/; name a folder of golden outputs by $LADDPO_GOLDEN")
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    if architecture not in FAMILIES:
        pytest.skip(f"{architecture} is not supported")
    tensors = {**load_file(folder / "inputs.safetensors"), **load_file(folder / "expected.safetensors")}
    return load_model(str(folder)), tensors


def recorded(name):
    """What the name of a recorded generation says: a factor of the head, order, block, steps and threshold."""
    asked = name.removeprefix("gen.").replace("threshold0.", "threshold0_").split(".")
    factor = 10 if asked[0] == "head10" else 1
    order = "sequential" if "sequential" in asked else "low_confidence"
    found = {word.rstrip("0123456789_"): word.lstrip("abcdefghijklmnopqrstuvwxyz") for word in asked}
    threshold = float(found["threshold"].replace("_", ".")) if "threshold" in found else None
    return factor, order, int(found["block"]), int(found["steps"]), threshold


def test_generation_is_that_of_the_reference_token_for_token(golden, monkeypatch):
    model, tensors = golden
    head, prompt = model.lm_head.weight.detach().clone(), tensors["gen.prompt"][0].numpy()
    names = [name for name in tensors if name.startswith("gen.") and name != "gen.prompt"]
    assert names
    counts, committed = sampling._Batch._counts, []

    def counting(batch, ranks):
        committed.append(int(counts(batch, ranks).max()))
        return counts(batch, ranks)

    monkeypatch.setattr(sampling._Batch, "_counts", counting)
    for name in names:
        factor, order, block, steps, threshold = recorded(name)
        with torch.no_grad():
            model.lm_head.weight.copy_(head * factor)
        model.config.block_length = block
        wanted = tensors[name][0].tolist()[-14:]
        asked = {"steps": steps * 14 // block, "confidence_threshold": threshold, "remasking": order}
        settings = GridSettings(gen_length=14, block_length=block, stop_early=False, **asked)
        committed.clear()
        assert generate(model, [prompt], settings, mask_token_id(model))[0].tolist() == wanted, name
        by_threshold = max(committed) > block // steps  # the branch was taken
        assert by_threshold if factor == 10 and threshold == 0.3 else not (by_threshold and factor == 1), name
