"""The one command for all benchmarks, with cases that need neither a GPU nor minutes."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Return a function that imports a script of benchmarks/, which import each other by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.fixture
def run(load, monkeypatch):
    module = load("run")
    facts = {"date": "2026-01-02", "card": None, "cpu": "2 cores", "commit": "abc", "versions": {}}
    monkeypatch.setattr(module, "machine", lambda: dict(facts))
    return module


def script(folder: Path, name: str, source: str) -> str:
    (folder / name).write_text(source)
    return str(folder / name)


def test_failures_are_rows_and_a_second_run_goes_on(run, load, monkeypatch, tmp_path, capsys):
    case = load("cases").Case
    row = {"case": "2x64", "memory": "auto", "tokens_per_second": 1234, "peak_gib": 1.5}
    good = script(tmp_path, "good.py", f"print('words'); print({json.dumps(json.dumps(row))})")
    bad = script(tmp_path, "bad.py", "raise SystemExit('no memory left')")
    slow = script(tmp_path, "slow.py", "import time; time.sleep(60)")
    cases = (
        case(name="good", group="steps", command=good, needs=()),
        case(name="bad", group="steps", command=bad, needs=()),
        case(name="slow", group="steps", command=slow, needs=(), timeout_s=0.5),
        case(name="card", group="steps", command=good),
        case(name="absent", group="steps", command=good, needs=("no_such_module",)),
    )
    monkeypatch.setattr(run, "CASES", cases)
    out = tmp_path / "results.json"
    run.main(["--out", str(out)])
    found = json.loads(out.read_text())
    assert found["machine"]["commit"] == "abc"
    assert found["cases"]["good"]["rows"] == [row]
    assert found["cases"]["good"]["seconds"] > 0
    assert found["cases"]["bad"]["status"] == "failed with exit code 1"
    assert found["cases"]["bad"]["said"] == ["no memory left"]
    assert found["cases"]["slow"]["status"].startswith("ended after")
    assert found["cases"]["card"]["status"] == "skipped: needs a CUDA device"
    assert "no_such_module" in found["cases"]["absent"]["status"]
    table = out.with_suffix(".md").read_text()
    assert "| 2x64 | **1,234** (1.5 GiB) |" in table
    assert "- slow: ended after" in table
    capsys.readouterr()
    run.main(["--out", str(out), "--only", "good"])
    assert "good: done before" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no case and no group"):
        run.main(["--only", "god"])


def test_what_another_wrote_is_not_overwritten(run, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "CASES", ())
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit, match="give another --out"):
        run.main(["--out", str(tmp_path / "other.json")])


def test_every_case_is_a_script_that_is_there(load):
    cases = load("cases")
    for case in cases.CASES:
        assert (BENCHMARKS / case.command.split()[0]).is_file()
        assert case.group in cases.GROUPS
    assert load("run").card_folder("NVIDIA H100 80GB HBM3") == "h100"
    assert load("run").card_folder(None) == "cpu"


def test_the_table_goes_between_its_marks(load):
    replaced = load("table").replaced
    text = "a\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nz\n"
    assert replaced(text, "new\n") == text.replace("old", "new")
    with pytest.raises(SystemExit, match="expected"):
        replaced("nothing", "new\n")


def test_a_profile_is_told_by_kinds_against_their_limits(load):
    profile = load("step_profile")
    model = profile.Model()
    assert model.linear_parameters == 6_979_321_856  # Llama-3-8B without embeddings and head
    assert model.adapter_parameters == 41_943_040
    kernels = [
        {"kernel": "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "ms": 300.0},
        {"kernel": "nvjet_sm90_tst_16x64_64x16_1x2_h_bz_TNN", "ms": 4.0},
        {"kernel": "_gated_backward_kernel", "ms": 20.0},
        {"kernel": "_rms_norm_backward_kernel", "ms": 6.0},
        {"kernel": "_rope_kernel", "ms": 2.0},
    ]
    found = profile.analysis(kernels, 400.0, profile.work(model, 4, 2048), profile.RATES)
    shares = {row["kind"]: row["percent"] for row in found["kinds"]}
    assert shares == {
        "products": 75.0, "SwiGLU": 5.0, "RMSNorm": 1.5, "LoRA's own products": 1.0, "RoPE": 0.5,
    }  # fmt: skip
    assert found["no_kernel_ms"] == 68.0
    assert found["floor_ms"] == pytest.approx(373, abs=1)
    assert "| SwiGLU | 20.0 | 5.0 % |" in profile.table(found)
    exact, eight = (profile.work(model, 4, 2048, compute) for compute in ("bf16", "fp8"))
    saved = exact["products"][0] - eight["products"][0]
    assert saved == 2 * 8192 * model.linear_parameters
    assert (exact["to eight bits"][1], eight["to eight bits"][1]) == (0, 3 * 8192 * 32 * 69632)
    assert profile.kind_of("_quantize_rows_kernel") == "to eight bits"


def test_eight_bits_are_told_apart(load):
    contestant = load("table").contestant
    assert contestant({"memory": "auto", "compute": "bf16"}) == "Halfbyte, auto"
    assert contestant({"memory": "auto", "compute": "fp8"}) == "Halfbyte, auto, fp8"
    losses = {"halfbyte, auto": [3.0, 1.0], "halfbyte, fp8": [3.0, 1.5], "peer, sdpa": [2.0, 1.0]}
    found = load("loss_curve").differences(losses)
    assert found["halfbyte, fp8"] == {"max": 1.0, "mean": 0.75, "last": 0.5}
    assert found["halfbyte, fp8, from bf16"] == {"max": 0.5, "mean": 0.25, "last": 0.5}


def test_our_losses_are_those_of_the_peer_on_a_tiny_model(load, capsys):
    pytest.importorskip("bitsandbytes")
    curve = load("loss_curve")
    curve.main(["--shape", "tiny", "--device", "cpu", "--steps", "3"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["same_codes"]
    assert line["differences"]["halfbyte, auto"]["max"] < 0.02
    assert line["losses"]["halfbyte, auto"][2] < line["losses"]["halfbyte, auto"][0]
    assert curve.drawing(line["losses"]).count("<polyline") == 4
