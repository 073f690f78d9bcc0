"""Whether a GGUF file asks the model what training asked it, token for token.

For each conversation and each turn of the assistant, the tokens before the turn in training's own
row are compared with those that a server makes of the messages: with the template and the tokenizer
in the file. The tokens that end the turn in training must end generation there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from halfbyte.data.chat import IGNORE_INDEX, ChatEncoder, Encoded
from halfbyte.data.formats import Example
from halfbyte.data.notes import Note
from halfbyte.errors import DataError
from halfbyte.gguf.tokenizer import GgufTokenizer

_CONTEXT = 8  # tokens that are shown before and after the first difference
_SHOWN = 5


def _turns(*contents: str, system: str | None = None) -> Example:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    first = [] if system is None else [{"role": "system", "content": system}]
    return Example([*first, *messages])


# Where no data are given: digits, spaces, lines, scripts and quotes that tokenizers differ about.
_PROBES = (
    _turns("Hello, how are you?", "Fine."),
    _turns("What is 12345 + 678?", "13023", "And 3.14 * 2?", "It's 6.28."),
    _turns("def f(x):\n    return x  # twice\n\n\n\tdone", "ok\n", system="You're terse."),
    _turns("Größe, 北京, नमस्ते, 🙂 I'LL SHE'S 'tis", "ja"),
)


@dataclass(frozen=True)
class Difference:
    """Where two token sequences part.

    Args:
        where: Which conversation and turn.
        position: Index of the first token that differs.
        trained: What training has around it, as text with a bar between tokens.
        served: What the file makes of it.
    """

    where: str
    position: int
    trained: str
    served: str

    def __str__(self) -> str:
        return (
            f"{self.where}, token {self.position}:\n"
            f"  trained {self.trained!r}\n  served  {self.served!r}"
        )


@dataclass
class Parity:
    """What the comparison found.

    Args:
        prompts: Prompts (or documents) compared.
        differences: Those that differ.
        skipped: Conversations that could not be compared, by reason.
        is_sample: The conversations were made up here, not taken from the training data.
    """

    prompts: int = 0
    differences: list[Difference] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    is_sample: bool = False

    def skip(self, reason: str) -> None:
        """Count a conversation that cannot be compared."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def __str__(self) -> str:
        lines = [str(difference) for difference in self.differences[:_SHOWN]]
        if len(self.differences) > _SHOWN:
            lines.append(f"and {len(self.differences) - _SHOWN} more")
        return "\n".join(lines)


def check_parity(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example] = ()
) -> Parity:
    """Compare prompts made from a GGUF file with those of training.

    Args:
        path: The file.
        tokenizer: Training's, with its chat template.
        examples: Conversations or documents; without any, a few made-up ones.

    Raises:
        DataError: training could not have encoded an example.
        CheckpointError: the file has no tokenizer.
    """
    served = GgufTokenizer(path)
    encoder = ChatEncoder(tokenizer, None, loss_on="assistant")
    parity = Parity(is_sample=not examples)
    chosen = [(f"conversation {i + 1}", example) for i, example in enumerate(examples or _PROBES)]
    if not tokenizer.chat_template and not examples:
        text = "\n".join(m["content"] for example in _PROBES for m in example.messages)
        chosen = [("a document", Example([], text=text))]
    for where, example in chosen:
        if example.text is not None:
            _compare_document(served, encoder, example.text, where, parity)
        else:
            _compare_conversation(served, encoder, example, where, parity)
    return parity


def _compare_document(
    served: GgufTokenizer, encoder: ChatEncoder, text: str, where: str, parity: Parity
) -> None:
    ids = encoder.encode([(where, Example([], text=text))])[0][0].input_ids
    eos = encoder.tokenizer.eos_token_id
    trained = ids[:-1] if eos is not None and ids[-1:] == [eos] else ids
    _compare(served, trained, served.encode(text), where, parity)


def _compare_conversation(
    served: GgufTokenizer, encoder: ChatEncoder, example: Example, where: str, parity: Parity
) -> None:
    try:
        rows = encoder.encode([(where, example)])[0]
    except DataError:
        if not parity.is_sample:
            raise
        return  # the template has no place for one of our own, for example a system message
    turns = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
    spans = [(row, span) for row in rows for span in _learned(row)]
    if any(row.notes & Note.SPECIAL_TEXT for row in rows):
        parity.skip("a message spells a special token: training kept it as text, servers do not")
        return
    if len(spans) != len(turns):
        parity.skip("the assistant's turns cannot be told apart")
        return
    for turn, (row, (start, end)) in zip(turns, spans, strict=True):
        place = f"{where}, message {turn + 1}"
        try:
            found = served.prompt_ids(example.messages[:turn], example.tools)
        except DataError as error:
            parity.skip(f"the template makes no prompt before an answer: {error.message}")
            continue
        _compare(served, row.input_ids[:start], found, place, parity)
        stop = row.input_ids[end - 1]
        if stop not in served.stop_ids:
            trained, known = served.spell([stop]), served.spell(sorted(served.stop_ids))
            parity.differences.append(Difference(f"{place}, its end", end - 1, trained, known))


def _learned(row: Encoded) -> Iterator[tuple[int, int]]:
    """Yield [start, end) of each run of learned tokens."""
    start = None
    for index, label in enumerate([*row.labels, IGNORE_INDEX]):
        if label != IGNORE_INDEX and start is None:
            start = index
        elif label == IGNORE_INDEX and start is not None:
            yield start, index
            start = None


def _compare(
    served: GgufTokenizer, trained: list[int], found: list[int], where: str, parity: Parity
) -> None:
    parity.prompts += 1
    if trained == found:
        return
    pairs: Any = zip(trained, found, strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(trained), len(found)))
    around = slice(max(0, position - _CONTEXT), position + _CONTEXT)
    parity.differences.append(
        Difference(where, position, served.spell(trained[around]), served.spell(found[around]))
    )
