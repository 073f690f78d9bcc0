"""halfbyte push: what a dry run says."""


def test_a_dry_run_lists_what_others_need(run, trained):
    (trained / ".env").write_text("SECRET=1")
    result = run("push", trained, "me/model", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "would upload to me/model" in result.stdout
    for name in ("adapter_model.safetensors", "README.md", "generation_config.json"):
        assert name in result.stdout.partition("left out")[0]
    assert ".env" in result.stdout.partition("left out")[2]
    assert "folder of this machine" in result.stdout
    result = run("push", trained, "a/b/c", "--dry-run")
    assert result.exit_code == 2
    assert "no name on the hub" in result.stderr
