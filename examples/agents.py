"""Two workers behind a small agent: a fine-tuned model for what it knows, a planner beside it.

The planner cuts a task into questions, the solver (the fine-tuned adapter) answers each, and the
planner puts the answers together. Each worker is a URL and a model, so either can be any server
that speaks OpenAI's interface; here both are `halfbyte serve`, the base and an adapter on it:

    halfbyte serve demo --adapter solver=out &
    python examples/agents.py "Add 3 and 4. Then add 10 and 5." --solver solver

    --planner-url https://api.openai.com/v1 --planner gpt-4.1    another planner, say
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass

import openai

PLAN = "Write the questions that must be answered for this task, one a line, and nothing else."
SUM_UP = "Answer the task in one sentence, from these answers."
MAX_QUESTIONS = 8


@dataclass
class Worker:
    """A model at an address, with a way to talk to it.

    Args:
        url: Of an OpenAI-compatible server.
        model: A name that it serves.
        system: What the worker is told before every question; "" for a model that was tuned
            without a system message.
    """

    url: str
    model: str
    system: str = ""

    def ask(self, text: str) -> str:
        """Return the worker's answer."""
        key = os.environ.get("OPENAI_API_KEY", "none")
        client = openai.OpenAI(base_url=self.url, api_key=key)
        system = [{"role": "system", "content": self.system}] if self.system else []
        answer = client.chat.completions.create(
            model=self.model,
            messages=[*system, {"role": "user", "content": text}],
            temperature=0,
            max_tokens=128,
        )
        return (answer.choices[0].message.content or "").strip()


def plan(planner: Worker, task: str) -> list[str]:
    """Return the questions that the planner makes of a task; the task itself if it makes none."""
    lines = [line.strip(" -*0123456789.") for line in planner.ask(f"{PLAN}\n\n{task}").splitlines()]
    return [line for line in lines if line.endswith("?")][:MAX_QUESTIONS] or [
        f"{part.strip()}." for part in task.split(".") if part.strip()
    ]


def run(planner: Worker, solver: Worker, task: str, say: Callable[[str], None] = print) -> str:
    """Return the answer to a task, and tell each step."""
    solved = []
    for question in plan(planner, task):
        answer = solver.ask(question)
        say(f"{solver.model}: {question} -> {answer}")
        solved.append(f"{question} {answer}")
    result = planner.ask("\n".join([SUM_UP, f"Task: {task}", *solved]))
    say(f"{planner.model}: {result}")
    return result


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Solve a task with two workers.")
    parser.add_argument("task")
    parser.add_argument("--solver-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--solver", required=True, help="the fine-tuned model's name")
    parser.add_argument("--planner-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--planner", default="demo")
    arguments = parser.parse_args()
    planner = Worker(arguments.planner_url, arguments.planner)
    run(planner, Worker(arguments.solver_url, arguments.solver), arguments.task)


if __name__ == "__main__":
    main()
