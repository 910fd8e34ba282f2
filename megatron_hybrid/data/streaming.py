"""Streaming decoder: text of generated tokens, equal to the decoded whole.

A token's text depends on what is before it: tokenizers put spaces between words, join bytes to characters and leave out
special tokens. So a continuation is decoded together with the last tokens of its prompt, and what these decode to is
taken off. The prompt's own text is not used: a tokenizer need not give it back.
"""

from megatron_hybrid.data.tokenizer import Tokenizer

CONTEXT_TOKENS = 16
"""Number of previous tokens that are decoded with new ones, larger than the context of any tokenizer."""
_CUT = "\ufffd"  # decoded from the bytes of a character that is not complete


class ContinuationText:
    """Decoder of the tokens that continue a prompt, one by one."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]):
        self._tokenizer = tokenizer
        self._tokens = prompt[-CONTEXT_TOKENS:]
        self._told = len(self._tokens)  # tokens whose text was returned

    def add(self, token: int) -> str:
        """Return the text that a token completes, which may be empty."""
        self._tokens.append(token)
        text = self._new_text()
        if text.endswith(_CUT) or not text:
            return ""
        self._settle()
        return text

    def end(self) -> str:
        """Return the remaining text. Incomplete characters become U+FFFD."""
        text = self._new_text()
        self._settle()
        return text

    def _new_text(self) -> str:
        """Return the text of the tokens that were not returned yet, decoded after CONTEXT_TOKENS previous tokens."""
        known = self._tokenizer.decode(self._tokens[: self._told])
        whole = self._tokenizer.decode(self._tokens)
        if whole.startswith(known):
            return whole[len(known) :]
        same = next(
            (i for i, (a, b) in enumerate(zip(known, whole, strict=False)) if a != b), min(len(known), len(whole))
        )
        return whole[same:]

    def _settle(self) -> None:
        self._tokens = self._tokens[-CONTEXT_TOKENS:]
        self._told = len(self._tokens)
