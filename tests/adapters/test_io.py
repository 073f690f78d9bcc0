import json

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from halfbyte.adapters.inject import LoraConfig, add_lora
from halfbyte.adapters.io import load_adapter, save_adapter, write_adapter
from halfbyte.checkpoint.publish import verify
from halfbyte.errors import AdapterError, CheckpointError

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def trained(load, randomize):
    """A 4-bit model with an adapter that does something."""

    def make(kind="nf4", seed=0, **fields):
        fields = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | fields
        return randomize(add_lora(load(kind), **fields), seed=seed).eval()

    return make


@pytest.fixture
def saved(trained, tmp_path):
    """A folder with an adapter."""
    return save_adapter(trained(), tmp_path / "adapter")


def adapters(model, adapter="default"):
    return {n.replace(f".{adapter}.", "."): p for n, p in model.named_parameters() if "lora_" in n}


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids).logits.float()


class TestSave:
    def test_writes_pefts_files_and_nothing_that_peft_does_not_know(self, saved):
        tensors = load_file(saved / "adapter_model.safetensors")
        prefix = "base_model.model.model.layers.0.self_attn.q_proj"
        assert tensors[f"{prefix}.lora_A.weight"].shape == (4, 64)
        assert tensors[f"{prefix}.lora_B.weight"].shape == (64, 4)
        assert len(tensors) == 2 * 2 * len(TARGETS)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        config = json.loads((saved / "adapter_config.json").read_text())
        known = {field for field in peft.LoraConfig().to_dict()}
        assert config.keys() == known

    def test_config_is_sorted_and_names_the_base(self, saved, base_path):
        text = (saved / "adapter_config.json").read_text()
        config = json.loads(text)
        assert config["target_modules"] == sorted(TARGETS)
        assert list(config) == sorted(config)
        assert config["base_model_name_or_path"] == base_path
        assert config["inference_mode"] is True

    def test_identity_stands_beside(self, saved, base_path):
        identity = json.loads((saved / "halfbyte.json").read_text())
        assert identity["base"]["name_or_path"] == base_path
        assert set(identity["base"]["fingerprint"]) == {"kept", "quantized", "quantization"}
        assert identity["quantization"]["bnb_4bit_quant_type"] == "nf4"
        assert identity["packages"]["torch"] == torch.__version__

    def test_same_adapter_gives_the_same_bytes(self, trained, tmp_path):
        for name in ("first", "second"):
            save_adapter(trained(), tmp_path / name)
        for file in ("adapter_model.safetensors", "adapter_config.json", "halfbyte.json"):
            assert (tmp_path / "first" / file).read_bytes() == (
                tmp_path / "second" / file
            ).read_bytes()

    def test_appears_whole_with_checksums(self, saved):
        verify(saved)
        assert [path.name for path in saved.parent.iterdir()] == [saved.name]

    def test_does_not_overwrite_unasked(self, trained, saved):
        before = (saved / "adapter_model.safetensors").read_bytes()
        with pytest.raises(CheckpointError, match="already exists"):
            save_adapter(trained(seed=1), saved)
        assert (saved / "adapter_model.safetensors").read_bytes() == before
        save_adapter(trained(seed=1), saved, overwrite=True)
        assert (saved / "adapter_model.safetensors").read_bytes() != before

    def test_into_a_folder_with_other_files(self, trained, tmp_path):
        (tmp_path / "run.json").write_text("{}")
        write_adapter(trained(), tmp_path)
        names = {"run.json", "adapter_model.safetensors", "adapter_config.json", "halfbyte.json"}
        assert {path.name for path in tmp_path.iterdir()} == names

    def test_unknown_adapter_is_refused(self, trained, load, tmp_path):
        with pytest.raises(AdapterError, match=r"'other' on the model, found \['default'\]"):
            save_adapter(trained(), tmp_path / "out", adapter="other")
        with pytest.raises(AdapterError, match=r"found \[\]"):
            save_adapter(load(), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_diverged_adapter_is_refused(self, trained, tmp_path):
        model = trained()
        next(iter(adapters(model).values())).data[0, 0] = float("nan")
        with pytest.raises(AdapterError, match="NaN or Inf"):
            save_adapter(model, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


class TestReload:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"use_rslora": True},
            {"use_dora": True},
            {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 3}},
            {"target_modules": "all-linear"},
            {"target_modules": r".*layers\.1\.mlp\..*_proj"},
            {"modules_to_save": ["lm_head"]},
            {"target_modules": ["q_proj", "embed_tokens"]},
        ],
        ids=lambda fields: "-".join(fields) or "plain",
    )
    def test_is_bit_for_bit(self, trained, load, input_ids, tmp_path, fields):
        model = trained(**fields)
        loaded = load_adapter(load(), save_adapter(model, tmp_path / "a"))
        assert torch.equal(logits(loaded, input_ids), logits(model, input_ids))
        want, got = adapters(model), adapters(loaded)
        assert want.keys() == got.keys()
        assert all(torch.equal(want[name], got[name]) for name in want)

    def test_is_frozen_and_evaluated_unless_trainable(self, load, saved):
        loaded = load_adapter(load(), saved)
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
        trainable = load_adapter(load().train(), saved, trainable=True)
        assert trainable.training
        needing = [name for name, p in trainable.named_parameters() if p.requires_grad]
        assert needing == list(dict.fromkeys(needing))
        assert all("lora_" in name for name in needing)

    def test_continues_training(self, load, saved, input_ids):
        model = load_adapter(load(), saved, trainable=True)
        model(input_ids, labels=input_ids).loss.backward()
        assert all(p.grad.any() for p in adapters(model).values())

    def test_leaves_the_random_generator_alone(self, load, saved):
        state = torch.get_rng_state()
        load_adapter(load(), saved)
        assert torch.equal(torch.get_rng_state(), state)

    def test_second_adapter_beside_a_first(self, trained, load, input_ids, tmp_path):
        first, second = trained(), trained(seed=1)
        model = load_adapter(load(), save_adapter(first, tmp_path / "first"))
        model = load_adapter(model, save_adapter(second, tmp_path / "second"), adapter="other")
        assert torch.equal(logits(model, input_ids), logits(first, input_ids))
        model.set_adapter("other")
        assert torch.equal(logits(model, input_ids), logits(second, input_ids))
        save_adapter(model, tmp_path / "again", adapter="other")
        file = "adapter_model.safetensors"
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
        with pytest.raises(AdapterError, match="already has an adapter 'other'"):
            load_adapter(model, tmp_path / "second", adapter="other")


class TestWithPeft:
    """Files go both ways between Halfbyte and peft, on 16-bit and on bitsandbytes models."""

    @pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "lora_dropout": 0.1}])
    def test_ours_load_in_peft_on_a_16bit_model(self, trained, load, input_ids, tmp_path, fields):
        folder = save_adapter(trained(**fields), tmp_path / "a")
        with torch.no_grad():
            theirs = PeftModel.from_pretrained(load("bf16"), folder)
        ours = load_adapter(load("bf16"), folder)
        want = logits(theirs, input_ids)
        assert (logits(ours, input_ids) - want).norm() < 0.02 * want.norm()
        assert (logits(load("bf16"), input_ids) - want).norm() > 0.1 * want.norm()
        want, got = adapters(theirs), adapters(ours)
        assert want.keys() == got.keys()
        assert all(torch.equal(want[name], got[name]) for name in want)

    def test_ours_load_in_peft_on_a_bitsandbytes_model(self, trained, load, input_ids, tmp_path):
        model = trained()
        theirs = PeftModel.from_pretrained(load("bnb"), save_adapter(model, tmp_path / "a"))
        assert "Linear4bit" in {type(module).__name__ for module in theirs.modules()}
        want = logits(theirs, input_ids)
        assert (logits(model, input_ids) - want).norm() < 0.02 * want.norm()

    @pytest.mark.parametrize("kind", ["bnb", "bf16"])
    def test_theirs_load_in_ours(self, load, randomize, input_ids, tmp_path, kind):
        config = peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
        theirs = randomize(peft.get_peft_model(load(kind), config)).eval()
        theirs.save_pretrained(tmp_path)
        ours = load_adapter(load("nf4" if kind == "bnb" else "bf16"), tmp_path)
        want = logits(theirs, input_ids)
        assert (logits(ours, input_ids) - want).norm() < 0.02 * want.norm()

    def test_auto_class_finds_the_base(self, trained, input_ids, tmp_path):
        folder = save_adapter(trained("bf16"), tmp_path / "a")
        model = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        want = logits(model, input_ids)
        assert (logits(trained("bf16"), input_ids) - want).norm() < 0.02 * want.norm()


class TestRefused:
    """Each damage is named, and the model is as before."""

    @pytest.fixture
    def damage(self, saved):
        def change(tensors=None, config=None):
            file = saved / "adapter_model.safetensors"
            if tensors is not None:
                save_file(tensors(load_file(file)), file, metadata={"format": "pt"})
            if config is not None:
                path = saved / "adapter_config.json"
                path.write_text(json.dumps(json.loads(path.read_text()) | config))
            return saved

        return change

    def check(self, load, folder, *parts, path=None):
        model = load() if path is None else load(path=path)
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        with pytest.raises(AdapterError) as caught:
            load_adapter(model, folder)
        for part in parts:
            assert part in str(caught.value)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before

    NAME = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"

    def test_missing_tensor(self, load, damage):
        folder = damage(lambda t: {k: v for k, v in t.items() if k != self.NAME})
        self.check(load, folder, "lacks tensors", "layers.1.self_attn.v_proj.lora_B")

    def test_unexpected_tensor(self, load, damage):
        name = self.NAME.replace("v_proj", "o_proj")
        folder = damage(lambda t: t | {name: torch.zeros(64, 4)})
        self.check(load, folder, "model lacks", "o_proj")

    def test_wrong_shape(self, load, damage):
        folder = damage(lambda t: t | {self.NAME: torch.zeros(32, 5)})
        self.check(load, folder, "another shape", self.NAME, "[32, 5]", "[32, 4]")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, load, damage, value):
        folder = damage(lambda t: t | {self.NAME: torch.full((32, 4), value)})
        self.check(load, folder, "NaN or Inf", self.NAME)

    def test_name_of_the_adapter_inside(self, load, damage):
        folder = damage(
            lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()}
        )
        self.check(load, folder, "lora_A.default.weight", "'default'")

    def test_another_base_of_the_same_shape(self, load, saved, other_path, base_path):
        self.check(load, saved, base_path, other_path, "other weights", path=other_path)
        assert load_adapter(load(path=other_path), saved, allow_other_base=True)

    def test_another_base_of_another_shape(self, load, saved, wide_path):
        (saved / "halfbyte.json").unlink()
        self.check(load, saved, "another shape", "down_proj", path=wide_path)

    def test_targets_that_the_model_lacks(self, load, damage):
        self.check(load, damage(config={"target_modules": ["qkv_proj"]}), "'qkv_proj'", "q_proj")

    def test_rank_that_is_not_the_tensors(self, load, damage):
        self.check(load, damage(config={"r": 5}), "another shape", "[4, 64]", "[5, 64]")

    @pytest.mark.parametrize(
        ("config", "part"),
        [
            ({"peft_type": "IA3"}, "'IA3'"),
            ({"peft_type": None}, "expected 'LORA'"),
            ({"target_modules": None}, "target_modules"),
            ({"task_type": "NONSENSE"}, "NONSENSE"),
        ],
    )
    def test_config_of_something_else(self, load, damage, config, part):
        self.check(load, damage(config=config), "adapter_config.json", part)

    @pytest.mark.parametrize("content", ["", "{", "[1]", "\udcff", "[" * 100_000])
    def test_config_that_is_no_json_object(self, load, saved, content):
        path = saved / "adapter_config.json"
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        self.check(load, saved, "adapter_config.json")

    def test_truncated_weights(self, load, saved):
        file = saved / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        self.check(load, saved, "adapter_model.safetensors", "cannot be read")

    def test_only_a_pickle(self, load, saved):
        (saved / "adapter_model.safetensors").unlink()
        (saved / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
        self.check(load, saved, "only a pickle")

    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
    def test_missing_file(self, load, saved, name):
        (saved / name).unlink()
        self.check(load, saved, name)

    def test_missing_folder(self, load, tmp_path):
        self.check(load, tmp_path / "nowhere", "nowhere")
        self.check(load, "someone/nothing", "someone/nothing")


def test_loads_an_adapter_that_only_peft_can_have_made(load, randomize, input_ids, tmp_path):
    """bf16 adapters, as trl makes them, load into our float32 ones without loss."""
    theirs = peft.get_peft_model(load("bf16"), LoraConfig(target_modules=TARGETS))
    randomize(theirs)
    for parameter in adapters(theirs).values():
        parameter.data = parameter.data.bfloat16()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(load("bf16"), tmp_path)
    for name, parameter in adapters(ours).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, adapters(theirs)[name].float())
