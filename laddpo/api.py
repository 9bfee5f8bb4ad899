"""laddpo from Python: `fit` trains on preference pairs, `load` gives a model that scores pairs and answers prompts.

    import laddpo

    run = laddpo.fit("my_pairs.jsonl", model="llada_nano", learning_rate=1e-3)
    model = run.load()
    model.generate(["08+06+09="], temperature=0.7, seed=1)
    model.score([{"prompt": "...", "chosen": "...", "rejected": "..."}])

Settings are those of the command line, under the same names, with the same defaults and the same messages: every
mistake of a caller is a `laddpo.errors.UserError`. Nothing heavy is imported before one of these is called.
"""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laddpo.cli.in_process import flat, run_here, settings_of, values_of, words_of
from laddpo.errors import UserError
from laddpo.preference.reading.bad_rows import RowError
from laddpo.settings.schema import EvaluationSettings, RunConfig

if TYPE_CHECKING:
    from laddpo.inputs.both_models import BothModels
    from laddpo.preference.reading.pairs import Prompt

ROWS = "from_python"  # below paths.data_dir: the rows that callers gave, as files
Conversation = Sequence[Mapping[str, str]]


def load(
    model: str | Path | None = None,
    adapter: str | Path | None = None,
    quantization: str | None = None,
    *,
    run: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> Model:
    """A model on its device, ready to score pairs and to answer prompts.

    `run`: the folder of a finished run. The result is its tuned model, with its base beside it. Otherwise `model` is a
    name in conf/model, a folder or a hub id (default: the shipped llada_nano), `adapter` is the folder of an adapter
    for it, and `quantization` is "nf4", "int8" or "none". Further settings are those that `laddpo generate` takes:
    `hardware="cpu"`, `evaluation__gen_length=48`, or `settings={"data.template": "plain"}`.

    Raises `UserError` for settings, weights or an adapter that cannot be used, with the message of the command line.
    """
    named = {"run": run, "model": model, "adapter.path": adapter, "quantization": quantization}
    given = {key: value for key, value in named.items() if value is not None}
    words = words_of(flat(given, settings or {}, more))
    config = settings_of("generate", words)

    from laddpo.inputs.both_models import checked_weights, open_both

    return Model(words, config, open_both(config, checked_weights(config), adapter_is_tuned=True))


def fit(
    pairs: str | Path | Iterable[Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> Run:
    """Train with DPO, as `laddpo train` does: the same files, byte for byte. Returns the finished run.

    `pairs`: a file, a folder or a hub id; or rows with prompt, chosen and rejected as text or as lists of messages; or
    rows with prompt, completion and label, which need a loss such as dpo__loss="kto".
    Rows are written to <paths.data_dir>/from_python/ first, so that the run can be resumed and evaluated. None: the
    pairs that `data` names, by default generated arithmetic.

    Settings have the names of the command line: `settings={"dpo.beta": 0.5}`, `dpo__beta=0.5`, `model="llada_8b"`, or a
    flat name such as `learning_rate=1e-5`. `resume=True` or `resume=FOLDER` continues a run that was stopped.

    Raises `UserError` for settings or rows that cannot be used, and its subclass `Stopped` after Ctrl-C, once a
    checkpoint is written.
    """
    asked = flat(settings or {}, more)
    if pairs is not None:
        if clash := sorted(asked.keys() & {"data", "dataset", "dataset_name", "data.dataset_name"}):
            raise UserError(f"pairs was given beside {clash[0]}; expected one of them. Leave one out.")
        if isinstance(pairs, str | Path):
            asked = {"data": pairs, **asked}
        else:
            from laddpo.preference.given import write_rows

            written = write_rows(pairs, Path(asked.get("paths.data_dir", "data")).expanduser() / ROWS)
            asked = {"data": "jsonl", "data.dataset_name": written, **asked}
    return Run(run_here("train", words_of(asked)))


class Model:
    """A loaded model. With a run or an adapter it is the tuned one, and its base is beside it; see `laddpo.load`.

    `config` holds its settings. It is not for several threads at once.
    """

    def __init__(self, words: Sequence[str], config: RunConfig, both: BothModels):
        self._words, self.config, self._both = tuple(words), config, both

    @property
    def has_base(self) -> bool:
        """Whether there is a tuned model and its base beside it."""
        return len(self._both.names) > 1

    def generate(
        self,
        prompts: str | Sequence[str | Conversation | Mapping[str, Any]],
        *,
        base: bool = False,
        seed: int | None = None,
        decoding: str | None = None,
        **settings: Any,
    ) -> str | list[str]:
        """The answers of the model to these prompts, in their order; those of the base with `base=True`.

        A prompt is a text, or a list of messages {"role", "content"} that ends with the user's or a tool's. A row with
        the keys prompt, tools and chat_template_kwargs gives the chat template more to write. A single text gives one
        answer, a list of prompts gives a list. `decoding` is an option of conf/decoding ("fast"). `settings` are those
        of evaluation by their names: gen_length and block_length (tokens), temperature, confidence_threshold, steps
        (forward passes, with confidence_threshold=None), batch_size and the others that `laddpo generate` takes. What
        is not named is as it was when the model was loaded.

        The same model, prompt, seed and settings give the same answer in any batch: that of `laddpo generate`. Raises
        `UserError` before the first answer, for a setting that cannot be used or a prompt that leaves no room.
        """
        from laddpo.evaluation.answering import answerer

        if isinstance(prompts, str):
            return self.generate([prompts], base=base, seed=seed, decoding=decoding, **settings)[0]
        asked = [_prompt(prompt, f"prompts[{number}]") for number, prompt in enumerate(_listed(prompts))]
        if base and not self.has_base:
            raise UserError("base is True and there is only a base model; load it with run= or adapter=.")
        name = self._both.names[0 if base else -1]
        (seed,) = self._checked({"seed": seed})
        answers = answerer(self._both.loaded, self._decoding(decoding, settings), self.config.data, seed)
        with self._both.weights_of(name):
            return answers.texts(asked, [f"prompts[{number}]" for number in range(len(asked))])

    def score(
        self,
        pairs: str | Path | Iterable[Mapping[str, Any]],
        *,
        diffusion_samples: int | None = None,
        seed: int | None = None,
        beta: float | None = None,
        token_budget: int | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> list[dict[str, Any]]:
        """ELBO log-likelihoods of both responses of each pair, in nats, as one record a pair in the order given.

        `pairs`: a file of rows, or rows as dictionaries with prompt, chosen and rejected. `columns` maps these names to
        the rows' own. `diffusion_samples` masks per response (default: evaluation.diffusion_samples; more is slower and
        less noisy), drawn by `seed`; `beta` scales the margin (default: dpo.beta, of the run); `token_budget` tokens go
        through the model at once (default: as memory allows; only rounding depends on it).

        A record has `id`, `logps_chosen` and `logps_rejected`, their standard errors `..._std_error` from the spread of
        the draws (None for one block of draws), `response_tokens`. With a base beside the model, also
        `reference_logps_chosen`, `reference_logps_rejected`, `margin` = beta * ((logps_chosen - reference_logps_chosen)
        - (logps_rejected - reference_logps_rejected)) and `margin_std_error`; these are None otherwise. The draws and
        values are those that `laddpo evaluate` measures.

        Rows with prompt, completion and label give records with `id`, `label`, `logps`, `logps_std_error`,
        `response_tokens`, and with a base `reference_logps`, `reward` = beta * (logps - reference_logps) and
        `reward_std_error`.

        Raises `UserError` naming the rows that cannot be used, and settings that cannot be meant.
        """
        from laddpo.evaluation.scoring import score_completions, score_pairs
        from laddpo.inputs.data import encoder_for
        from laddpo.preference.encoding.encode import EncodedCompletion
        from laddpo.preference.given import encoded_rows

        samples, seed, beta, tokens = self._checked(
            {
                "evaluation.diffusion_samples": diffusion_samples,
                "seed": seed,
                "dpo.beta": beta,
                "hardware.token_budget": token_budget,
            }
        )
        loaded = self._both.loaded
        encoded = encoded_rows(pairs, columns or {}, encoder_for(self.config.data, loaded.tokenizer))
        budget = loaded.machine.token_budget if token_budget is None else tokens
        score = score_completions if isinstance(encoded[0], EncodedCompletion) else score_pairs
        return score(self._both, encoded, samples, seed, beta, budget)

    def _decoding(self, option: str | None, settings: Mapping[str, Any]) -> EvaluationSettings:
        """The settings of evaluation with some changed, checked as those of a command are."""
        if option is None and not settings:
            return self.config.evaluation
        named = flat({} if option is None else {"decoding": option}, {"evaluation": settings})
        return settings_of("generate", [*self._words, *words_of(named)]).evaluation

    def _checked(self, values: Mapping[str, Any]) -> list[Any]:
        """Each value, checked as a setting of its name; of None the model's own setting."""
        given = {key: value for key, value in values.items() if value is not None}
        typed = values_of(words_of(given)) if given else self.config
        return [operator.attrgetter(key)(typed if key in given else self.config) for key in values]


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run in its `folder`."""

    folder: Path

    @property
    def results(self) -> dict[str, Any]:
        """results.json: base against tuned, each measure with its interval. Empty with evaluation.at_end=false."""
        path = self.folder / "evaluation" / "results.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """metrics.jsonl: one record for each logged step and each evaluation."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @property
    def adapter(self) -> Path:
        """The folder of the best weights: an adapter, or with adapter=full a whole model."""
        from laddpo.inputs.tuned import kept_names
        from laddpo.settings.compose import read_config

        return self.folder / kept_names(read_config(self.folder).adapter)[0]

    def load(self, settings: Mapping[str, Any] | None = None, **more: Any) -> Model:
        """`laddpo.load(run=folder)`: the tuned model with its base beside it."""
        return load(run=self.folder, settings=settings, **more)


def _listed(prompts: Any) -> Sequence[Any]:
    """Prompts that were given. UserError for what is none of them, and for a conversation in their place."""
    if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
        raise UserError(f"prompts is {type(prompts).__name__}; expected a text or a list of prompts.")
    listed = list(prompts)
    if listed and all(isinstance(each, Mapping) and "role" in each for each in listed):
        raise UserError("prompts is one list of messages; expected a list of prompts. Put it into a list: [messages].")
    for number, each in enumerate(listed):
        if not isinstance(each, Iterable):
            raise UserError(f"prompts[{number}] is {type(each).__name__}; expected a text, messages or a row.")
    return listed


def _prompt(prompt: str | Conversation | Mapping[str, Any], place: str) -> Prompt:
    """A text as one user message; a list of messages as it is; a row with prompt, tools and chat_template_kwargs."""
    from laddpo.preference.given import prompt_in
    from laddpo.preference.reading.pairs import user_prompt

    if isinstance(prompt, str):
        return user_prompt(prompt)
    try:
        return prompt_in(prompt if isinstance(prompt, Mapping) else {"prompt": list(prompt)})
    except RowError as error:
        raise UserError(str(error.at(place))) from error
