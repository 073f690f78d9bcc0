"""A merge that was interrupted goes on with what it had written, if that is still right."""

import pytest

from halfbyte.export import merge as merge_module
from halfbyte.export.merge import merge


@pytest.fixture
def interrupted(monkeypatch):
    """Return a function that merges until all weights are written, and is stopped there."""

    def stop(*arguments, **settings):
        def interrupt(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("halfbyte.export.merge.copy_companions", interrupt)
            with pytest.raises(KeyboardInterrupt):
                merge(*arguments, **settings)

    return stop


def made_tensors(monkeypatch):
    """Return a list that grows with the names of tensors that are merged from now on."""
    names, write = [], merge_module._write

    def spy(writer, merged):
        names.append(merged.name)
        write(writer, merged)

    monkeypatch.setattr(merge_module, "_write", spy)
    return names


def test_what_an_interrupted_merge_wrote_is_kept(
    tiny_base, make_adapter, tmp_path, interrupted, monkeypatch
):
    folder, _ = make_adapter(tiny_base)
    whole = merge(folder, tmp_path / "whole", max_shard_size="50KB")
    interrupted(folder, tmp_path / "merged", max_shard_size="50KB")
    assert not (tmp_path / "merged").exists()
    names = made_tensors(monkeypatch)
    result = merge(folder, tmp_path / "merged", max_shard_size="50KB")
    assert names == []
    assert result.rounding == whole.rounding
    named = {"README.md", "manifest.json"}  # the model card has the folder's name
    for path in [p for p in (tmp_path / "whole").iterdir() if p.name not in named]:
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("change", ["adapter", "base", "dtype", "onto"])
def test_what_was_written_for_another_merge_is_not_kept(
    make_base, make_adapter, tmp_path, interrupted, monkeypatch, change
):
    base = make_base()
    folder, _ = make_adapter(base)
    interrupted(folder, tmp_path / "merged")
    settings = {}
    if change == "adapter":
        path = folder / "adapter_config.json"
        path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    elif change == "base":
        path = base / "model.safetensors"
        path.write_bytes(path.read_bytes())
    else:
        settings = {"dtype": {"dtype": "float16"}, "onto": {"onto": "original"}}[change]
    names = made_tensors(monkeypatch)
    result = merge(folder, tmp_path / "merged", **settings)
    assert len(names) == result.tensors == 21
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
