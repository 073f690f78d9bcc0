"""Names come and go; what does not fit is refused and leaves all as it was."""

import json
import shutil

import pytest

from halfbyte.errors import AdapterError, ConfigError
from halfbyte.serve.catalog import UnknownModelError


@pytest.fixture
def catalog(service):
    return service.catalog


def names(catalog):
    return [model.name for model in catalog.names()]


def test_names_and_what_they_mean(catalog):
    assert names(catalog) == ["base", "red", "green", "blue"]
    red = catalog.hold("red")
    red.let_go()
    assert red.slot
    assert red.parent == "base"
    with pytest.raises(UnknownModelError, match="'nobody' does not exist"):
        catalog.hold("nobody")


def test_a_slot_is_used_again_only_after_its_last_answer(catalog, adapters, wait_until):
    held = catalog.hold("red")
    catalog.load("red", adapters["green"], replace=True)
    swapped = catalog.hold("red")
    assert swapped.slot != held.slot
    catalog.load("more", adapters["blue"])
    more = catalog.hold("more")
    assert more.slot not in (held.slot, swapped.slot)
    held.let_go()
    more.let_go()
    swapped.let_go()
    catalog.unload("more")
    catalog.load("red", adapters["red"], replace=True)
    assert names(catalog) == ["base", "red", "green", "blue"]


@pytest.mark.parametrize(
    ("name", "error"), [("base", ConfigError), ("", ConfigError), ("red", AdapterError)]
)
def test_taken_names_are_refused(catalog, adapters, name, error):
    with pytest.raises(error):
        catalog.load(name, adapters["red"])


def test_the_base_stays(catalog):
    with pytest.raises(ConfigError, match="base"):
        catalog.unload("base")
    with pytest.raises(UnknownModelError):
        catalog.unload("nobody")


def test_an_adapter_of_another_base_is_refused(catalog, adapters, tmp_path):
    folder = shutil.copytree(adapters["red"], tmp_path / "other")
    path = folder / "halfbyte.json"
    identity = json.loads(path.read_text())
    identity["base"]["fingerprint"]["kept"] = "0" * 64
    path.write_text(json.dumps(identity))
    with pytest.raises(AdapterError, match="another base"):
        catalog.load("other", folder)
    assert "other" not in names(catalog)


def test_an_adapters_own_template_is_used(catalog, adapters, tmp_path):
    folder = shutil.copytree(adapters["red"], tmp_path / "own")
    tokenizer = catalog.names()[0].tokenizer
    template, tokenizer.chat_template = tokenizer.chat_template, "{{ messages[0].content }}!"
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = template
    own = catalog.load("own", folder).tokenizer
    catalog.unload("own")
    messages = [{"role": "user", "content": "Hi"}]
    assert own.apply_chat_template(messages, tokenize=False) == "Hi!"
    assert catalog.names()[0].tokenizer.chat_template == template
