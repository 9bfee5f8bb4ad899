"""What each setting of the benchmark may be, as laddpo/settings/ranges.py has it of the others."""

from __future__ import annotations

from collections.abc import Collection

from laddpo.settings.bounds import Range, at_least, more_than

BENCHMARK_LISTS = {
    "benchmark.parts": "[memory,speed]",
    "benchmark.memory_draws": "[1,8]",
    "benchmark.block_draws": "[4,8]",
    "benchmark.long_answers": "[256,1024]",
    "benchmark.many_pairs": "[10000,100000]",
    "benchmark.plan_ranks": "[8,64]",
    "benchmark.plan_tokens": "[256,1024]",
}
BENCHMARK_CHOICES: dict[str, Collection[str]] = {
    "benchmark.weights": ("random", "model"),
    "benchmark.parts": (
        "memory",
        "flat",
        "plan",
        "speed",
        "long",
        "sft",
        "sampler",
        "cards",
        "rates",
        "agreement",
        "nano",
        "block",
        "many",
    ),
}
BENCHMARK_RANGES: dict[str, Range] = {
    "benchmark.minutes": more_than(0, "null takes as long as it takes"),
    "benchmark.mean": more_than(16, "157 is HH-RLHF's"),
    "benchmark.p99": more_than(16, "646 is HH-RLHF's"),
    "benchmark.prompt_mean": more_than(8, "90 is near HH-RLHF's"),
    "benchmark.max_length": at_least(32, "1024 is what the public project pads to"),
    "benchmark.token_budget": at_least(1, "2048 is usual"),
    "benchmark.pairs": at_least(1, "1 keeps a round short"),
    "benchmark.rounds": at_least(2, "8 gives an interval"),
    "benchmark.draws": at_least(1, "4 is the default of training"),
    "benchmark.sampler_items": at_least(1, "384 give an interval of about +-5 points"),
    "benchmark.sampler_batch": at_least(1, "32 is usual"),
    "benchmark.card_tokens": at_least(32, "1024 is usual for an 8B"),
    "benchmark.agreement_pairs": at_least(1, "8 are usual"),
    "benchmark.nano_steps": at_least(1, "200 show whether rounding grows"),
    "benchmark.block_length": at_least(1, "4 is SDAR's, 32 LLaDA2's"),
    "benchmark.block_answer": at_least(1, "200 are an answer to HH-RLHF"),
    "benchmark.long_answers": at_least(16, "256 and 1024 are answers of reasoning models"),
    "benchmark.sft_rows": at_least(1, "8 fill a micro-step"),
    "benchmark.many_pairs": more_than(20, "10000 and 100000 show how time grows"),
    "benchmark.block_draws": at_least(1, "4 and 8 show what a context costs"),
    "benchmark.memory_draws": at_least(1, "1 and 8 show whether memory grows"),
    "benchmark.plan_ranks": at_least(1, "8 to 64 is usual"),
    "benchmark.plan_tokens": at_least(32, "256 to 4096 is usual"),
    "benchmark.flat_draws": at_least(1, "64 shows that memory does not grow"),
}
