"""`laddpo <stage> ...` does what `python -m laddpo.<stage> ...` does; without a stage it lists them.

laddpo
laddpo train model=llada_8b hardware=rtx4080
laddpo train --help
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import laddpo
from laddpo.errors import EXIT_DONE, EXIT_USER, nearest
from laddpo.processes.terminal import hanging

STAGES = {  # in the order in which a person needs them
    "train": "DPO on preference pairs; prepares them first if needed",
    "evaluate": "base against tuned on test problems and held-out pairs",
    "generate": "answers to prompts, base beside tuned",
    "chat": "a conversation with a model, base beside tuned",
    "report": "one HTML page of a run, of several runs or of a sweep",
    "export": "merged weights or the adapter, with a model card",
    "plan": "memory and hours, before anything is loaded",
    "doctor": "is this machine ready?",
    "prepare": "rows to token ids, with a report",
    "precompute": "reference log-likelihoods, kept for all later runs",
    "sft": "supervised fine-tuning on the same likelihood",
    "variance": "how much of a step's noise is masks, how much pairs, and what n to take",
    "study": "several settings over several seeds, with intervals",
    "benchmark": "time and memory against what users would otherwise run",
}

EXAMPLES = (
    ("laddpo train", "a whole run on the embedded task, minutes on a CPU"),
    ("laddpo train data=my_pairs.jsonl model=llada_8b", "your own pairs: prompt, chosen, rejected"),
    ("laddpo <stage> --help", "what a stage does, its groups and settings"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code; a stage that is run ends the process itself."""
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:  # the reader (| head) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


def _main(argv: list[str]) -> int:
    stage, *rest = argv or [""]
    if stage in STAGES:
        from laddpo.cli.app import run_stage

        run_stage(stage, argv=rest)
    if stage in ("--version", "-V", "version"):
        print(f"laddpo {laddpo.__version__}", flush=True)
        return EXIT_DONE
    if stage in ("", "-h", "--help", "help"):
        print(usage(), flush=True)
        return EXIT_DONE
    print(f"error: {mistake(stage)}", file=sys.stderr)
    return EXIT_USER


def usage() -> str:
    """The stages and how to learn more."""
    width = max(map(len, STAGES))
    examples = "\n".join(hanging(f"{command:<54}", words) for command, words in EXAMPLES)
    lines = "\n".join(hanging(f"  {name:<{width}}  ", words) for name, words in STAGES.items())
    return f"""laddpo {laddpo.__version__}: Direct Preference Optimization for masked-diffusion language models

usage: laddpo <stage> [group=option ...] [group.setting=value ...]

{lines}

{examples}"""


def mistake(word: str) -> str:
    """What is wrong with a first word that is no stage."""
    if "=" in word or word.startswith("-"):
        return f"{word}: expected a stage first; write laddpo train {word}. `laddpo` lists the stages."
    guess = nearest(word, STAGES)
    return f"{word}: no such stage; {f'did you mean laddpo {guess}?' if guess else '`laddpo` lists them.'}"


if __name__ == "__main__":
    sys.exit(main())
