"""Which files hold rows, and their splits: by a description in the folder, else by name, as `datasets` does.

`choose_files` takes the files of a folder and gives those of the split that was asked for. The others are named, with
the split that they belong to. A folder of shards that lacks one is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from laddpo.errors import UserError, nearest

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PACKED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2")
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
# `datasets` knows these words in the names of files and folders, between the characters of SEPARATORS. It looks for
# lower case alone; upper case counts here too, or TEST.jsonl would be trained on.
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SEPARATORS = r"[-._ 0-9]"
WORDS = {
    split: re.compile(rf"(?:^|{SEPARATORS})(?:{'|'.join(words)})(?={SEPARATORS}|$)", re.IGNORECASE)
    for split, words in KEYWORDS.items()
}
SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<rest>.*\..*)")
SPLIT_NAME = re.compile(r"\w+(\.\w+)*")
# These files of a data set describe it and hold no rows.
DESCRIPTIONS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
CARD = "README.md"
NO_SPLIT = "no split"  # of a file whose name says none beside files whose names do
Splits = dict[str, list[Path]]  # files by split; a file that no split claims is missing


def last_suffix(name: str) -> str:
    """The ending of a name in lower case, those of packing aside."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in PACKED_SUFFIXES), "")


def has_file_name(name: str) -> bool:
    """Whether a name ends like a data file, packed or not."""
    return last_suffix(name) in SUFFIXES


def choose_files(
    root: Path, files: Sequence[Path], asked: str | None, config: str | None = None, key: str = "data.dataset_split"
) -> tuple[list[Path], dict[str, str]]:
    """The files of the split `asked` (null: train; `train+test`: both), and the split of each other file by its path.

    `key` is the setting that named the split. Raises UserError for a split that is not there, for a file that two
    splits claim, and for a missing shard.
    """
    splits = described_splits(root, files, config) or splits_by_name(root, files)
    wanted = (asked or "train").split("+")
    for split in wanted:
        if split not in splits:
            raise UserError(_no_such_split(root, files, splits, split, key))
    chosen = sorted({file for split in wanted for file in splits[split]})
    owner = {file: split for split, members in splits.items() if split not in wanted for file in members}
    if both := [file for file in chosen if file in owner]:
        raise UserError(
            f"{both[0]}: its name says {wanted[0]} and {owner[both[0]]}, so it may hold rows of a test (DATA-70). "
            "Rename it, or give it as the data set itself."
        )
    check_shards(chosen, files)
    return chosen, {str(file): owner.get(file, NO_SPLIT) for file in files if file not in set(chosen)}


def splits_by_name(root: Path, files: Sequence[Path]) -> Splits:
    """Files by split as their names say. Without any split in a name, all files are the train split."""
    return _shards_of_splits(root, files) or _named(root, files, in_folders=True) or _named(root, files) or _all(files)


def named_splits(name: str) -> set[str]:
    """The splits that the name of one file says: its exact name before -00000-of-00001, and its keywords."""
    exact = SHARD.fullmatch(name)
    return {split for split, word in WORDS.items() if word.search(name)} | ({exact["split"]} if exact else set())


def contradicted_split(dataset_name: str, asked: str) -> str | None:
    """What is wrong with the split `asked` beside one file, named by itself; None when its name agrees."""
    said = named_splits(Path(dataset_name).name)
    if set(asked.split("+")) & (said or {"train"}):
        return None
    return f"its name says {' and '.join(sorted(said))}" if said else "a file by itself is the split train"


def check_shards(chosen: Sequence[Path], present: Sequence[Path]) -> None:
    """Refuse files numbered NAME-00000-of-00005 where one of the five is nowhere among `present`, or is there twice.

    They are counted from 0, or from 1 where a file carries the last number.
    """
    groups: dict[tuple[Path, str], dict[int, dict[int, Path]]] = {}
    wanted = {(path.parent, shard["split"]) for path in chosen if (shard := SHARD.fullmatch(path.name))}
    for path in present:
        shard = SHARD.fullmatch(path.name)
        if not shard or (path.parent, shard["split"]) not in wanted:
            continue
        numbers = groups.setdefault((path.parent, shard["split"]), {}).setdefault(int(shard["total"]), {})
        known = numbers.setdefault(int(shard["number"]), path)
        if known != path:
            raise UserError(f"{path}: is the same part as {known.name} (DATA-71). Keep one of them.")
    for (folder, name), by_total in groups.items():
        if len(by_total) > 1:
            counts = " and of ".join(map(str, sorted(by_total)))
            raise UserError(f"{folder}: has {name} in parts of {counts} (DATA-71). Keep the files of one version.")
        ((total, numbers),) = by_total.items()
        first = 1 if total in numbers and 0 not in numbers else 0
        missing = [number for number in range(first, first + total) if number not in numbers]
        if missing:
            names = ", ".join(f"{name}-{number:05}-of-{total:05}" for number in missing[:5])
            more = f" and {len(missing) - 5} more" if missing[5:] else ""
            raise UserError(
                f"{folder}: {names}{more} {'is' if len(missing) == 1 else 'are'} missing, found {len(numbers)} of "
                f"{total} parts (DATA-71). Copy the missing files, or give the files that you want by name."
            )


def described_splits(root: Path, files: Sequence[Path], config: str | None) -> Splits:
    """Files by split as the folder itself says: what save_to_disk wrote, or the configurations of its README.md. Empty
    without such a description."""
    if config is None and (saved := _saved_splits(root, files)):
        return saved
    described = _card_configs(root)
    if not described:
        if config is not None:
            raise UserError(
                f"data.dataset_config is {config!r} and {root} describes no configurations in a {CARD} (DATA-72). Set "
                "data.dataset_config=null and give the folder of that configuration as data.dataset_name."
            )
        return {}
    names = [str(entry.get("config_name")) for entry in described]
    defaults = [name for name, entry in zip(names, described, strict=True) if name == "default" or entry.get("default")]
    chosen = config or (names[0] if len(names) == 1 else defaults[0] if len(defaults) == 1 else None)
    if chosen not in names:
        found = f"data.dataset_config is {config!r}" if config else "data.dataset_config is not set"
        guess = nearest(config, names) if config else None
        hint = f" Did you mean {guess}?" if guess else " Name one of them."
        raise UserError(f"{found}; {root} has {', '.join(names)} (DATA-72).{hint}")
    return _config_splits(root, files, described[names.index(chosen)])


def _config_splits(root: Path, files: Sequence[Path], entry: Mapping[str, Any]) -> Splits:
    """Files by split of one configuration of a README.md."""
    base = str(entry.get("data_dir") or "").strip("/")
    inside = [file for file in files if file.is_relative_to(root / base)]
    given = entry.get("data_files")
    if given is None:
        return splits_by_name(root / base, inside)
    items = given if isinstance(given, list) else [given]
    if not all(isinstance(item, dict) for item in items):
        items = [{"split": "train", "path": items}]
    splits: Splits = {}
    for item in items:
        paths = item.get("path")
        patterns = [_glob(str(path)) for path in (paths if isinstance(paths, list) else [paths])]
        names = {file: file.relative_to(root / base).as_posix() for file in inside}
        found = [file for file, name in names.items() if any(pattern.fullmatch(name) for pattern in patterns)]
        if not found:
            raise UserError(f"{root / CARD}: says that split {item.get('split')} is {paths}, which is not there.")
        splits[str(item.get("split"))] = found
    return splits


def _card_configs(root: Path) -> list[dict[str, Any]]:
    """The entries of `configs` in the head of the folder's README.md."""
    import yaml

    try:
        text = (root / CARD).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    head = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        fields = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError as error:
        raise UserError(f"{root / CARD}: its head is no yaml ({' '.join(str(error).split())[:120]}).") from error
    configs = fields.get("configs") if isinstance(fields, dict) else None
    return [entry for entry in configs or [] if isinstance(entry, dict) and {"data_files", "data_dir"} & set(entry)]


def _saved_splits(root: Path, files: Sequence[Path]) -> Splits:
    """Files by split of a folder that save_to_disk of `datasets` wrote."""
    if (root / "dataset_dict.json").exists():
        names = _json(root / "dataset_dict.json").get("splits") or []
        return {str(name): _saved_files(root / str(name), files) for name in names}
    if not (root / "state.json").exists() or "_data_files" not in (state := _json(root / "state.json")):
        return {}
    split = str(state.get("_split") or "train").partition("[")[0]  # without a slice such as train[:10%]
    return {split if SPLIT_NAME.fullmatch(split) else "train": _saved_files(root, files)}


def _saved_files(folder: Path, files: Sequence[Path]) -> list[Path]:
    """The files that state.json lists, in its order."""
    listed = [folder / str(entry.get("filename")) for entry in _json(folder / "state.json").get("_data_files") or []]
    if missing := [path.name for path in listed if path not in set(files)]:
        raise UserError(f"{folder}: its state.json lists {missing[0]}, which is not there (DATA-71). Save it again.")
    return listed


def _json(path: Path) -> dict[str, Any]:
    import json

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found, so the folder was not saved whole (DATA-71). Save it again.") from error
    except ValueError as error:
        raise UserError(f"{path}: is not whole JSON (DATA-35). Save the folder again.") from error
    return content if isinstance(content, dict) else {}


def _shards_of_splits(root: Path, files: Sequence[Path]) -> Splits:
    """Files named SPLIT-00000-of-00001 in `data`, as the hub has them, or in the folder itself where a keyword begins
    the name: there `data` was given by itself. Empty if a name is no split's."""
    splits: Splits = {}
    for place in (root / "data", root):
        shards = [(SHARD.fullmatch(file.name), file) for file in files if file.parent == place]
        for shard, file in shards:
            if shard and (place != root or any(word.match(shard["split"]) for word in WORDS.values())):
                splits.setdefault(shard["split"], []).append(file)
        if splits:
            break
    return splits if all(SPLIT_NAME.fullmatch(split) for split in splits) else {}


def _named(root: Path, files: Sequence[Path], in_folders: bool = False) -> Splits:
    """Files whose own name, or the name of a folder inside `root`, has the keyword of a split."""
    splits: Splits = {}
    for file in files:
        *folders, name = file.relative_to(root).parts
        for split, word in WORDS.items():
            if any(map(word.search, folders if in_folders else [name])):
                splits.setdefault(split, []).append(file)
    return splits


def _all(files: Sequence[Path]) -> Splits:
    return {"train": list(files)}


def _no_such_split(root: Path, files: Sequence[Path], splits: Splits, split: str, key: str) -> str:
    guess = nearest(split, splits) if sum(split in known for known in splits) < 2 else None
    hint = f" Did you mean {guess}?" if guess else f" Choose one of them, or give a file by name as {_owner(key)}."
    claimed = {file for members in splits.values() for file in members}
    unclaimed = sorted(file.name for file in files if file not in claimed)
    rest = f" Files that name no split: {', '.join(unclaimed[:5])}." if unclaimed else ""
    return f"{key} is {split!r}; {root} has {', '.join(_ordered(splits))} (DATA-70).{rest}{hint}"


def has_configurations(root: Path) -> bool:
    """Whether the folder's README.md tells which files each configuration has."""
    return bool(_card_configs(root))


def _ordered(splits: Splits) -> list[str]:
    return [*(name for name in KEYWORDS if name in splits), *sorted(set(splits) - set(KEYWORDS))]


def _owner(key: str) -> str:
    return "evaluation.dataset_name" if key.startswith("evaluation") else "data.dataset_name"


def _glob(pattern: str) -> re.Pattern[str]:
    """A file pattern as a regular expression: * stays inside a folder, ** crosses folders."""
    return re.compile("".join(_translated(pattern.removeprefix("./"))), re.DOTALL)


def _translated(pattern: str) -> Iterator[str]:
    kinds = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    for piece in re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]*\])", pattern):
        yield kinds.get(piece) or (piece if piece.startswith("[") else re.escape(piece))
