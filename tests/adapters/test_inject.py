import json

import peft
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from halfbyte.adapters.inject import LoraConfig, add_lora, count_parameters, use_fast_layers
from halfbyte.adapters.layer import LoraLinear
from halfbyte.errors import AdapterError, ConfigError
from halfbyte.quant.linear import NF4Linear


def layers(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def short_names(model):
    return {name.rpartition(".")[2] for name in layers(model)}


SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


class TestAddLora:
    @pytest.mark.parametrize("kind", ["nf4", "bf16"])
    def test_default_is_every_linear_layer_but_the_output_embedding(self, load, kind):
        model = add_lora(load(kind))
        assert isinstance(model, peft.PeftModelForCausalLM)
        assert short_names(model) == SEVEN
        assert all(type(layer) is LoraLinear for layer in layers(model).values())

    def test_base_is_frozen_and_adapters_are_float32(self, load):
        model = add_lora(load())
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == ("lora_" in name)
            if "lora_" in name:
                assert parameter.dtype == torch.float32

    @pytest.mark.parametrize(
        ("targets", "expected"),
        [
            (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
            (r".*\.layers\.1\.mlp\.(gate|up)_proj", {"gate_proj", "up_proj"}),
            ("all-linear", SEVEN),
            (["model.layers.0.self_attn.o_proj"], {"o_proj"}),
            (["embed_tokens", "q_proj"], {"embed_tokens", "q_proj"}),
        ],
    )
    def test_targets_are_a_list_a_pattern_or_all(self, load, targets, expected):
        assert short_names(add_lora(load(), target_modules=targets)) == expected

    def test_config_and_fields_give_the_same(self, load):
        first = add_lora(load(), peft.LoraConfig(r=4, target_modules=["q_proj"]), seed=3)
        second = add_lora(load(), r=4, target_modules=["q_proj"], seed=3)
        assert first.peft_config["default"].r == second.peft_config["default"].r == 4
        for (name, a), (other, b) in zip(
            first.named_parameters(), second.named_parameters(), strict=True
        ):
            assert name == other
            assert torch.equal(a, b)

    def test_given_config_is_not_changed(self, load):
        config = peft.LoraConfig(r=4)
        before = config.to_dict()
        add_lora(load(), config)
        assert config.to_dict() == before
        assert config._custom_modules is None

    def test_seed_repeats_the_adapters_and_leaves_the_generator_alone(self, load):
        torch.manual_seed(11)
        state = torch.get_rng_state()
        first, second = add_lora(load(), seed=7), add_lora(load(), seed=7)
        third = add_lora(load(), seed=8)
        assert torch.equal(torch.get_rng_state(), state)
        name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
        values = [model.get_parameter(name) for model in (first, second, third)]
        assert torch.equal(values[0], values[1])
        assert not torch.equal(values[0], values[2])

    def test_new_adapter_changes_nothing(self, load, input_ids):
        base = load()
        want = base(input_ids).logits
        assert torch.equal(add_lora(base, lora_dropout=0.1).eval()(input_ids).logits, want)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_trains_under_gradient_checkpointing(self, load, input_ids, reentrant):
        def gradients(*, checkpointing):
            base = load().train()
            if checkpointing:
                base.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model = add_lora(base, seed=0, init_lora_weights=False, lora_dropout=0.2).train()
            torch.manual_seed(1)
            model(input_ids, labels=input_ids, use_cache=False).loss.backward()
            return [p.grad for p in model.parameters() if p.requires_grad]

        plain, checkpointed = gradients(checkpointing=False), gradients(checkpointing=True)
        assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))

    def test_more_adapters_are_pefts_business(self, load, randomize, input_ids):
        model = randomize(add_lora(load(), r=4))
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
        assert all(type(layer) is LoraLinear for layer in layers(model).values())
        first = model(input_ids).logits
        model.set_adapter("second")
        assert not torch.equal(model(input_ids).logits, first)
        model.set_adapter("default")
        with model.disable_adapter():
            base = model(input_ids).logits
        assert not torch.equal(base, first)
        assert torch.equal(model(input_ids).logits, first)

    def test_merges_into_a_dense_base(self, load, randomize, input_ids):
        model = randomize(add_lora(load("bf16"), r=4, lora_alpha=8)).eval()
        want = model(input_ids).logits.float()
        merged = model.merge_and_unload()
        assert type(merged) is LlamaForCausalLM
        assert (merged(input_ids).logits.float() - want).norm() < 0.03 * want.norm()

    def test_merging_into_four_bits_is_refused(self, load, randomize):
        model = randomize(add_lora(load()))
        with pytest.raises(AdapterError, match="4-bit"):
            model.merge_and_unload()
        with pytest.raises(AdapterError, match="4-bit"):
            model.merge_adapter()

    def test_on_an_adapted_model_is_refused(self, load):
        with pytest.raises(AdapterError, match="already has adapters"):
            add_lora(add_lora(load()))


class TestCounting:
    def test_counts_elements_and_not_bytes(self, load):
        dense, packed = add_lora(load("bf16"), r=4), add_lora(load(), r=4)
        assert count_parameters(packed) == count_parameters(dense)
        assert count_parameters(dense) == dense.get_nb_trainable_parameters()

    def test_peft_prints_its_own_count(self, load, capsys):
        model = add_lora(load(), r=4)
        model.print_trainable_parameters()
        assert f"trainable params: {count_parameters(model)[0]:,}" in capsys.readouterr().out


class TestPeftsOwnFunctions:
    """`get_peft_model` with peft's config on our 4-bit model: right, and fast when asked."""

    @pytest.fixture
    def pair(self, load, randomize):
        def make(**settings):
            settings = {"r": 4, "lora_alpha": 8, "target_modules": sorted(SEVEN)} | settings
            config = peft.LoraConfig(**settings, task_type="CAUSAL_LM")
            theirs = randomize(peft.get_peft_model(load(), config))
            ours = randomize(add_lora(load(), config))
            return theirs, ours

        return make

    @staticmethod
    def run(model, input_ids):
        model.zero_grad()
        output = model(input_ids, labels=input_ids)
        output.loss.backward()
        return output.logits.float(), {
            n: p.grad for n, p in model.named_parameters() if p.grad is not None
        }

    def agree(self, a, b):
        assert (a[0] - b[0]).norm() < 0.02 * b[0].norm()
        assert a[1].keys() == b[1].keys()
        for name, grad in b[1].items():
            assert (a[1][name] - grad).norm() < 0.05 * grad.norm()

    @pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}])
    def test_is_right_and_can_be_made_fast(self, pair, input_ids, settings):
        theirs, ours = pair(**settings)
        assert {type(layer) for layer in layers(theirs).values()} == {peft.tuners.lora.Linear}
        want = self.run(theirs, input_ids)
        self.agree(self.run(ours, input_ids), want)
        parameters = dict(theirs.named_parameters())
        assert use_fast_layers(theirs) == 14
        assert {type(layer) for layer in layers(theirs).values()} == {LoraLinear}
        assert all(parameters[name] is p for name, p in theirs.named_parameters())
        self.agree(self.run(theirs, input_ids), want)
        assert use_fast_layers(theirs) == 0

    def test_our_config_gives_our_layers_through_peft(self, load):
        model = peft.get_peft_model(load(), LoraConfig(target_modules=["q_proj"]))
        assert {type(layer) for layer in layers(model).values()} == {LoraLinear}

    def test_our_config_leaves_other_layers_to_peft(self, load):
        model = peft.get_peft_model(
            load("bnb"), LoraConfig(target_modules=["q_proj", "embed_tokens"])
        )
        kinds = {type(layer).__name__ for layer in layers(model).values()}
        assert kinds == {"Linear4bit", "Embedding"}

    def test_our_config_is_pefts_on_disk(self, tmp_path):
        LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(tmp_path / "ours")
        peft.LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(tmp_path / "theirs")
        ours, theirs = (
            json.loads((tmp_path / who / "adapter_config.json").read_text())
            for who in ("ours", "theirs")
        )
        assert ours == theirs

    def test_save_and_reload(self, pair, load, input_ids, tmp_path):
        theirs, _ = pair()
        want = theirs.eval()(input_ids).logits
        theirs.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(load(), tmp_path)
        assert torch.equal(again(input_ids).logits, want)

    @pytest.mark.parametrize("safe", [True, False])
    @pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
    def test_merging_into_four_bits_never_corrupts(self, pair, input_ids, settings, safe):
        """peft does not know that the weight is packed: it must fail, or the next forward must."""
        theirs, _ = pair(**settings)
        with pytest.raises(Exception, match=r"size of tensor|broadcast|expected codes and scales"):
            theirs.merge_and_unload(safe_merge=safe)(input_ids)

    def test_merging_is_refused_clearly_once_the_layers_are_ours(self, pair, input_ids):
        theirs, _ = pair()
        use_fast_layers(theirs)
        want = theirs(input_ids).logits
        with pytest.raises(AdapterError, match="halfbyte merge"):
            theirs.merge_and_unload()
        assert torch.equal(theirs(input_ids).logits, want)

    def test_kbit_preparation_leaves_codes_alone(self, load, input_ids):
        model = load()
        packed = {n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, NF4Linear)}
        model = peft.prepare_model_for_kbit_training(model)
        for name, codes in packed.items():
            assert torch.equal(model.get_submodule(name).weight, codes)
        adapted = add_lora(model, seed=0, init_lora_weights=False)
        adapted.train()(input_ids, labels=input_ids).loss.backward()
        assert all(p.grad.any() for p in adapted.parameters() if p.requires_grad)


class TestRefused:
    def check(self, model, error, *parts, **fields):
        with pytest.raises(error) as caught:
            add_lora(model, **fields)
        for part in parts:
            assert part in str(caught.value)

    @pytest.mark.parametrize(
        ("fields", "parts"),
        [
            ({"r": 0}, ["'r'", "at least 1", "got 0"]),
            ({"r": -4}, ["'r'"]),
            ({"r": 2.5}, ["whole number"]),
            ({"rank_pattern": {"q_proj": 0}}, ["'q_proj'"]),
            ({"lora_alpha": 0}, ["lora_alpha", "positive"]),
            ({"lora_alpha": float("nan")}, ["lora_alpha"]),
            ({"lora_dropout": 1.0}, ["lora_dropout", "[0, 1)"]),
            ({"lora_dropout": -0.1}, ["lora_dropout"]),
            ({"lora_droput": 0.1}, ["'lora_droput'", "did you mean 'lora_dropout'?"]),
            ({"rank": 8}, ["'rank'"]),
            ({"task_type": "NONSENSE"}, ["NONSENSE"]),
        ],
    )
    def test_settings(self, load, fields, parts):
        self.check(load("bf16"), ConfigError, *parts, **fields)

    def test_config_beside_fields(self, load):
        with pytest.raises(ConfigError, match="both"):
            add_lora(load("bf16"), LoraConfig(), r=4)

    @pytest.mark.parametrize("kind", ["nf4", "bf16"])
    def test_target_that_matches_nothing(self, load, kind):
        model = load(kind)
        listed = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
        fields = {"target_modules": ["q_proj", "vproj"]}
        self.check(model, AdapterError, "'vproj'", listed, "did you mean 'v_proj'?", **fields)
        assert not layers(model)
        self.check(model, AdapterError, "'zzz'", "'all-linear'", target_modules=["zzz"])
        self.check(model, AdapterError, "'.*qkv'", target_modules=".*qkv")

    def test_target_outside_the_chosen_layers(self, load):
        fields = {"target_modules": ["q_proj"], "layers_to_transform": [7]}
        self.check(load("bf16"), AdapterError, "'q_proj'", **fields)

    def test_target_that_is_a_block(self, load):
        model = load("bf16")
        self.check(model, AdapterError, "LlamaMLP", "up_proj", target_modules=["mlp"])
        assert not layers(model)

    def test_broken_pattern(self, load):
        self.check(load("bf16"), AdapterError, "regular expression", target_modules="q_(proj")

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_initialisation_that_rewrites_a_4bit_base(self, load, init):
        self.check(load(), AdapterError, init, "quant=None", init_lora_weights=init)


def test_trl_trains_it_through_its_own_argument(load, tmp_path):
    """`SFTTrainer(peft_config=halfbyte.LoraConfig(...))`: the fast layer without another line."""
    words = {f"w{i}": i for i in range(126)} | {"<pad>": 126, "<eos>": 127}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words)), pad_token="<pad>", eos_token="<eos>"
    )
    rows = Dataset.from_list([{"input_ids": [1, 2, 3, 4, 5, 6]}] * 4)
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none",
        bf16=True, use_cpu=True, gradient_checkpointing=False, learning_rate=0.01,
        save_strategy="no", dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    config = LoraConfig(r=4, target_modules=["q_proj"])
    trainer = SFTTrainer(
        model=load(),
        args=arguments,
        train_dataset=rows,
        peft_config=config,
        processing_class=tokenizer,
    )
    assert {type(layer) for layer in layers(trainer.model).values()} == {LoraLinear}
    trainer.train()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    assert trainer.model.get_parameter(name).any()
