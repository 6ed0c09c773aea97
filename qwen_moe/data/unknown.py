"""Finds text for which a tokenizer has no tokens: its unknown token would take its place, or nothing would."""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FIX = "use a byte-level BPE tokenizer with a token for each of the 256 bytes (`tokenizers` adds them with initial_alphabet)"


class Unknown:
    """What ``tokenizer`` cannot write: nothing if it has all bytes. ``token``: otherwise the id and text of its unknown
    token, or None. A BPE tokenizer without one leaves out characters that its vocabulary lacks, so these are looked for."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        from tokenizers.pre_tokenizers import ByteLevel

        self._tokenizer = tokenizer
        content = json.loads(tokenizer.to_str())
        model = content["model"]
        fallback = [f"<0x{byte:02X}>" for byte in range(256)] if model.get("byte_fallback") else []
        alphabets = [ByteLevel.alphabet(), fallback]
        whole = any(one and all(tokenizer.token_to_id(token) is not None for token in one) for one in alphabets)
        token = model.get("unk_token")
        if model.get("unk_id") is not None:
            token = tokenizer.id_to_token(model["unk_id"])
        number = None if token is None or whole else tokenizer.token_to_id(token)
        self.token = None if number is None else (number, token)
        self._loses = model["type"] == "BPE" and self.token is None and not whole
        # Others may drop white space between words on purpose.
        self._keeps_space = '"ByteLevel"' in json.dumps(content["pre_tokenizer"])
        added = [token["content"] for token in content["added_tokens"]]
        self._added = None if tokenizer.encode_special_tokens else re.compile("|".join(map(re.escape, added)) or "(?!)")
        self._known: dict[str, bool] = {}

    def problem(self, text: str, ids: Sequence[int]) -> str:
        """Why ``ids`` do not say all of ``text``; empty if they do."""
        if self.token is not None and self.token[0] in ids:
            return (
                f"has no tokens for {self._first(text)}, in whose place it writes its unknown token {self.token[1]!r}"
            )
        if self._loses and (lost := [one for one in self._characters(text) if not self._writes(one)]):
            named = ", ".join(repr(one) for one in sorted(lost)[:5])
            return f"has no tokens for {named}{' and more' if len(lost) > 5 else ''}, and would leave that out"
        return ""

    def _first(self, text: str) -> str:
        """The first part that becomes the unknown token, and where it stands."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        for number, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if self.token is not None and number == self.token[0]:
                return f"{text[begin:end][:40]!r} (in {text[max(0, begin - 20) : end + 20][:80]!r})"
        return "some of the text"  # a template wrote it

    def _characters(self, text: str) -> set[str]:
        if self._added is not None:  # the tokenizer reads them as one token each
            text = self._added.sub("", text)
        normalizer = self._tokenizer.normalizer
        return set(text if normalizer is None else normalizer.normalize_str(text))

    def _writes(self, character: str) -> bool:
        found = self._known.get(character)
        if found is None:
            ids = self._tokenizer.encode(character, add_special_tokens=False).ids
            written = self._tokenizer.decode(ids, skip_special_tokens=False)
            dropped = character.isspace() and not self._keeps_space
            found = self._known[character] = dropped or character in written
        return found
