"""Bytes of tokens to text as they come: characters once they are whole, and nothing of a stop string."""

import codecs
from collections.abc import Sequence


class TextStream:
    """What one sequence has said so far. `stops`: strings that end it, of which nothing is given out; `is_stopped` once one has come."""

    def __init__(self, stops: Sequence[str] = ()):
        self._stops = [stop for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a letter's bytes may be in several tokens
        self._held = ""  # which may be the beginning of a stop string
        self.is_stopped = False

    def add(self, data: bytes) -> str:
        """Return the text that is certain now. Bytes that are no UTF-8 read U+FFFD. After a stop string, nothing."""
        return self._given(self._decoder.decode(data))

    def end(self) -> str:
        """Return what was held back, after the last token."""
        text = self._given(self._decoder.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _given(self, text: str) -> str:
        if self.is_stopped:
            return ""
        text = self._held + text
        if found := [at for stop in self._stops if (at := text.find(stop)) >= 0]:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        kept = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]
