"""The examples run against a real server: the client, and the agent with a tuned worker."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def agents():
    return load("agents")


def test_the_client_asks_one_and_then_all(served, alone, monkeypatch, capsys):
    import asyncio

    client = load("serve_client")
    question = "What is 2 plus 2?"
    arguments = ["--url", f"{served.url}/v1", "--model", "red", "--question", question]
    monkeypatch.setattr("sys.argv", ["serve_client.py", *arguments, "--max-tokens", "24"])
    asyncio.run(client.main())
    shown = capsys.readouterr().out
    for name in ("base", "red", "green", "blue"):
        assert alone(name, [{"role": "user", "content": question}]) in shown
        assert f"{name} (" in shown
    assert shown.startswith("red: ")


def test_the_agent_gives_its_questions_to_the_tuned_worker(served, alone, agents):
    planner = agents.Worker(f"{served.url}/v1", "base")
    solver = agents.Worker(f"{served.url}/v1", "green")
    said = []
    result = agents.run(planner, solver, "Add 3 and 4. Then add 10 and 5.", said.append)
    assert len(said) > 1
    *steps, last = said
    for step in steps:
        question, _, answer = step.removeprefix("green: ").partition(" -> ")
        prompt = [{"role": "user", "content": question}]
        assert answer == alone("green", prompt, 128).strip()
    assert last == f"base: {result}"


def test_a_plan_is_the_planners_questions_or_the_tasks_sentences(agents, monkeypatch):
    planner = agents.Worker("http://nowhere", "m")
    monkeypatch.setattr(agents.Worker, "ask", lambda self, text: "1. What is a?\n- Why?\nDone.")
    assert agents.plan(planner, "A task.") == ["What is a?", "Why?"]
    monkeypatch.setattr(agents.Worker, "ask", lambda self, text: "I will not.")
    assert agents.plan(planner, "Add 1. Add 2.") == ["Add 1.", "Add 2."]
