"""Tokenises text of rows so that nothing in it can become a special token, and rendered templates so that theirs do.

A special token is any that the tokenizer flags so, the mask token, and any added token that the chat template writes
around messages.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from laddpo.errors import UserError
from laddpo.preference.reading.bad_rows import RowError
from laddpo.preference.reading.texts import WHOLE, half_in

MASK_TOKENS = ("<|mdm_mask|>", "[MDM_MASK]", "<|mask|>", "<[MASK]>")  # where the tokenizer declares none, as LLaDA's


class PlainTokenizer:
    """Two views of a fast tokenizer: `encode_plain` knows no special tokens, `encode_rendered` only the template's."""

    def __init__(self, tokenizer: Any, role_markers: Iterable[str] = ()):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"{type(tokenizer).__name__} is a slow tokenizer. A fast one (with tokenizer.json) is needed, one that "
                f"can tell special tokens from text that looks like them."
            )
        from tokenizers import Tokenizer

        described = json.loads(backend.to_str())
        described["truncation"] = described["padding"] = None
        markers = {*role_markers, *MASK_TOKENS, tokenizer.special_tokens_map.get("mask_token")}
        self.special_ids: dict[str, int] = {}
        for token in described["added_tokens"]:
            token["special"] = token["special"] or token["content"] in markers
            if token["special"]:
                self.special_ids[token["content"]] = token["id"]
        text = json.dumps(described, sort_keys=True, ensure_ascii=False)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._plain, self._knowing = Tokenizer.from_str(text), Tokenizer.from_str(text)
        self._plain.encode_special_tokens = True
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._special_id_set = frozenset(self.special_ids.values())

    def may_join(self, text: str) -> bool:
        """Whether a text may be a part of a special token that a template completes."""
        inside, starts, ends = self._parts
        edges = range(1, min(len(text), max(map(len, self.special_ids), default=0)) + 1)
        return text in inside or any(text[-size:] in starts or text[:size] in ends for size in edges)

    @cached_property
    def _parts(self) -> tuple[set[str], set[str], set[str]]:
        """Texts inside special tokens, their beginnings and their ends."""
        cuts = [(token, place) for token in self.special_ids for place in range(1, len(token))]
        inside = {token[place:end] for token, place in cuts for end in range(place + 1, len(token))}
        return inside, {token[:place] for token, place in cuts}, {token[place:] for token, place in cuts}

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts in which everything is text."""
        return [encoding.ids for encoding in _encoded(self._plain, list(texts))]

    def encode_rendered(self, rendered: Sequence[tuple[str, dict[str, str]]]) -> list[list[int]]:
        """Token ids of rendered templates.

        Each comes with the stand-ins that hide special-token text of the messages (usually none): without them the
        tokenizer is right, unless its normalizer makes a special token of what only looks like one. Then, and with
        them, the text is split at the template's own special tokens by hand, and in the pieces the stand-ins are turned
        back into plain text.
        """
        simple = [text for text, hidden in rendered if not hidden]
        whole = iter(_encoded(self._knowing, simple))
        encoded = []
        for text, hidden in rendered:
            own = [self.special_ids[token] for token in self.pattern.findall(text)]
            ids = [] if hidden else next(whole).ids
            if hidden or self.special_in(ids) != own:
                ids = self._encode_pieces(text, hidden)
                self.refuse_special(ids, "prompt", own)
            encoded.append(ids)
        return encoded

    def _encode_pieces(self, text: str, hidden: dict[str, str]) -> list[int]:
        ids: list[int] = []
        end = 0
        for match in [*self.pattern.finditer(text), None]:
            piece = text[end : match.start() if match else len(text)]
            for stand_in, original in hidden.items():
                piece = piece.replace(stand_in, original)
            if piece:
                ids += self.encode_plain([piece])[0]
            if match:
                ids.append(self.special_ids[match.group()])
                end = match.end()
        return ids

    def special_text(self, texts: Iterable[str]) -> tuple[str, ...]:
        """The special tokens whose text occurs, sorted."""
        found = {token for text in texts for token in self.pattern.findall(text)}
        return tuple(sorted(found))

    def special_in(self, ids: Iterable[int]) -> list[int]:
        """The ids of special tokens among ids."""
        return [token for token in ids if token in self._special_id_set]

    def refuse_special(self, ids: Iterable[int], field: str, own: Sequence[int] = ()) -> None:
        """RowError where ids have special tokens beside the template's `own`, for all that was done to keep text."""
        if self.special_in(ids) != list(own):
            problem = "spells a special token, and this tokenizer cannot write it as text"
            raise RowError("DATA-74", field, problem, "Remove the row.")

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens shown."""
        return self._plain.decode([int(token) for token in ids], skip_special_tokens=False)


def _encoded(tokenizer: Any, texts: list[str]) -> list[Any]:
    """Encodings without tokens of the tokenizer's own. RowError for text with half a character, which rows of files
    were refused for when they were read."""
    try:
        return tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except TypeError:
        half = next(filter(None, map(half_in, texts)), None)
        if half is None:
            raise
        raise RowError("DATA-29", "prompt", f"has half of a surrogate pair, {half.group()!a}", WHOLE) from None
