"""halfbyte chat: a conversation in the terminal."""

import sys

from halfbyte.cli.generate import (
    MaxNewTokens,
    RepetitionPenalty,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
    say_why_slow,
    write,
)
from halfbyte.cli.opening import Adapters, Device, Model, Quant


def chat(
    model: Model,
    adapter: Adapters = None,
    quant: Quant = "auto",
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Talk to MODEL. /help lists what else can be typed; Ctrl-C stops an answer, Ctrl-D ends."""
    from halfbyte.cli.display import quieten

    quieten()
    from halfbyte.cli.opening import named_adapters, open_adapters, open_base
    from halfbyte.generate.chat import Conversation, run_chat
    from halfbyte.generate.decoding import Decoding
    from halfbyte.generate.dense import dense_weights
    from halfbyte.generate.sampling import Sampling

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    base, tokenizer, adapters = open_base(model, named_adapters(adapter), quant, device)
    loaded, tokenizers = open_adapters(base, adapters)
    if not any(each.chat_template for each in (tokenizer, *tokenizers.values())):
        print("note: no chat template; every line is continued on its own", file=sys.stderr)
    mark = "> " if sys.stdin.isatty() else ""
    conversation = Conversation(
        loaded,
        tokenizer,
        sampling,
        system,
        tokenizers=tokenizers,
        decoding=Decoding(tell=say_why_slow),
    )
    with dense_weights(loaded):  # once for the whole conversation
        run_chat(conversation, lambda: input(mark), write)
