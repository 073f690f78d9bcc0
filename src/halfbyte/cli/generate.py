"""halfbyte generate: one answer to one prompt."""

import sys
from typing import Annotated

import typer

from halfbyte.cli.opening import Adapter, Device, Model, Quant

MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token every time.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens that add up to this.")]
TopK = Annotated[int, typer.Option(help="Keep so many of the likeliest tokens; 0 keeps all.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: repeat less.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text.")]
System = Annotated[str | None, typer.Option(help="System message.")]


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to say; - reads it from stdin.")],
    adapter: Adapter = None,
    quant: Quant = "auto",
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue PROMPT.")] = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Print MODEL's answer to PROMPT as it comes.

    Models with a chat template get PROMPT as a user's message; others continue it.
    """
    from halfbyte.cli.display import quieten

    quieten()
    from halfbyte.cli.opening import open_model
    from halfbyte.generate.decoding import Decoding
    from halfbyte.generate.generate import generate as generate_text
    from halfbyte.generate.sampling import Sampling

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    loaded, tokenizer = open_model(model, adapter, quant, device)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    is_chat = tokenizer.chat_template and not raw
    generate_text(
        loaded,
        tokenizer,
        messages if is_chat else text,
        stream=write,
        sampling=sampling,
        decoding=Decoding(tell=say_why_slow),
    )
    print()


def say_why_slow(reason: str) -> None:
    """Say why a GPU's answers do not come from the fused decoder."""
    print(f"note: transformers generates, which is slower: {reason}", file=sys.stderr)


def write(piece: str) -> None:
    """Show a piece of text at once."""
    print(piece, end="", flush=True)
