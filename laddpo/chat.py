"""A conversation with a model on the terminal: each message is answered with what was said before as its context.

    python -m laddpo.chat run=outputs/train/<run>                 the tuned model of a run
    python -m laddpo.chat run=outputs/train/<run> base=true       the base answers beside it, to the same conversation
    python -m laddpo.chat model=llada_8b quantization=nf4         a model as it is, or with adapter.path=<folder>
    python -m laddpo.chat chat.turns=0 chat.system="Be brief."    each message alone, behind a system turn

One line is one message, also of a file or a pipe; answers alone go to the output. /base shows or hides the base, /reset
forgets what was said, /quit ends, as Ctrl-D and Ctrl-C do. The evaluation group sets decoding. Nothing is written.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from laddpo.cli.app import run_stage
from laddpo.errors import UserError, visible
from laddpo.settings.schema import RunConfig

COMMANDS = "/base shows or hides the base model, /reset forgets what was said, /quit ends."
MESSAGE_CHARACTERS = 2**20  # a longer line has no room in any model
ONE_MODEL = "there is one model here and no base beside it; expected run=<folder> or adapter.path=<folder>."


def main(config: RunConfig, run_folder: Path) -> None:
    """Answer messages until there are no more. Ctrl-C ends it as the end of the input does."""
    if config.base and not (config.run or config.adapter.path):
        raise UserError(f"base is true and {ONE_MODEL} Leave base out.")

    from laddpo.evaluation.answering import answerer
    from laddpo.evaluation.conversation import Conversation
    from laddpo.inputs.both_models import checked_weights, open_both

    both = open_both(config, checked_weights(config), adapter_is_tuned=True)
    answers = answerer(both.loaded, config.evaluation, config.data, config.seed)
    talk = Conversation(both, answers, config.chat.system, config.chat.turns)
    try:
        converse(talk, config.base)
    except KeyboardInterrupt:
        print()


def converse(talk, with_base: bool) -> None:
    """Each message to its answers. At a terminal a mistake is told and the next message awaited; elsewhere it ends."""
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    _say(f"{talk.both.model.name}{f', {talk.both.weights}' if talk.both.weights else ''}. {COMMANDS}")
    for text in messages(is_terminal):
        try:
            if text == "/quit":
                return
            if re.fullmatch(r"/\w*", text):
                with_base = command(text, talk, with_base)
            elif text.strip():
                answer(talk, text, with_base)
        except UserError as error:
            if not is_terminal:
                raise
            _say(f"error: {error}")


def messages(is_terminal: bool) -> Iterator[str]:
    """The lines of the input, until its end."""
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  arrow keys and history in input()
    try:
        while is_terminal:
            yield input("> ")
        for line in sys.stdin or ():
            yield line.rstrip("\r\n")
    except EOFError:
        print()
    except UnicodeDecodeError as error:
        raise UserError(f"the input is not UTF-8 ({error.reason}); expected one message a line, in UTF-8.") from error


def command(text: str, talk, with_base: bool) -> bool:
    """Do what a line with a slash says; whether the base is shown from now on."""
    if text == "/help":
        _say(COMMANDS)
    elif text == "/reset":
        talk.said = ()
        _say("what was said is forgotten.")
    elif text == "/base":
        if len(talk.both.names) == 1:
            raise UserError(f"/base: {ONE_MODEL}")
        with_base = not with_base
        _say(f"the base model is {'shown beside the tuned one' if with_base else 'no longer shown'}.")
    else:
        raise UserError(f"{text}: no such command. {COMMANDS}")
    return with_base


def answer(talk, text: str, with_base: bool) -> None:
    """Print the answers, with the names of the models where there are two."""
    if len(text) > MESSAGE_CHARACTERS:
        raise UserError(f"the message has {len(text):,} characters; expected at most {MESSAGE_CHARACTERS:,}.")
    found, forgotten = talk.ask(text, talk.both.names if with_base else talk.both.names[-1:])
    if forgotten:
        _say(f"note: the {forgotten} oldest turns are forgotten: with them there was no room for an answer.")
    for name, said in found.items():
        print(f"{name:>6}  {visible(said)}" if len(found) > 1 else visible(said), flush=True)


def _say(text: str) -> None:
    """For the person at the terminal, beside the answers."""
    print(visible(text), file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_stage("chat", main)
