"""README.md of an exported model: what it is made from, how it scored, how to load it. No place of this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from laddpo.evaluation.tables import before_after_rows, markdown
from laddpo.preference.locate import HUB_ID, has_file_name
from laddpo.redaction import redact
from laddpo.settings import RunConfig


@dataclass(frozen=True)
class CardFacts:
    """What the export found out: dtype of the weights, the logit check in words, tensors compared after loading."""

    dtype: str
    check: str
    tensors: int
    is_adapter: bool = False


def card_text(
    config: RunConfig,
    facts: CardFacts,
    results: Mapping[str, Any],
    sealed: Mapping[str, Any] | None,
    base: str,
    step: int | None,
    licence: str | None,
    *,
    is_foreign: bool = False,
) -> str:
    """The whole card in Markdown with the hub's front matter. `is_foreign`: the adapter is not of a run of ours, so
    nothing is known of how it was trained."""
    name = shown_path(config.model.model_name_or_path)
    what = "LoRA adapter for" if facts.is_adapter else "Fine-tuned"
    is_sft = (sealed or {}).get("kind") == "sft"
    title = "fine-tuned" if is_sft or is_foreign else "trained on preferences"
    method = "supervised fine-tuning" if is_sft else "direct preference optimization"
    made = (
        "exported with laddpo. How it was trained is not recorded" if is_foreign else f"trained by {method} with laddpo"
    )
    sections = [
        _front_matter(config, facts, name, licence, is_sft, is_foreign),
        f"# {name.rsplit('/', 1)[-1]}, {title}\n\n{what} {name}, a masked-diffusion language model, {made}.",
        _origin(config, facts, sealed, base, step, name, licence, is_sft, is_foreign),
        _metrics(results),
        "## Use\n\n" + (ADAPTER_USE if facts.is_adapter else MERGED_USE).replace("BASE", name),
        f"## Settings\n\n```yaml\n{_settings(config, is_foreign)}```",
    ]
    return redact("\n\n".join(section for section in sections if section)) + "\n"


def shown_path(path: str) -> str:
    """A hub id or relative name as it is; of an absolute place on this machine only the last part."""
    place = Path(path).expanduser()
    return place.name if place.is_absolute() or path.startswith(("~", "..")) else path


def _front_matter(
    config: RunConfig, facts: CardFacts, name: str, licence: str | None, is_sft: bool, is_foreign: bool
) -> str:
    lines = [f"license: {licence or 'other'}"]
    if "/" in name and not Path(config.model.model_name_or_path).expanduser().exists():
        lines += [f"base_model: {name}", f"base_model_relation: {'adapter' if facts.is_adapter else 'finetune'}"]
    if not is_foreign and _is_on_hub(config):
        lines.append(f"datasets: [{config.data.dataset_name}]")
    lines.append(f"library_name: {'peft' if facts.is_adapter else 'transformers'}")
    method = [] if is_foreign else ["sft" if is_sft else "dpo"]
    lines.append(f"tags: [{', '.join([*method, 'masked-diffusion', 'llada'])}]")
    return "---\n" + "\n".join(lines) + "\n---"


def _is_on_hub(config: RunConfig) -> bool:
    """Whether data.dataset_name can only be a hub id: no file or folder here, and none by its form."""
    name = config.data.dataset_name or ""
    places = (Path(name), Path(config.paths.data_dir) / "preference_data" / name)
    return bool(HUB_ID.fullmatch(name)) and not has_file_name(name) and not any(place.exists() for place in places)


def _origin(config, facts, sealed, base, step, name, licence, is_sft, is_foreign) -> str:
    fields = (sealed or {}).get("fields", {})
    data = ", ".join(part["data"] for part in fields.get("rounds", [fields]) if "data" in part)
    rows = shown_path(config.data.dataset_name) if config.data.dataset_name else config.data.source
    if is_foreign:
        trained_on = "not recorded: the adapter is not of a run of this program"
    elif is_sft and config.sft.examples == "corpus":
        trained_on = f"{config.sft.num_examples:,} generated examples (sft.examples=corpus, seed {config.seed})"
    else:
        trained_on = f"{rows}, fingerprint of the prepared pairs `{data or 'not recorded by this run'}`"
    lines = [
        f"base: {name}{f', revision {config.model.revision}' if config.model.revision else ''} (weights `{base}`)",
        f"licence: {licence or 'the base names none; its terms apply'}",
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
    tasks = {e["task"]["name"]: e["task"] for e in results.values() if isinstance(e, Mapping) and "task" in e}
    details = "".join(f"\n- {n}: " + ", ".join(f"{k} {shown_path(str(v))}" for k, v in t.items() if k != "name")
                      for n, t in tasks.items())  # fmt: skip
    return f"## Metrics\n\n{note}\n\n{markdown(header, rows)}\n{details}".rstrip()


def _settings(config: RunConfig, is_foreign: bool) -> str:
    names = ("adapter",) if is_foreign else SETTINGS
    tree = {name: value for name, value in dataclasses.asdict(config).items() if name in names}
    return OmegaConf.to_yaml(OmegaConf.create(_without_places(tree)))


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    return shown_path(value) if isinstance(value, str) and value else value


SETTINGS = ("seed", "adapter", "quantization", "data", "dpo", "sft", "optim", "evaluation")
MERGED_USE = """```python
from laddpo.models.loading import load_model, load_tokenizer

model, tokenizer = load_model("<this folder>"), load_tokenizer("<this folder>")
```

Or as a base for every stage: `python -m laddpo.generate model.model_name_or_path=<this folder> prompt="…"`."""

ADAPTER_USE = """```python
from laddpo.models.adapters import attach_lora
from laddpo.models.loading import load_model

model = load_model("BASE")
attach_lora(model, path="<this folder>")
```

Or merged: `python -m laddpo.export model.model_name_or_path=BASE adapter.path=<this folder>`."""
