"""A tiny model that has learned a few answers by heart, so that generation has something to say."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ANSWERS = {"2+2?": "four", "3+3?": "six and no more", "1?": "#### 1", "10?": "#### 1,000"}


def chat(question, answer=None):
    messages = [{"role": "user", "content": question}]
    return messages + ([{"role": "assistant", "content": answer}] if answer is not None else [])


@pytest.fixture(scope="session")
def tokenizer(tiny_base):
    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="session")
def taught(tiny_base, tokenizer):
    """The tiny model, trained in full until it answers ANSWERS."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    texts = [
        tokenizer.apply_chat_template(chat(question, answer), tokenize=False)
        for question, answer in ANSWERS.items()
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    return model.eval()


@pytest.fixture
def adapted(taught):
    """The taught model under an adapter that silences it: the stop token comes at once."""
    config = peft.LoraConfig(r=1, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(taught, config).eval()
    with torch.no_grad():
        layer = taught.lm_head
        layer.lora_A["default"].weight.zero_()
        layer.lora_B["default"].weight.zero_()
    yield model
    model.unload()
