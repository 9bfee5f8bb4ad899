"""README.md of an exported model: what it is made from, how it scored, how to load it. No place of this machine."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from laddpo.core.losses import LOSSES
from laddpo.inputs.pins import model_path
from laddpo.models.families import FAMILIES
from laddpo.preference.reading.splits import HUB_ID, has_file_name
from laddpo.results.tables import before_after_rows, held_out_note, markdown
from laddpo.results.using import use_section
from laddpo.settings.data_checks import sft_examples
from laddpo.settings.ranges import as_written
from laddpo.settings.redaction import redact
from laddpo.settings.schema import DataSettings, RunConfig


@dataclass(frozen=True)
class CardFacts:
    """What the export found out: dtype of the weights, the logit check in words, tensors compared after loading."""

    dtype: str
    check: str
    tensors: int
    is_adapter: bool = False
    architecture: str | None = None
    public_code: str | None = None  # the hub repository that has the architecture's modelling code


def card_text(
    config: RunConfig,
    facts: CardFacts,
    results: Mapping[str, Any],
    sealed: Mapping[str, Any] | None,
    base: str,
    step: int | None,
    licence: list[str],
    *,
    is_foreign: bool = False,
) -> str:
    """The whole card in Markdown with the hub's front matter. `is_foreign`: the adapter is not of a run of ours, so
    nothing is known of how it was trained."""
    name = shown_path(config.model.model_name_or_path)
    what = "LoRA adapter for" if facts.is_adapter else "Fine-tuned"
    is_sft = (sealed or {}).get("kind") == "sft"
    title = "fine-tuned" if is_sft or is_foreign else "trained on preferences"
    method = "supervised fine-tuning" if is_sft else f"preference optimization (loss {config.dpo.loss})"
    made = (
        "exported with laddpo. How it was trained is not recorded" if is_foreign else f"trained by {method} with laddpo"
    )
    sections = [
        _front_matter(config, facts, name, licence, is_sft, is_foreign),
        f"# {inline(name.rsplit('/', 1)[-1])}, {title}",
        f"{what} {inline(name)}, a masked-diffusion language model, {made}.",
        _origin(config, facts, sealed, base, step, name, licence, is_sft, is_foreign),
        _metrics(results),
        "## Use\n\n" + _use(config, facts, one_line(name), is_foreign),
        "## Settings\n\n" + fenced(_settings(config, is_foreign), "yaml"),
    ]
    return redact("\n\n".join(section for section in sections if section)) + "\n"


def shown_path(path: str) -> str:
    """A hub id or relative name as it is; of an absolute place on this machine only the last part."""
    place = Path(path).expanduser()
    return place.name if place.is_absolute() or path.startswith(("~", "..")) else path


def licences(value: Any) -> list[str]:
    """The licences in a card's `license` entry, one name or a list of names; text of any other kind is none."""
    names = value if isinstance(value, list) else [value]
    is_name = [isinstance(name, str) and 0 < len(name.strip()) <= 100 and len(name.splitlines()) == 1 for name in names]
    return [name.strip() for name in names] if all(is_name) else []


def inline(text: Any) -> str:
    """Text of somebody else as one line of Markdown that starts no link, code, emphasis or HTML."""
    return re.sub(r"([\\`*\[\]<>])", r"\\\1", one_line(text))


def one_line(text: Any) -> str:
    """Text without line breaks and control characters."""
    return " ".join("".join(character if character.isprintable() else " " for character in str(text)).split())


def fenced(text: str, language: str) -> str:
    """A code block that nothing in the text can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _front_matter(
    config: RunConfig, facts: CardFacts, name: str, licence: list[str], is_sft: bool, is_foreign: bool
) -> str:
    content: dict[str, Any] = {"license": licence[0] if len(licence) == 1 else licence or "other"}
    if "/" in name and not Path(model_path(config.model)).expanduser().exists():
        content["base_model"] = one_line(name)
        content["base_model_relation"] = "adapter" if facts.is_adapter else "finetune"
    if not is_foreign and _is_on_hub(config):
        content["datasets"] = [config.data.dataset_name]
    content["library_name"] = "peft" if facts.is_adapter else "transformers"
    of_loss = LOSSES.get(config.dpo.loss)
    is_dpo = of_loss is None or (of_loss.takes_pairs and of_loss.needs_reference)
    method = [] if is_foreign else ["sft" if is_sft else "dpo" if is_dpo else config.dpo.loss]
    content["tags"] = [*method, "masked-diffusion", FAMILIES[config.model.architecture].tag]
    written = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True, width=math.inf)
    return f"---\n{written}---"


def _is_on_hub(config: RunConfig) -> bool:
    """Whether data.dataset_name can only be a hub id: no file or folder here, and none by its form."""
    name = config.data.dataset_name or ""
    places = (Path(name), Path(config.paths.data_dir) / "preference_data" / name)
    return bool(HUB_ID.fullmatch(name)) and not has_file_name(name) and not any(place.exists() for place in places)


def _origin(config, facts, sealed, base, step, name, licence, is_sft, is_foreign) -> str:
    fields = (sealed or {}).get("fields", {})
    data = ", ".join(part["data"] for part in fields.get("rounds", [fields]) if "data" in part)
    rows = inline(shown_path(config.data.dataset_name)) if config.data.dataset_name else config.data.source
    examples = sft_examples(config) if is_sft else "pairs"
    if is_foreign:
        trained_on = "not recorded: the adapter is not of a run of this program"
    elif examples == "corpus":
        trained_on = f"{config.sft.num_examples:,} generated examples (sft.examples=corpus, seed {config.seed})"
    else:
        kind = "rows" if examples == "rows" or not LOSSES[config.dpo.loss].takes_pairs else "pairs"
        trained_on = f"{rows}, fingerprint of the prepared {kind} `{data or 'not recorded by this run'}`"
    lines = [
        f"base: {inline(name)}{f', revision {inline(config.model.revision)}' if config.model.revision else ''} "
        f"(weights `{base}`)",
        f"licence: {', '.join(map(inline, licence)) or 'the base names none; its terms apply'}",
        f"data: {trained_on}",
    ]
    if step is not None:
        rounds = len(fields.get("rounds", []))
        of_round = f" of round {rounds}, each round from the model before it" if rounds else ""
        none_better = "; no evaluation during that training found better ones than it began with" if step == 0 else ""
        lines.append(f"weights: those kept at step {step}{of_round}{none_better}")
    if not facts.is_adapter:
        lines.append(f"stored in {facts.dtype}; {facts.check}; loaded again byte for byte ({facts.tensors} tensors)")
        if not is_foreign and (config.quantization.load_in_4bit or config.quantization.load_in_8bit):
            bits = 4 if config.quantization.load_in_4bit else 8
            lines.append(
                f"the adapter was trained on {bits}-bit weights and merged into the unquantised ones, on which the "
                "numbers below were not measured"
            )
    return "## Origin\n\n" + "\n".join(f"- {line}" for line in lines)


def _metrics(results: Mapping[str, Any]) -> str:
    header, rows = before_after_rows(results)
    if not rows:
        return "## Metrics\n\nNot evaluated."
    note = "Base against tuned with paired 95% intervals, as `python -m laddpo.evaluate` measured them."
    note = " ".join(filter(None, [note, held_out_note(results)]))
    tasks = {e["task"]["name"]: e["task"] for e in results.values() if isinstance(e, Mapping) and "task" in e}
    details = "".join(f"\n- {inline(n)}: " + ", ".join(f"{k} {inline(shown_path(str(v)))}" for k, v in t.items()
                      if k != "name") for n, t in tasks.items())  # fmt: skip
    table = markdown(header, [[inline(name), *numbers] for name, *numbers in rows])
    return f"## Metrics\n\n{note}\n\n{table}\n{details}".rstrip()


def _settings(config: RunConfig, is_foreign: bool) -> str:
    names = ("adapter",) if is_foreign else SETTINGS
    tree = {name: value for name, value in dataclasses.asdict(config).items() if name in names}
    return OmegaConf.to_yaml(OmegaConf.create(_without_places(tree)))


def _use(config: RunConfig, facts: CardFacts, base: str, is_foreign: bool) -> str:
    is_arithmetic = config.data.source == "arithmetic" and not is_foreign
    prompt = "08+06+09=" if is_arithmetic else "What is the capital of France?"
    template = "" if is_foreign else _template_settings(config.data, facts.is_adapter)
    return use_section(base, facts.architecture, facts.public_code, facts.is_adapter, prompt, template)


def _template_settings(data: DataSettings, is_adapter: bool) -> str:
    """How the run wrote its prompts, as settings on a command line, each behind a space."""
    own = {"data.template": data.template} if data.template != "auto" else {}
    own |= {"data.chat_template": "THIS_FOLDER/chat_template.jinja"} if data.chat_template and is_adapter else {}
    own |= {f"data.template_kwargs.{name}": as_written(value) for name, value in data.template_kwargs.items()}
    return "".join(f" {shlex.quote(f'{key}={value}')}" for key, value in own.items())


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    return shown_path(value) if isinstance(value, str) and value else value


SETTINGS = ("seed", "adapter", "quantization", "data", "dpo", "sft", "optim", "evaluation")
