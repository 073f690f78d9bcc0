"""A conversation in the terminal: what was said, commands, and answers as they come.

    /system TEXT      set (or, without text, remove) the system message, and start again
    /adapter on|off   answer with the adapter, or with the base alone
    /reset            forget what was said
    /save PATH        write the conversation as a line of JSON, ready to train on
    /help             this list
    /quit             leave (or Ctrl-D)

Reading and writing are functions of the caller, so the loop runs without a terminal too.
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.errors import HalfbyteError
from halfbyte.generate.generate import generate
from halfbyte.generate.prompts import Message, Prompt
from halfbyte.generate.sampling import Sampling

HELP = (__doc__ or "").split("\n\n")[1]
Write = Callable[[str], None]


@dataclass
class Conversation:
    """A model, what was said so far, and how it answers.

    Args:
        model: A model that `load` returned, with or without an adapter.
        tokenizer: Its tokenizer; without a chat template every line is a prompt of its own.
        sampling: How tokens are chosen.
        system: The system message.
        messages: Turns so far, without the system message.
        uses_adapter: Whether the adapter takes part, where there is one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    uses_adapter: bool = True

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
        self.messages.append({"role": "user", "content": text})
        prompt: Prompt = self.prompt if self.tokenizer.chat_template else text
        pieces: list[str] = []

        def collect(piece: str) -> None:
            pieces.append(piece)
            stream(piece)

        try:
            with self._chosen_adapter(), contextlib.suppress(KeyboardInterrupt):
                generate(self.model, self.tokenizer, prompt, stream=collect, sampling=self.sampling)
        except HalfbyteError:
            self.messages.pop()
            raise
        reply = "".join(pieces)
        self.messages.append({"role": "assistant", "content": reply})
        return reply

    def _chosen_adapter(self) -> contextlib.AbstractContextManager[None]:
        if isinstance(self.model, PeftModel) and not self.uses_adapter:
            return self.model.disable_adapter()
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
        if not isinstance(self.model, PeftModel):
            return "there is no adapter: start with --adapter"
        if choice not in ("on", "off"):
            return f"the adapter is {'on' if self.uses_adapter else 'off'}; /adapter on or off"
        self.uses_adapter = choice == "on"
        return f"the adapter is {choice}"


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
