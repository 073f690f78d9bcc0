import transformers
from peft import LoraConfig, get_peft_model

from halfbyte.models.load import load
from halfbyte.models.targets import linear_module_names, linear_suffixes


def test_names_what_all_linear_adapts(base):
    for quantized in ({}, {"quant": None}):
        model, _ = load(base, device="cpu", **quantized)
        names = linear_module_names(model)
        assert len(names) == 14
        tuned = get_peft_model(model, LoraConfig(target_modules="all-linear"))
        assert set(tuned.targeted_module_names) == set(names)


def test_suffixes_are_what_target_modules_lists(base):
    model, _ = load(base, device="cpu")
    assert linear_suffixes(model) == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]


def test_conv1d_counts():
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert linear_suffixes(model) == ["c_attn", "c_fc", "c_proj"]
