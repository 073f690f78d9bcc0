"""halfbyte chat: lines in, answers out."""


def test_a_conversation_on_a_run(run, trained):
    lines = "Hi\n/adapter off\n/reset\nHi\n/compare Hi\n/quit\n"
    more = ("--adapter", f"more={trained}")
    result = run("chat", trained, *more, "--max-new-tokens", 3, input=lines)
    assert result.exit_code == 0, result.output
    assert "  out\n  more\n* off\n" in result.stdout
    assert "base" in result.stdout
    assert "forgotten" in result.stdout


def test_without_a_template_it_says_so(run, make_base):
    base = make_base()
    (base / "chat_template.jinja").unlink()
    result = run("chat", base, "--max-new-tokens", 3, input="Hi\n")
    assert result.exit_code == 0
    assert "no chat template" in result.stderr
