"""halfbyte export: from a run's folder to a GGUF file whose prompts are training's."""

import gguf
import pytest

from halfbyte.gguf.tokenizer import GgufTokenizer


def test_a_run_becomes_files(run, run_on, tmp_path, data):
    demo_run = run_on("demo")
    result = run("export", demo_run, "m.gguf", "--type", "q8_0", "--onto", "auto")
    assert result.exit_code == 0, result.output
    assert "nearer to what was trained, with a KL divergence" in result.stdout
    assert "16 of 16 (the data's) as in training" in result.stdout
    assert "36 Q8_0" in result.stdout
    modelfile = (tmp_path / "m.Modelfile").read_text()
    assert modelfile.startswith("FROM ./m.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    assert GgufTokenizer(tmp_path / "m.gguf").stop_ids == {2, 4}
    again = run("export", demo_run, "m.gguf")
    assert again.exit_code == 2
    assert "already exists" in again.stderr

    result = run("export", demo_run, "a.gguf", "--adapter-only")
    assert result.exit_code == 0, result.output
    assert "--base-only" in result.stdout
    assert "ADAPTER ./a.gguf" in (tmp_path / "a.Modelfile").read_text()
    data.unlink()
    result = run("export", demo_run, "base.gguf", "--base-only", "--no-modelfile")
    assert result.exit_code == 0, result.output
    assert "rows cannot be read" in result.stdout
    assert "5 of 5 (made-up ones)" in result.stdout
    assert not (tmp_path / "base.Modelfile").exists()
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    base = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "base.gguf").tensors}
    assert {name.rpartition(".lora_")[0] for name in names} < base


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--type", "q2_k"], "type should be one of"),
        (["--onto", "both"], "onto should be"),
        (["--adapter-only", "--base-only"], "exclude each other"),
        (["--data", "./nowhere.jsonl"], "nowhere"),
    ],
)
def test_wrong_arguments_leave_nothing(run, tmp_path, arguments, message):
    result = run("export", "demo", "m.gguf", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not list(tmp_path.glob("*.gguf"))
