"""halfbyte demo hands over to the demo."""

import halfbyte.demo.run as demo


def test_it_runs_where_it_is_told(run, monkeypatch):
    called = []
    monkeypatch.setattr(demo, "run_demo", lambda output_dir: called.append(output_dir))
    assert run("demo").exit_code == 0
    assert run("demo", "elsewhere").exit_code == 0
    assert called == ["runs/demo", "elsewhere"]
