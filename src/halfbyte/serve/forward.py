"""The model's two forward passes in serving: prompts, and one more token in every row.

Both are transformers' own forward of the model, with a cache and masks of ours. Prompts that are
read together are padded on the right, which needs no mask: a causal model's real tokens never see
what comes after them.

A row's numbers should not depend on who else is there. Rows are independent in every product; what
is left is the width of attention, which is that of the longest row. Kernels add up in another order
when it changes, but not between multiples of 32 (measured for bf16 on a Xeon with AMX: bit for bit
the same, alone or in any company), so all widths are multiples of 32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from halfbyte.errors import ConfigError
from halfbyte.serve.bank import AdapterBank
from halfbyte.serve.cache import SlotCache

_KINDS = {"full_attention", "sliding_attention"}
_WIDTHS = 32


class BatchedModel:
    """A causal language model whose rows are independent answers.

    Args:
        model: The base, in evaluation mode.
        num_rows: Most answers that run at once.
        num_tokens: Longest prompt with its answer.

    Raises:
        ConfigError: the model has layers that keep more than keys and values.
    """

    def __init__(self, model: PreTrainedModel, *, num_rows: int, num_tokens: int) -> None:
        self._model: Any = model
        self._windows = _windows(model)
        self.num_rows = num_rows
        self._num_tokens = num_tokens
        self.bank = AdapterBank(model)
        layers = model.config.get_text_config().num_hidden_layers
        self.cache = SlotCache(layers, num_rows, num_tokens)

    @torch.no_grad()
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        slots: Sequence[int],
        cache: DynamicCache,
        *,
        is_partial: bool = False,
    ) -> Tensor:
        """Read prompts, or the next piece of one, into `cache`.

        Args:
            prompts: Token ids; several only where `cache` is empty.
            slots: The adapter's slot of each.
            cache: Where their keys and values go.
            is_partial: Whether more of the prompt follows.

        Returns:
            Logits after each prompt's last token, `[len(prompts), vocab]` in float32.
        """
        width = max(len(ids) for ids in prompts)
        if not cache.get_seq_length() and not is_partial:
            width = self._round(width)
        padded = [[*ids, *[0] * (width - len(ids))] for ids in prompts]
        last = torch.tensor([len(ids) - 1 for ids in prompts], device=self._model.device)
        wanted, place = last.unique(return_inverse=True)
        self.bank.select(slots)
        logits_BKV = self._model(
            input_ids=torch.tensor(padded, device=self._model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=wanted,
        ).logits
        rows = torch.arange(len(prompts), device=place.device)
        return logits_BKV[rows, place].float()

    @torch.no_grad()
    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int]
    ) -> Tensor:
        """Take one token into each of the rows 0 to n - 1 of the cache.

        Args:
            tokens: Each row's newest token.
            positions: Its index in the row.
            slots: The adapter's slot of each row.

        Returns:
            Logits of the token after it, `[n, vocab]` in float32.
        """
        device = self._model.device
        where = torch.tensor(positions, device=device)
        width = self._round(max(positions) + 1)
        self.cache.begin_step(where, width)
        self.bank.select(slots)
        output = self._model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            attention_mask=self._masks(where, width),
            position_ids=where[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1].float()

    def _round(self, width: int) -> int:
        return min(-(-width // _WIDTHS) * _WIDTHS, self._num_tokens)

    def _masks(self, positions: Tensor, width: int) -> Any:
        """Return what each row sees: one `[n, 1, 1, width]`, or one for each kind of layer."""
        index = torch.arange(width, device=positions.device)
        masks = {}
        for kind, window in self._windows.items():
            seen = index <= positions[:, None]
            if window is not None:
                seen &= index > positions[:, None] - window
            masks[kind] = self._in_attentions_form(seen[:, None, None])
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _in_attentions_form(self, seen: Tensor) -> Tensor:
        if self._model.config._attn_implementation != "eager":
            return seen
        mask = torch.zeros(seen.shape, dtype=self._model.dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)


def _windows(model: PreTrainedModel) -> dict[str, int | None]:
    """Return the kinds of the model's layers, and how many tokens back each sees (None: all)."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    default = ["sliding_attention" if window else "full_attention"]
    kinds = sorted(set(getattr(config, "layer_types", None) or default))
    if unknown := set(kinds) - _KINDS:
        raise ConfigError(
            f"{type(model).__name__} has layers of kind {sorted(unknown)}; only models whose "
            f"layers are of {sorted(_KINDS)} can be served",
            hint="serve it with vLLM: docs/serving.md says how",
        )
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}
