"""The model card says what was trained, on what, and what came of it."""

import json

import pytest
from huggingface_hub import ModelCard

from halfbyte.train.card import MARK, make_card, write_card

RECORD = {
    "status": "finished",
    "base_model": "org/base",
    "quantization": {"bnb_4bit_quant_type": "nf4"},
    "data": {
        "fingerprint": "f00d",
        "summary": {
            "train": {"rows": 1234, "total_tokens": 56789, "supervised_tokens": 999},
            "eval": None,
        },
    },
    "settings": {"learning_rate": 2e-4, "seed": 42},
    "result": {"loss": 1.25},
    "versions": {"halfbyte": "0.1.0"},
}


def make_run(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({**RECORD, **changes}))
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "target_modules": ["q_proj"]}))
    events = [{"event": "evaluation", "step": 0, "loss": 3.0}]
    events += [{"event": "step", "step": i, "loss": 3.0 / i} for i in range(1, 201)]
    events += [{"event": "evaluation", "step": 200, "loss": 1.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_the_hub_reads_its_metadata(tmp_path):
    path = write_card(make_run(tmp_path / "mine"))
    data = ModelCard.load(path).data
    assert data.base_model == "org/base"
    assert data.library_name == "peft"
    assert data.base_model_relation == "adapter"
    assert "halfbyte" in data.tags


def test_it_holds_scores_data_settings_and_the_curve(tmp_path):
    run = make_run(tmp_path / "mine")
    for when, score in (("before", 0.25), ("after", 0.75)):
        (run / f"evaluation_{when}.json").write_text(json.dumps({"exact_match": score}))
    text = make_card(run)
    assert "QLoRA (nf4, rank 8)" in text
    assert "| held-out loss | 3 | 1.5 |" in text
    assert "| exact match | 0.25 | 0.75 |" in text
    assert "1,234 rows, 56,789 tokens, 999 learned" in text
    assert "`f00d`" in text
    assert "| `learning_rate` | 0.0002 |" in text
    chart = text.partition("```mermaid")[2].partition("```")[0]
    places = chart.partition("[")[2].partition("]")[0].split(", ")
    assert places[0] == "1"
    assert places[-1] == "200"
    assert len(places) <= 41


def test_a_local_base_is_named_without_its_path_and_with_its_licence(tmp_path):
    base = tmp_path / "secret-place" / "base"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    text = make_card(make_run(tmp_path / "mine", base_model=str(base)))
    assert "secret-place" not in text
    assert "Licence of the base: mit" in text
    assert ModelCard(text).data.license == "mit"


@pytest.mark.parametrize("card", ["No metadata.", "---\nlicense: [mit]\n---\n", "---\na: [\n---\n"])
def test_a_bases_card_may_be_anything(tmp_path, card, caplog):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(card)
    with caplog.at_level("WARNING"):
        text = make_card(make_run(tmp_path / "mine", base_model=str(base)))
    assert "Licence of the base: see there" in text
    assert not caplog.records


def test_a_base_without_a_name_has_no_licence_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert "mit" not in make_card(make_run(tmp_path / "mine", base_model=""))


def test_a_merged_model_says_what_its_merge_said(tmp_path):
    run = make_run(tmp_path / "mine")
    path = write_card(run, tmp_path, merged=["Merged onto the base."], name="out")
    text = path.read_text()
    assert "Merged onto the base." in text
    assert "# out" in text
    assert ModelCard.load(path).data.library_name == "transformers"


def test_somebodys_own_card_is_left_alone(tmp_path):
    run = make_run(tmp_path / "mine")
    write_card(run)
    assert write_card(run) is not None
    own = (run / "README.md").read_text().replace(MARK, "") + "My words."
    (run / "README.md").write_text(own)
    assert write_card(run) is None
    assert (run / "README.md").read_text() == own


def test_an_adapter_that_nobody_described_has_a_card(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "base_model_name_or_path": "org/b"}')
    assert "LoRA (rank 4) on org/b" in make_card(tmp_path)
