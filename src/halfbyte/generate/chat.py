"""A conversation in the terminal: what was said, commands, and answers as they come.

    /system TEXT      set (or, without text, remove) the system message, and start again
    /adapter NAME     answer with this adapter; off: with the base alone; list: which there are
    /compare TEXT     the base's answer and every adapter's side by side; nothing is remembered
    /reset            forget what was said
    /save PATH        write the conversation as a line of JSON, ready to train on
    /help             this list
    /quit             leave (or Ctrl-D)

Reading and writing are functions of the caller, so the loop runs without a terminal too.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftModel
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.errors import HalfbyteError
from halfbyte.generate.decoding import Decoding
from halfbyte.generate.generate import generate
from halfbyte.generate.prompts import Message, Prompt
from halfbyte.generate.sampling import Sampling

HELP = (__doc__ or "").split("\n\n")[1]
Write = Callable[[str], None]


@dataclass
class Conversation:
    """A model, what was said so far, and how it answers.

    Args:
        model: A model that `load` returned, with any number of adapters or none.
        tokenizer: Its tokenizer; without a chat template every line is a prompt of its own.
        sampling: How tokens are chosen.
        system: The system message.
        messages: Turns so far, without the system message.
        tokenizers: Those of adapters that have their own, by the adapter's name.
        adapter: Which adapter answers, None for the base alone; at first the active one.
        decoding: Where answers come from.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    tokenizers: Mapping[str, PreTrainedTokenizerBase] = field(default_factory=dict)
    adapter: str | None = None
    decoding: Decoding = field(default_factory=Decoding)

    def __post_init__(self) -> None:
        if self.adapter is None and isinstance(self.model, PeftModel):
            self.adapter = self.model.active_adapter

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters."""
        return list(self.model.peft_config) if isinstance(self.model, PeftModel) else []

    @property
    def prompt(self) -> list[Message]:
        """The system message and all turns."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    def answer(self, text: str, stream: Write) -> str:
        """Return the model's answer to a line; it is streamed, and both are remembered.

        An answer that Ctrl-C stops is kept as far as it came.

        Raises:
            HalfbyteError: the line cannot be answered; the conversation is as it was.
        """
        reply = self._reply(text, self.adapter, stream)
        self.messages.append({"role": "user", "content": text})
        self.messages.append({"role": "assistant", "content": reply})
        return reply

    def compare(self, text: str, *, width: int) -> str:
        """Return a table of what the base and every adapter answer to a line.

        Nothing is remembered: each answers to the conversation as it is.

        Args:
            text: The line.
            width: Of the table, in letters.

        Raises:
            HalfbyteError: the line cannot be answered.
        """
        table = Table(*["base", *self.adapters], box=SIMPLE, expand=True)
        answers = [self._reply(text, name, lambda _: None) for name in (None, *self.adapters)]
        table.add_row(*[Text(answer) for answer in answers])
        shown = io.StringIO()
        Console(file=shown, width=width).print(table)
        lines = (line.rstrip() for line in shown.getvalue().splitlines())
        return "\n".join(line for line in lines if line)

    def _reply(self, text: str, adapter: str | None, stream: Write) -> str:
        """Return an adapter's answer to a line, or the base's."""
        tokenizer = self.tokenizers.get(adapter or "", self.tokenizer)
        turn: Message = {"role": "user", "content": text}
        prompt: Prompt = [*self.prompt, turn] if tokenizer.chat_template else text
        pieces: list[str] = []

        def collect(piece: str) -> None:
            pieces.append(piece)
            stream(piece)

        with self._use(adapter), contextlib.suppress(KeyboardInterrupt):
            generate(
                self.model, tokenizer, prompt,
                stream=collect, sampling=self.sampling, decoding=self.decoding,
            )  # fmt: skip
        return "".join(pieces)

    def _use(self, adapter: str | None) -> contextlib.AbstractContextManager[None]:
        if not isinstance(self.model, PeftModel):
            return contextlib.nullcontext()
        if adapter is None:
            return self.model.disable_adapter()
        self.model.set_adapter(adapter)
        return contextlib.nullcontext()

    def command(self, line: str) -> str:
        """Carry out a line that begins with a slash; return what to say about it."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name == "/help":
            return HELP
        if name == "/reset":
            self.messages.clear()
            return "what was said is forgotten"
        if name == "/system":
            self.system = rest or None
            self.messages.clear()
            return f"system message: {self.system or '(none)'}; what was said is forgotten"
        if name == "/save":
            return self._save(rest)
        if name == "/adapter":
            return self._switch(rest)
        if name == "/compare":
            return self._compare(rest)
        return f"there is no command {name}; /help lists them"

    def _save(self, path: str) -> str:
        if not path:
            return "say where: /save PATH"
        try:
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.prompt}, ensure_ascii=False) + "\n")
        except OSError as error:
            return f"{path} cannot be written: {error.strerror}"
        return f"added to {path}"

    def _switch(self, choice: str) -> str:
        names = self.adapters
        if not names:
            return "there is no adapter: start with --adapter"
        if choice == "off":
            self.adapter = None
        elif choice in names:
            self.adapter = choice
        elif choice == "on" and len(names) == 1:
            self.adapter = names[0]
        elif choice not in ("", "list"):
            return f"there is no adapter {choice}; there are: {', '.join(names)}"
        marks = [f"* {name}" if name == self.adapter else f"  {name}" for name in names]
        return "\n".join([*marks, "  off" if self.adapter else "* off"])

    def _compare(self, text: str) -> str:
        if not self.adapters:
            return "there is no adapter: start with --adapter"
        if not text:
            return "say what to answer: /compare TEXT"
        try:
            return self.compare(text, width=shutil.get_terminal_size().columns)
        except HalfbyteError as error:
            return str(error)


def run_chat(conversation: Conversation, read: Callable[[], str], write: Write) -> None:
    """Read lines and answer them until /quit or the end of input.

    Args:
        conversation: Who answers.
        read: Returns the next line; raises EOFError at the end.
        write: Takes pieces of text to show.
    """
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        if line == "/quit":
            return
        if line.startswith("/"):
            write(conversation.command(line) + "\n")
        elif line:
            try:
                conversation.answer(line, write)
            except HalfbyteError as error:
                write(str(error))
            write("\n")
