"""A tokenizer as GGUF metadata: tokens, types, merges or scores, special ids, the chat template.

Two kinds exist in llama.cpp that matter here. "gpt2" is byte-level BPE, with its merges. "llama" is
SentencePiece-style BPE with byte tokens: each token has a score, and of all neighbours that form a
token the best score is joined first. tokenizer.json has merges for that kind too; the rank of a
token's first merge, negated, is its score.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from halfbyte.errors import CheckpointError
from halfbyte.generate.prompts import end_of_turn_id, rendered
from halfbyte.gguf.pretokenizers import find_pre_tokenizer

SPACE = "\u2581"  # SentencePiece's visible space
# llama.cpp drops the space behind special tokens where the model's name has one of these.
STRIPPING_NAMES = ("phi-3", "phi3")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_GENERATION = re.compile(r"{%([-+]?)\s*(end)?generation\s*([-+]?)%}")


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about its tokenizer.

    Args:
        model: "gpt2" or "llama".
        pre: Name of the pre-tokenizer.
        tokens: Every row of the embedding has one.
        types: gguf.TokenType of each.
        merges: "left right", best first ("gpt2").
        scores: Of each token ("llama").
        add_space_prefix: Whether text begins with a space that nobody wrote ("llama").
        special: Ids by name: bos, eos, eot, unk, pad.
        add_bos: Whether prompts begin with BOS, as they did in training.
        chat_template: Jinja text.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list, repr=False)
    scores: list[float] = field(default_factory=list, repr=False)
    add_space_prefix: bool | None = None
    special: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool = False
    chat_template: str | None = None

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Put it into the metadata of `writer`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        for name, index in self.special.items():
            getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(False)  # noqa: FBT003  (the name is in the method's)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def make_vocabulary(
    tokenizer: PreTrainedTokenizerBase, num_rows: int, config_bos: int | None = None
) -> Vocabulary:
    """Describe a tokenizer for llama.cpp.

    Args:
        tokenizer: A fast tokenizer, with the chat template that was trained with.
        num_rows: Rows of the embedding.
        config_bos: The model's bos_token_id, for tokenizers that have none.

    Raises:
        CheckpointError: llama.cpp cannot do what this tokenizer does, or it has more tokens than
            the model has rows.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise CheckpointError(
            f"the tokenizer is of the kind {model['type']}; GGUF export knows BPE, byte-level or "
            "with byte tokens",
            hint="use the merged folder with transformers or vLLM",
        )
    tokens = _tokens(tokenizer, num_rows)
    is_byte_level = not model.get("byte_fallback")
    common: dict[str, Any] = {
        "types": _types(tokenizer, tokens, has_byte_tokens=not is_byte_level),
        "special": _special_ids(tokenizer, config_bos, num_rows),
        "add_bos": _begins_with_bos(tokenizer),
        "chat_template": served_template(tokenizer),
    }
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if is_byte_level:
        if not merges:
            raise CheckpointError("the tokenizer has no merges, which llama.cpp needs")
        _check_normalizer(backend.get("normalizer"))
        pre = find_pre_tokenizer(backend).name
        return Vocabulary("gpt2", pre, tokens, merges=merges, **common)
    prefix = _space_prefix(backend)
    user_defined = {
        index for index, kind in enumerate(common["types"]) if kind == gguf.TokenType.USER_DEFINED
    }
    tokens = [
        token.replace(SPACE, " ") if index in user_defined else token
        for index, token in enumerate(tokens)
    ]
    scores = _scores(tokens, merges)
    return Vocabulary("llama", "default", tokens, scores=scores, add_space_prefix=prefix, **common)


def served_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template without transformers' own `generation` tags, if there is one.

    `if true` in their place keeps every tag's whitespace control as it is.
    """
    if not tokenizer.chat_template:
        return None

    def replace(match: re.Match[str]) -> str:
        left, end, right = match.groups()
        return f"{{%{left} {'endif' if end else 'if true'} {right}%}}"

    return _GENERATION.sub(replace, str(tokenizer.get_chat_template()))


def model_name(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the file calls its model.

    Phi-3's special tokens swallow the space behind them; llama.cpp does that where the name says
    that it is a Phi-3.
    """
    strips = any(
        token.special and token.rstrip for token in tokenizer.added_tokens_decoder.values()
    )
    if strips:
        return f"{name} (phi-3)"
    for part in STRIPPING_NAMES:
        name = re.sub(re.escape(part), part.replace("3", "_3"), name, flags=re.IGNORECASE)
    return name


def _tokens(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> list[str]:
    """Return the token of each row; rows that no token uses get a name of their own."""
    by_index = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(by_index) >= num_rows:
        raise CheckpointError(
            f"the tokenizer has a token {max(by_index)} ({by_index[max(by_index)]!r}), and the "
            f"model has {num_rows} rows of embeddings",
            hint="take the tokenizer that belongs to this model",
        )
    return [by_index.get(index, f"[PAD{index}]") for index in range(num_rows)]


def _types(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], *, has_byte_tokens: bool
) -> list[int]:
    added = tokenizer.added_tokens_decoder
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)

    def kind(index: int, token: str) -> gguf.TokenType:
        if token not in vocabulary:
            return gguf.TokenType.UNUSED
        if has_byte_tokens and token == tokenizer.unk_token:
            return gguf.TokenType.UNKNOWN
        if index in special or (index in added and added[index].special):
            return gguf.TokenType.CONTROL
        if index in added:
            return gguf.TokenType.USER_DEFINED
        if has_byte_tokens and _BYTE.fullmatch(token):
            return gguf.TokenType.BYTE
        return gguf.TokenType.NORMAL

    return [int(kind(index, token)) for index, token in enumerate(tokens)]


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """Return the score of each token: minus the rank of the first merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _special_ids(
    tokenizer: PreTrainedTokenizerBase, config_bos: int | None, num_rows: int
) -> dict[str, int]:
    """Return the ids of the special tokens that there are.

    llama.cpp takes token 11 (or 1) for a BOS that is not named, so one always is.
    """
    eos, eot = tokenizer.eos_token_id, end_of_turn_id(tokenizer)
    bos = next(
        (index for index in (tokenizer.bos_token_id, config_bos, eos) if index is not None), None
    )
    found = {
        "bos": bos,
        "eos": eot if eos is None else eos,
        "eot": eot,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return {name: index for name, index in found.items() if index is not None and index < num_rows}


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether what the model was asked began with BOS: by its template, else by its tokenizer."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    if not tokenizer.chat_template:
        return bool(tokenizer("a")["input_ids"][:1] == [bos])
    text = rendered(tokenizer, [{"role": "user", "content": "?"}], add_generation_prompt=True)
    return text.startswith(str(tokenizer.bos_token))


def _check_normalizer(settings: Mapping[str, Any] | None) -> None:
    """Refuse what changes text before it is tokenized; NFC leaves nearly all text as it is."""
    if settings is None or settings["type"] == "NFC":
        return
    parts = (
        settings.get("normalizers", [settings]) if settings["type"] == "Sequence" else [settings]
    )
    if any(part["type"] != "NFC" for part in parts):
        raise CheckpointError(
            f"the tokenizer normalizes text with {settings['type']}, which llama.cpp does not",
            hint="use the merged folder with transformers or vLLM",
        )


def _space_prefix(backend: Mapping[str, Any]) -> bool:
    """Return whether a SentencePiece-style tokenizer puts a space before text.

    Raises:
        CheckpointError: it does something else with text.
    """
    normalizer, pre_tokenizer = backend.get("normalizer"), backend.get("pre_tokenizer")
    parts = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    has_prefix, has_spaces, odd = False, False, []
    for part in [*parts, *([pre_tokenizer] if pre_tokenizer else [])]:
        if part["type"] == "Prepend" and part["prepend"] == SPACE:
            has_prefix = True
        elif part["type"] == "Replace" and part.get("content") == SPACE:
            has_spaces = True
        elif part["type"] == "Metaspace":
            has_prefix |= part.get("prepend_scheme", "always") != "never"
            has_spaces = True
        elif part["type"] != "Split":  # Gemma's, on spaces that are no longer there
            odd.append(part["type"])
    if odd or not has_spaces:
        raise CheckpointError(
            f"the tokenizer changes text by {', '.join(odd) or 'nothing'} before it joins tokens; "
            "llama.cpp writes spaces as U+2581 and does nothing else",
            hint="use the merged folder with transformers or vLLM",
        )
    return has_prefix
