"""Whether preference data are pairs or unpaired rows, found out before they are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from laddpo.preference.encoding.encode import TextEncoder
from laddpo.preference.preparation import Part, Rules, find_prepared
from laddpo.preference.prepared import PreparedPairs, PreparedUnpaired, kind_of_folder
from laddpo.preference.sources import open_source
from laddpo.preference.unpaired import refuse_threshold


def kind_of_rows(
    prepared_dir: Path, name: str, parts: Sequence[Part], encoder: TextEncoder, rules: Rules
) -> type[PreparedPairs] | type[PreparedUnpaired]:
    """Whether these rows are pairs or unpaired: as the prepared folder says, or as data.format or the first rows of the
    sources do. If one part of a mixture is unpaired, all of it is: pairs are split in two."""
    folder = find_prepared(prepared_dir, name, parts, encoder, rules)
    if folder is not None:
        return kind_of_folder(folder)
    if any(open_source(part.source).is_unpaired(part.request) for part in parts):
        return PreparedUnpaired
    for part in parts:
        if "label_threshold" in open_source(part.source).reads:
            refuse_threshold(part.request)
    return PreparedPairs
