"""A fine-tuned model through OpenAI's client: whole, streamed, and several adapters at once.

    halfbyte serve demo --adapter tuned=out &
    pip install openai
    python examples/serve_client.py --model tuned

An API key, where the server wants one, is read from OPENAI_API_KEY.
"""

import argparse
import asyncio
import os

import openai

parser = argparse.ArgumentParser(description="Ask a server of halfbyte serve.")
parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
parser.add_argument("--model", help="a served name; by default the last one, an adapter if any")
parser.add_argument("--question", default="Tom has 3 apples and buys 4 more. How many has he?")
parser.add_argument("--max-tokens", type=int, default=64)


async def main() -> None:
    """Ask one model, then all of them at once."""
    arguments = parser.parse_args()
    key = os.environ.get("OPENAI_API_KEY", "none")
    client = openai.AsyncOpenAI(base_url=arguments.url, api_key=key)
    names = [model.id async for model in client.models.list()]
    messages = [{"role": "user", "content": arguments.question}]
    settings = {"messages": messages, "max_tokens": arguments.max_tokens, "temperature": 0}

    print(f"{arguments.model or names[-1]}: ", end="")
    stream = await client.chat.completions.create(
        model=arguments.model or names[-1], stream=True, **settings
    )
    async for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)

    print("\n\nall at once:")
    answers = await asyncio.gather(
        *(client.chat.completions.create(model=name, **settings) for name in names)
    )
    for name, answer in zip(names, answers, strict=True):
        print(f"{name} ({answer.usage.completion_tokens} tokens): "
              f"{answer.choices[0].message.content}")  # fmt: skip


if __name__ == "__main__":
    asyncio.run(main())
