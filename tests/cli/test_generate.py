"""halfbyte generate: one answer on stdout."""


def test_an_answer_is_printed(run, tiny_base):
    result = run("generate", tiny_base, "Hi", "--max-new-tokens", 4, "--temperature", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("\n")
    again = run("generate", tiny_base, "-", "--max-new-tokens", 4, "--temperature", 1, input="Hi")
    assert again.stdout == result.stdout


def test_raw_prompts_are_continued(run, tiny_base):
    chat = run("generate", tiny_base, "Hi", "--max-new-tokens", 8)
    raw = run("generate", tiny_base, "Hi", "--max-new-tokens", 8, "--raw")
    assert raw.exit_code == 0
    assert raw.stdout != chat.stdout


def test_wrong_settings_are_said_before_anything_is_loaded(run):
    result = run("generate", "./nowhere", "Hi", "--top-p", 2)
    assert result.exit_code == 2
    assert "top_p should be above 0" in result.stderr
    assert run("generate", "./nowhere", "Hi").exit_code == 2
