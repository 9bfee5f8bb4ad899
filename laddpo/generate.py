"""Answers to prompts, base beside tuned: to one on the command line, or to the lines of a file.

    python -m laddpo.generate prompt="08+06+09="                              the configured model
    python -m laddpo.generate run=outputs/train/<run> prompt="08+06+09="      base and tuned side by side
    python -m laddpo.generate run=outputs/train/<run> prompts=questions.txt   one prompt a line
    python -m laddpo.generate run=outputs/train/<run> prompts=rows.jsonl      one row a line: prompt, and tools if any

Prints the texts and writes generations.jsonl into outputs/generate/<date-time>/. The evaluation group sets decoding.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from laddpo.cli.app import run_stage
from laddpo.errors import UserError, visible
from laddpo.settings.schema import RunConfig

if TYPE_CHECKING:
    from laddpo.preference.reading.pairs import Prompt

PROMPT_BYTES = 2**20  # a longer line of a file of prompts has no room in any model


def main(config: RunConfig, run_folder: Path) -> None:
    """Answer every prompt with the base and, with `run`, with the tuned model."""
    prompts = wanted_prompts(config)

    from laddpo.inputs.both_models import checked_weights
    from laddpo.storage import atomic
    from laddpo.storage.folders import owned

    tuned = checked_weights(config)
    with owned(run_folder, "generations", config.resume != "false"):
        answers = answer_prompts(config, [prompt for _, prompt in prompts], tuned)
        rows = [
            {"prompt": shown, **{name: found[i] for name, found in answers.items()}}
            for i, (shown, _) in enumerate(prompts)
        ]
        atomic.write_text(run_folder / "generations.jsonl", "".join(atomic.canonical_json(row) + "\n" for row in rows))
    for row in rows:
        print()
        for name, text in row.items():
            print(f"{name:>6}  {visible(text if isinstance(text, str) else str(text[-1].get('content')))}")
    print(f"\n{run_folder}")


def answer_prompts(config: RunConfig, prompts: list[Prompt], tuned: Path | None) -> dict[str, list[str]]:
    """The answers of the base, and with `tuned` those of the tuned model, by name."""
    from laddpo.evaluation.answering import answerer
    from laddpo.inputs.both_models import open_both

    both = open_both(config, tuned)
    answers = answerer(both.loaded, config.evaluation, config.data, config.seed)
    names = [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    found: dict[str, list[str]] = {}
    for name in both.names:
        with both.weights_of(name):
            found[name] = answers.texts(prompts, names)
    return found


def wanted_prompts(config: RunConfig) -> list[tuple[str | list, Prompt]]:
    """Each prompt as it is shown and as it is asked: the one given, or those of the file given. A file with the name of
    a table (.jsonl, .csv, .parquet and their like) has rows, another one a text on each line."""
    from laddpo.preference.given import read_prompts
    from laddpo.preference.reading.pairs import user_prompt

    if config.prompt is not None and config.prompts is not None:
        raise UserError(
            f"prompt is {config.prompt!r} and prompts is {config.prompts!r}; expected one of them; leave one out."
        )
    if config.prompt is not None:
        return [(config.prompt, user_prompt(config.prompt))]
    if config.prompts is not None:
        path = Path(config.prompts)
        from laddpo.preference.reading.files import ReadLog, open_checked, text_lines
        from laddpo.preference.reading.splits import SUFFIXES, last_suffix

        if last_suffix(path.name) in SUFFIXES:
            return read_prompts(path, PROMPT_BYTES)
        with open_checked(path, ReadLog(), "prompts") as stream:
            read = [line.rstrip("\r\n") for line in text_lines(path, stream, PROMPT_BYTES, "Check its line ends.")]
        lines = [line for line in read if line.strip()]
        if not lines:
            raise UserError(f"{path}: holds no prompt; expected one prompt a line.")
        return [(line, user_prompt(line)) for line in lines]
    raise UserError(
        'neither prompt nor prompts is set; expected prompt="a question" or prompts=<file, one prompt a line>.'
    )


if __name__ == "__main__":
    run_stage("generate", main)
