"""The sampler against recorded generations, against a plain one written out here, and on hand-made probabilities."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from laddpo.core.budget import TokenBudget, answer_budget
from laddpo.errors import RunFault, UserError
from laddpo.evaluation.sampling import GridSettings, SamplerSettings, generate, until_stop
from laddpo.models.llada import LLaDAConfig
from laddpo.models.loading import load_model, new_model

MASK, EOS, EOT = 39, 38, 37


@pytest.fixture(scope="module")
def model():
    config = LLaDAConfig(
        d_model=32, n_heads=4, n_layers=2, mlp_hidden_size=48, vocab_size=40, max_sequence_length=64, mask_token_id=MASK
    )
    return new_model(config, seed=4).double()


def prompts(count=5, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 37, size=3 + i % 3).astype(np.int32) for i in range(count)]


def sample(model, items, stops=(EOS, EOT), keys=None, budget=None, **settings):
    settings = {"gen_length": 12, "steps": 12, "block_length": 6, "stop_early": False, **settings}
    decoding = SamplerSettings(**settings)
    return generate(model, items, decoding, MASK, list(stops), keys, eos_token_id=EOS, budget=budget)


@pytest.fixture(scope="module")
def golden(shared_folder):
    folder = shared_folder / "golden" / "llada_tiny"
    return load_model(str(folder)), load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")


@pytest.mark.parametrize("prompt", ["single", "batch_leftpad"])
@pytest.mark.parametrize("steps", [16, 8])
@pytest.mark.parametrize("block", [16, 8])
@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_tokens_equal_the_recorded_generations(golden, prompt, steps, block, cfg):
    model, inputs, expected = golden
    ids = inputs[f"prompt.{prompt}"]
    real = inputs.get(f"prompt.{prompt}.attention_mask", torch.ones_like(ids)).bool()
    settings = SamplerSettings(gen_length=16, steps=steps, block_length=block, cfg_scale=cfg, stop_early=False)
    answers = generate(model, [row[keep].numpy() for row, keep in zip(ids, real, strict=True)], settings, 150, [151])
    wanted = expected[f"gen.{prompt}.steps{steps}.block{block}.cfg{cfg}"][:, ids.shape[1] :]
    assert np.array_equal(np.stack(answers), wanted.numpy())


def plain_sample(model, prompt, gen_length, steps, block_length, cfg_scale=0.0, suppress="no"):
    """The public procedure for one prompt at temperature 0, full logits, no packing."""
    x = torch.cat([torch.as_tensor(prompt).long(), torch.full((gen_length,), MASK)])[None]
    is_prompt = torch.arange(x.shape[1]) < len(prompt)
    blocks = gen_length // block_length
    for block in range(blocks):
        left, right = len(prompt) + block * block_length, len(prompt) + (block + 1) * block_length
        per_step = steps // blocks
        for step in range(per_step):
            logits = model(input_ids=x).logits[0]
            if cfg_scale:
                free = model(input_ids=torch.where(is_prompt, MASK, x)).logits[0]
                logits = free + (cfg_scale + 1) * (logits - free)
            if suppress == "logits":
                logits[:, EOS] = -torch.inf
            tokens = logits.argmax(-1)
            if suppress == "confidence":
                logits[:, [EOS, EOT]] = -torch.inf
            confidence = logits.softmax(-1).gather(1, tokens[:, None])[:, 0]
            confidence[x[0] != MASK] = -1
            confidence[:left], confidence[right:] = -1, -1
            count = block_length // per_step + (step < block_length % per_step)
            chosen = confidence.argsort(descending=True, stable=True)[:count]
            x[0, chosen] = tokens[chosen]
    return x[0, len(prompt) :].numpy()


@pytest.mark.parametrize("steps", [12, 6, 4, 2, 24])
@pytest.mark.parametrize("block", [12, 6, 4])
@pytest.mark.parametrize("options", [{}, {"cfg_scale": 0.7}, {"suppress": "logits"}, {"suppress": "confidence"}])
@torch.no_grad()
def test_packed_batches_equal_the_plain_procedure_one_by_one(model, steps, block, options):
    if steps % (12 // block):
        pytest.skip("steps do not divide over the blocks")
    items = prompts()
    wanted = [plain_sample(model, p, 12, steps, block, **options) for p in items]
    settings = {"suppress_eos" if k == "suppress" else k: v for k, v in options.items()}
    answers = sample(model, items, steps=steps, block_length=block, **settings)
    assert all(np.array_equal(a, w) for a, w in zip(answers, wanted, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.8},
        {"remasking": "random"},
        {"temperature": 1.0, "cfg_scale": 0.5},
        {"confidence_threshold": 0.1},
        {"temperature": 0.8, "stop_early": True, "stops": range(20, 39)},
    ],
)
def test_an_answer_does_not_depend_on_its_batch(model, options):
    items, keys = prompts(), list("abcde")
    together = sample(model, items, keys=keys, **options)
    alone = [sample(model, [item], keys=[key], **options)[0] for item, key in zip(items, keys, strict=True)]
    by_two = sample(model, items[::-1], keys=keys[::-1], batch_size=2, **options)[::-1]
    for a, b, c in zip(together, alone, by_two, strict=True):
        assert np.array_equal(a, b) and np.array_equal(a, c)


class CrampedModel(torch.nn.Module):
    """Memory runs out in passes of more than `room` tokens."""

    def __init__(self, model, room: int):
        super().__init__()
        self.model, self.room, self.config, self.block_length = model, room, model.config, model.block_length
        self.failures = 0

    def forward(self, input_ids, **packed):
        if input_ids.numel() > self.room:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.model(input_ids, **packed)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}, {"cfg_scale": 0.5}])
@pytest.mark.parametrize("room", [40, 70])
def test_a_batch_that_does_not_fit_the_memory_is_answered_in_parts_and_the_next_one_begins_with_these(
    model, options, room
):
    items, budget, cramped = prompts(), answer_budget(), CrampedModel(model, room)
    expected, failures = sample(model, items, **options), []
    for _ in range(2):
        found = sample(cramped, items, budget=budget, **options)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        failures.append(cramped.failures)
    assert failures[0] == failures[1] == budget.retries > 0, "what fits is learned once"


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_parts_of_a_batch_with_kept_keys_and_values_are_answered_as_the_batch(model, kind):
    small = TokenBudget(40)
    found = sample(model, prompts(), budget=small, block_cache=kind)
    assert small.tokens == 40
    assert all(np.array_equal(a, b) for a, b in zip(found, sample(model, prompts(), block_cache=kind), strict=True))


class Counting(CrampedModel):
    """Memory goes with the number of prompts that are answered together, not with their tokens."""

    def forward(self, input_ids, lengths, **packed):
        if len(lengths) > 1:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.model(input_ids, lengths=lengths, **packed)


def test_short_prompts_beside_a_long_one_are_tried_one_by_one_before_any_is_called_too_long(model):
    items = [np.arange(30, dtype=np.int32), *prompts()]
    counting, budget = Counting(model, 0), answer_budget()
    found = sample(counting, items, budget=budget)
    assert all(np.array_equal(a, b) for a, b in zip(found, sample(model, items), strict=True))
    assert counting.failures == budget.retries and budget.tokens < 42, "below the tokens of the longest"


def test_a_prompt_that_does_not_fit_alone_is_an_error_that_says_what_to_lower(model):
    with pytest.raises(RunFault, match=r"^a prompt and its answer of 15 tokens .* lower evaluation.block_length"):
        sample(CrampedModel(model, 10), prompts())
    alone = answer_budget("Begin with less.")
    with pytest.raises(RunFault, match=r"^out of memory with \d+ tokens in a pass. Begin with less. \("):
        sample(CrampedModel(model, 40), prompts(), budget=alone)


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"remasking": "random"}])
def test_draws_come_from_seed_and_key_and_never_from_global_state(model, options):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sample(model, prompts(), **options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert all(np.array_equal(a, b) for a, b in zip(first, sample(model, prompts(), **options), strict=True))
    other = sample(model, prompts(), seed=1, **options)
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    same_prompt = sample(model, [prompts()[0]] * 6, **options)
    assert len({a.tobytes() for a in same_prompt}) > 1, "equal prompts under different keys differ"


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_tempered_distribution(model, temperature):
    prompt, draws = prompts(1)[0], 4000
    answers = sample(
        model, [prompt] * draws, gen_length=1, steps=1, block_length=1, temperature=temperature, batch_size=draws
    )
    ids = torch.cat([torch.as_tensor(prompt).long(), torch.tensor([MASK])])[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
    logits[MASK] = -torch.inf
    expected = (logits / temperature).softmax(-1).numpy() * draws
    found = np.bincount(np.concatenate(answers), minlength=40)
    big = expected > 5
    chi2 = ((found - expected)[big] ** 2 / expected[big]).sum()
    # chi-square with about k degrees of freedom: mean k, standard deviation sqrt(2k); the seed is fixed
    assert chi2 < big.sum() + 4 * np.sqrt(2 * big.sum())
    assert found[~big].sum() == pytest.approx(expected[~big].sum(), abs=4 * np.sqrt(expected[~big].sum() + 1))


class Table(torch.nn.Module):
    """A mask predictor whose probabilities at answer position i are row i of a table, whatever is written elsewhere."""

    block_length = None

    def __init__(self, probabilities, prompt_length=2):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(probabilities, dtype=torch.float64).log())
        self.prompt_length, self.calls, self.sizes = prompt_length, 0, []
        self.config = LLaDAConfig(vocab_size=self.logits.shape[1], d_model=2, n_heads=1)

    def forward(self, input_ids, position_ids, lengths, rows):
        self.calls += 1
        self.sizes.append((len(lengths), len(rows)))
        at = position_ids[0, rows] - self.prompt_length
        out = self.logits[at].clone()
        return type("Output", (), {"logits": out})


def table(*rows):
    """Rows of (token, probability); the rest is spread over tokens 0..4; 5 stops, 6 masks. # [positions, 7]"""
    out = np.full((len(rows), 7), 0.0)
    for i, (token, probability) in enumerate(rows):
        out[i, :5] = (1 - probability) / (5 - (token < 5))
        out[i, token] = probability
    return Table(out + 1e-12)


def decode(model, count=1, **settings):
    length = len(model.logits)
    settings = {"gen_length": length, "steps": length, "block_length": length, "stop_early": False, **settings}
    ids = {"mask_token_id": 6, "stop_token_ids": [5], "eos_token_id": 5}
    return generate(model, [np.array([0, 1])] * count, SamplerSettings(**settings), **ids)


@pytest.mark.parametrize("temperature", [0.0, 0.05])
def test_demoted_stop_tokens_are_committed_last_at_any_temperature(temperature):
    """Position 0 wants to stop with probability 0.99; the others are less sure of real tokens."""
    model = table((5, 0.99), (1, 0.9), (2, 0.8), (3, 0.7))
    partial = []
    plain = model.forward

    def watch(input_ids, **kwargs):
        partial.append(input_ids[0, 2:].tolist())
        return plain(input_ids, **kwargs)

    model.forward = watch
    for suppress, last in (("confidence", [6, 1, 2, 3]), ("no", [5, 1, 2, 6])):
        partial.clear()
        (answer,) = decode(model, temperature=temperature, suppress_eos=suppress)
        assert answer.tolist() == [5, 1, 2, 3]
        assert partial[-1] == last


@pytest.mark.parametrize("temperature", [0.0, 0.05, 2.0])
def test_suppressed_stop_tokens_are_never_emitted_at_any_temperature(temperature):
    answers = decode(table((5, 0.99), (1, 0.9), (5, 0.6)), count=20, temperature=temperature, suppress_eos="logits")
    assert 5 not in np.stack(answers)


@torch.no_grad()
def test_logits_forbids_the_end_of_text_alone_and_confidence_holds_back_every_stop_token():
    """Position 0 wants the end of text (5), position 1 the end of a turn (4), both more than anything else."""
    model = table((5, 0.9), (4, 0.8), (1, 0.7))
    written = {}
    for suppress in ("no", "logits", "confidence"):
        settings = SamplerSettings(gen_length=3, steps=3, block_length=3, stop_early=False, suppress_eos=suppress)
        (answer,) = generate(model, [np.array([0, 1])], settings, 6, [4, 5], eos_token_id=5)
        written[suppress] = answer.tolist()
    assert written["no"] == written["confidence"] == [5, 4, 1]
    assert written["logits"][1:] == [4, 1] and written["logits"][0] not in (5, 6)


def test_logits_takes_the_models_own_end_of_text_and_refuses_a_model_without_one():
    model = table((5, 0.9), (1, 0.7))
    settings = SamplerSettings(gen_length=2, steps=2, block_length=2, suppress_eos="logits", stop_early=False)
    with pytest.raises(UserError, match=r"eos_token_id in config\.json"):
        generate(model, [np.array([0, 1])], settings, 6, [5])
    model.config.eos_token_id = 5
    assert 5 not in generate(model, [np.array([0, 1])], settings, 6, [5])[0]


def test_a_prompt_without_room_for_its_answer_is_refused_before_any_answer():
    model = table((0, 0.9), (1, 0.8))
    model.config.max_sequence_length = 6
    settings = SamplerSettings(gen_length=2, steps=2, block_length=2, batch_size=1)
    fitting, long = np.zeros(4, int), np.zeros(5, int)
    with pytest.raises(UserError, match=r"1 of 2 prompts.*second has 5 tokens.*6 positions"):
        generate(model, [fitting, long], settings, 6, [5], keys=["first", "second"])
    assert model.calls == 0, "nothing was answered"
    assert len(generate(model, [np.zeros(2, int)], settings, 6, [5])) == 1


def test_true_and_false_mean_confidence_and_no():
    assert SamplerSettings(suppress_eos=True).suppression == "confidence"
    assert SamplerSettings(suppress_eos=False).suppression == "no"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_mask_token_and_rows_beyond_the_vocabulary_are_never_emitted(temperature):
    model = Table([[0.01, 0.0, 0.0, 0.0, 0.09, 0.0, 0.4, 0.5]] * 3 + np.full((3, 8), 1e-12))
    model.config.vocab_size, model.config.embedding_size = 7, 8
    answers = np.stack(decode(model, count=30, temperature=temperature))
    assert set(np.unique(answers)) <= {0, 4}


def test_a_confidence_threshold_commits_all_sure_tokens_at_once_and_at_least_one():
    model = table((0, 0.95), (1, 0.5), (2, 0.97), (3, 0.6), (4, 0.92))
    (answer,) = decode(model, confidence_threshold=0.9)
    assert answer.tolist() == [0, 1, 2, 3, 4]
    assert [rows for _, rows in model.sizes] == [5, 2, 1], "three sure ones, then the better of two, then the last"


def test_a_threshold_that_nothing_reaches_equals_one_token_a_step(model):
    one_by_one = sample(model, prompts())
    threshold = sample(model, prompts(), confidence_threshold=0.999999)
    assert all(np.array_equal(a, b) for a, b in zip(one_by_one, threshold, strict=True))


def threshold_sample(model, prompt, gen_length, block_length, threshold):
    """One block after the other; every step commits all tokens above the threshold, or else the surest."""
    x, commits = torch.cat([torch.as_tensor(prompt).long(), torch.full((gen_length,), MASK)]), []
    for start in range(len(prompt), len(x), block_length):
        block = torch.arange(start, start + block_length)
        while (x[block] == MASK).any():
            open_at = block[x[block] == MASK]
            probability, tokens = model(input_ids=x[None]).logits[0, open_at].softmax(-1)[:, :MASK].max(-1)
            chosen = probability > threshold if (probability > threshold).any() else probability == probability.max()
            x[open_at[chosen]] = tokens[chosen]
            commits.append(int(chosen.sum()))
    return x[len(prompt) :].numpy(), commits


@pytest.fixture(scope="module")
def sure_model(model):
    """The model with a head six times as large, so that it is sure of some tokens and not of others."""
    scaled = new_model(model.config, seed=4).double()
    with torch.no_grad():
        scaled.model["transformer"]["ff_out"].weight.mul_(6)
    return scaled


@pytest.mark.parametrize("threshold", [0.9, 1.0])
@pytest.mark.parametrize("block", [12, 4])
@torch.no_grad()
def test_a_threshold_that_is_reached_gives_the_tokens_of_a_plain_loop(sure_model, threshold, block):
    commits = []
    for prompt, found in zip(
        prompts(),
        sample(sure_model, prompts(), block_length=block, confidence_threshold=threshold, steps=1),
        strict=True,
    ):
        wanted, counts = threshold_sample(sure_model, prompt, 12, block, threshold)
        assert np.array_equal(found, wanted)
        commits += counts
    if threshold == 1:
        assert set(commits) == {1}, "nothing is surer than certain: one token a step"
    else:
        assert max(commits) > 2 and 1 in commits, "both branches were taken"


@pytest.mark.parametrize("group", ["evaluation", "data.sampling"])
@pytest.mark.parametrize(("threshold", "is_allowed"), [(0, False), (1e-3, True), (1, True), (1.5, False)])
def test_settings_and_sampler_agree_on_thresholds(group, threshold, is_allowed):
    from laddpo.settings.compose import compose

    def is_taken(make):
        try:
            make()
        except UserError as error:
            assert "confidence_threshold" in str(error)
            return False
        return True

    override = f"{group}.confidence_threshold={threshold}"
    assert is_taken(lambda: compose(["data=onpolicy", override])) is is_allowed
    assert is_taken(lambda: SamplerSettings(confidence_threshold=threshold)) is is_allowed


def test_items_move_through_blocks_at_their_own_pace_under_a_threshold(model):
    items = prompts()
    together = sample(model, items, confidence_threshold=0.06, block_length=3)
    alone = [sample(model, [item], confidence_threshold=0.06, block_length=3)[0] for item in items]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"steps": 6}, {"confidence_threshold": 0.05}, {"cfg_scale": 0.5}]
)
@pytest.mark.parametrize("block", [12, 4])
def test_stopping_early_changes_nothing_up_to_the_stop_token(model, options, block):
    stops = list(range(20, 39))  # half of all tokens stop, so that most answers do
    full = sample(model, prompts(12), stops, block_length=block, **{"steps": 12, **options})
    early = sample(model, prompts(12), stops, block_length=block, stop_early=True, **{"steps": 12, **options})
    stopped = 0
    for a, b in zip(full, early, strict=True):
        assert np.array_equal(until_stop(a, stops), until_stop(b, stops))
        end = len(until_stop(a, stops))
        stopped += end < len(a)
        assert set(b[end:].tolist()) <= {a[end]} if end < len(a) else True, "filled with the stop token that was found"
    assert stopped >= 6


def test_stopping_early_saves_forward_passes_and_finished_items_leave_the_batch():
    rows = [(1, 0.99), (5, 0.98), (2, 0.5), (3, 0.4), (4, 0.4), (2, 0.4)]
    full, early = table(*rows), table(*rows)
    decode(full)
    (answer,) = decode(early, stop_early=True)
    assert (full.calls, early.calls) == (6, 2)
    assert answer.tolist() == [1, 5, 5, 5, 5, 5]


def test_a_stop_token_after_an_open_position_does_not_stop():
    model = table((1, 0.5), (5, 0.9), (2, 0.8))
    (answer,) = decode(model, stop_early=True)
    assert answer.tolist() == [1, 5, 5]
    assert model.calls == 3


def test_only_open_positions_of_the_current_block_reach_the_head():
    model = table(*[(i % 5, 0.9 - 0.01 * i) for i in range(6)])
    decode(model, steps=6, block_length=3)
    assert [rows for _, rows in model.sizes] == [3, 2, 1, 3, 2, 1]


def test_guidance_costs_one_forward_pass_of_twice_the_sequences():
    model = table((1, 0.5), (2, 0.6))
    decode(model, cfg_scale=1.0, count=3)
    assert [sequences for sequences, _ in model.sizes] == [6, 6]


def test_until_stop_cuts_at_the_first_of_several():
    assert until_stop(np.array([4, 7, 9, 8, 9]), [8, 9]).tolist() == [4, 7]
    assert until_stop(np.array([4, 7]), [8]).tolist() == [4, 7]


def test_commits_per_step_are_as_even_as_they_can_be():
    assert SamplerSettings(gen_length=16, steps=6, block_length=8).commits_per_step() == [3, 3, 2]
    assert SamplerSettings(gen_length=8, steps=12, block_length=8).commits_per_step() == [1] * 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gen_length": 10, "block_length": 4}, "evaluation.block_length=2 or evaluation.gen_length=12"),
        ({"gen_length": 8, "block_length": 4, "steps": 5}, "evaluation.steps=4 or 6"),
        ({"remasking": "lowconfidence"}, "did you mean low_confidence"),
        ({"suppress_eos": "always"}, "evaluation.suppress_eos is 'always'"),
        ({"confidence_threshold": 1.5}, "evaluation.confidence_threshold is 1.5"),
        ({"confidence_threshold": 0}, "evaluation.confidence_threshold is 0"),
        ({"confidence_threshold": 0.9, "remasking": "random"}, "evaluation.confidence_threshold=null"),
        ({"temperature": -1}, "temperature is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        SamplerSettings(**settings)


def test_suppressing_without_a_stop_token_is_refused(model):
    with pytest.raises(UserError, match="the model has no stop token"):
        sample(model, prompts(), stops=(), suppress_eos=True)


def test_no_prompts_give_no_answers(model):
    assert sample(model, []) == []


def test_certainty_ranks_positions_by_their_likeliest_token_whatever_was_drawn():
    from laddpo.evaluation.orders import REMASKING

    logits = torch.log(torch.tensor([[0.9, 0.1], [0.6, 0.4]]))
    drawn = torch.tensor([1, 0])  # the unlikely token at the position that is surest
    sure = REMASKING["certainty"].confidence(logits, drawn, [], [2]).exp()
    likely = REMASKING["low_confidence"].confidence(logits, drawn, [], [2]).exp()
    assert sure.tolist() == pytest.approx([0.9, 0.6]) and likely.tolist() == pytest.approx([0.1, 0.6])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (SamplerSettings(suppress_eos=False), "32 tokens, 32 steps, temperature 0"),
        (
            SamplerSettings(gen_length=64, steps=16, remasking="random", temperature=0.5, cfg_scale=1.5),
            "64 tokens, blocks of 32, 16 steps, temperature 0.5, remasking=random, cfg_scale=1.5",
        ),
        (
            SamplerSettings(confidence_threshold=0.9, block_cache="dual", suppress_eos=True),
            "32 tokens, all tokens above probability 0.9 at once, temperature 0, block_cache=dual, "
            "suppress_eos=confidence",
        ),
        (
            GridSettings(block_length=4, steps=16, confidence_threshold=0.9),
            "32 tokens, blocks of 4, all tokens above probability 0.9 at once, at least as many as 16 steps take, "
            "temperature 0",
        ),
    ],
)
def test_decoding_is_told_by_what_differs_from_plain_decoding(settings, text):
    assert settings.text == text
