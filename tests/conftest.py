"""What all tests share: where Triton kernels run, and quick, quiet libraries."""

import os
import weakref

# Before anything imports a library that reads these.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="module")
def _threads(request):
    """Tiny models run on one thread, for two would wait for each other; kernels run on all."""
    before = torch.get_num_threads()
    if not {"kernels", "engine"} & set(request.path.parts):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """Where Triton kernels run: the GPU, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def half_dtype() -> torch.dtype:
    """The 16-bit dtype to test Triton kernels in: its interpreter truncates bf16 instead of
    rounding it, so float16 stands in for it where there is no GPU.
    """
    return torch.bfloat16 if torch.cuda.is_available() else torch.float16


@pytest.fixture
def poisoned():
    """New tensors start as NaN: an element that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def make_base(tmp_path_factory):
    """Return a function that writes a tiny Llama with a byte-level tokenizer, and its folder."""

    def make(**settings) -> Path:
        folder = tmp_path_factory.mktemp("base")
        make_tokenizer().save_pretrained(folder)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            **{
                "hidden_size": 64,
                "intermediate_size": 160,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "vocab_size": 260,
                "bos_token_id": None,
                "eos_token_id": 258,
                "initializer_range": 0.1,
                **settings,
            }
        )
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_base(make_base) -> Path:
    """Folder of a tiny bf16 Llama with untied embeddings and a byte-level ChatML tokenizer."""
    return make_base()


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of 256 bytes and three special tokens, with a ChatML template."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


class FakePool:
    """A device with little memory, made of the CPU's, to test paging on.

    Copies happen as late as the contract allows, so that a wait that is missing shows.
    """

    is_apart = True

    def __init__(self, capacity):
        self.capacity = capacity
        self.used = 0
        self.moved = []
        self._queue = []

    def on_device(self, nbytes):
        if self.used + nbytes > self.capacity:
            raise torch.OutOfMemoryError(f"fake device: {nbytes} bytes do not fit")
        buffer = torch.full((nbytes,), 0xFF, dtype=torch.uint8)  # what a page forgot to set shows
        self.used += nbytes
        weakref.finalize(buffer.untyped_storage(), self._free, nbytes)
        return buffer

    def _free(self, nbytes):
        self.used -= nbytes

    def free_bytes(self):
        return self.capacity - self.used

    def on_host(self, nbytes):
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)

    def fetch(self, page, slot):
        self.moved.append("in")
        slot.fill_(0xEE)
        self._queue.append((slot[: page.numel()], page, slot.data_ptr()))

    def arrived(self, slot):
        while any(to.data_ptr() == slot.data_ptr() for to, _, _ in self._queue):
            self._copy_first()

    def store(self, slot, page):
        self.moved.append("out")
        # The slot may be used again at once: by contract a fetch waits for this copy.
        self._queue.append((page, slot[: page.numel()].clone(), 0))
        page.fill_(0xEE)

    def finish(self):
        while self._queue:
            self._copy_first()

    synchronize = finish

    def _copy_first(self):
        to, source, _ = self._queue.pop(0)
        to.copy_(source)


@pytest.fixture
def fake_pool() -> type[FakePool]:
    """Return the class: `fake_pool(capacity)` makes a device of so many bytes."""
    return FakePool
