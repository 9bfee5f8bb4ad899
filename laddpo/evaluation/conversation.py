"""A conversation with a model: what was said so far is the context of the next answer, as far as there is room."""

from __future__ import annotations

from collections.abc import Sequence

from laddpo.evaluation.answering import Answerer
from laddpo.inputs.both_models import BothModels
from laddpo.preference.reading.pairs import Message, Prompt


class Conversation:
    """One history for both models, so that they answer the same prompt. `turns`: how many earlier ones a model sees at
    most; None: as many as there is room for."""

    def __init__(self, both: BothModels, answers: Answerer, system: str | None = None, turns: int | None = None):
        self.both, self.answers, self.turns = both, answers, turns
        self.system = (Message("system", system),) if system else ()
        self.said: Prompt = ()  # messages and answers in turn, oldest first

    def ask(self, text: str, names: Sequence[str]) -> tuple[dict[str, str], int]:
        """The answers of the models of these names, the last of which is remembered; and how many earlier turns had to
        be forgotten, the oldest first, because there was no room for them.

        Raises `UserError` for a message that cannot be encoded or has no room by itself; then nothing is remembered.
        """
        message = Message("user", text)
        seen = self.said if self.turns is None else self.said[max(0, len(self.said) - 2 * self.turns) :]
        room = self.answers.loaded.model.config.max_sequence_length - self.answers.sampler.gen_length
        kept = seen
        while kept and len(self.answers.encoder.encode_prompt((*self.system, *kept, message))) > room:
            kept = kept[2:]

        found = {}
        for name in names:
            with self.both.weights_of(name):
                (found[name],) = self.answers.texts([(*self.system, *kept, message)], ["the message"])
        self.said = (*kept, message, Message("assistant", found[names[-1]]))
        return found, (len(seen) - len(kept)) // 2
