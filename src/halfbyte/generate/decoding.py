"""Where answers come from: the engine's fused decoder where it serves, else transformers.

Both choose tokens with transformers' own processors, from the same generator, so that settings and
seeds mean the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from halfbyte.engine.decode import Choose, Decoder, cache_fits, obstacle
from halfbyte.generate.sampling import Sampling

# Room grows in powers of two for one prompt (a conversation grows), in these steps for many.
_SMALLEST_ROOM = 1024
_STEP_OF_ROOM = 128


@dataclass
class Decoding:
    """Keeps a decoder from one answer to the next: recording one takes a part of a second.

    Args:
        anywhere: Use it without a GPU too, where it is not faster.
        tell: Called with the reason when a GPU's answers come from transformers, once for each.
    """

    anywhere: bool = False
    tell: Callable[[str], None] = lambda _: None
    _decoder: Decoder | None = None
    _told: set[str] = field(default_factory=set)

    def answer(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        sampling: Sampling,
        stop: list[int],
        on_token: Callable[[int], None] | None = None,
    ) -> list[list[int]] | None:
        """Return the tokens after each prompt, or None where the decoder does not serve.

        Args:
            model: In evaluation mode.
            prompts: Token ids; the model has positions for them and `max_new_tokens` more.
            sampling: How tokens are chosen.
            stop: Tokens that end an answer; they are returned.
            on_token: Called with each token of the first answer.
        """
        if model.device.type != "cuda" and not self.anywhere:
            return None
        length = max(map(len, prompts)) + sampling.max_new_tokens
        # Graphs are recorded, and kernels launched, on the current device.
        with torch.cuda.device_of(next(model.parameters())):
            decoder = self._decoder_for(model, len(prompts), length)
            if decoder is None:
                return None
            return decoder.generate(
                prompts,
                max_new_tokens=sampling.max_new_tokens,
                stop=stop,
                choose=chooser(sampling),
                on_token=on_token,
            )

    def _decoder_for(self, model: PreTrainedModel, batch: int, length: int) -> Decoder | None:
        decoder = self._decoder
        if decoder is not None and decoder.serves(model, batch=batch, length=length):
            return decoder
        self._decoder = decoder = None
        room = -(-length // _STEP_OF_ROOM) * _STEP_OF_ROOM
        if batch == 1:
            room = max(1 << (length - 1).bit_length(), _SMALLEST_ROOM)
        reason = obstacle(model)
        if reason is None and not cache_fits(model, batch, room):
            reason = f"there is no memory for the keys and values of {batch} x {room} tokens"
        if reason is None:
            self._decoder = Decoder(model, batch=batch, length=room)
        elif reason not in self._told:
            self._told.add(reason)
            self.tell(reason)
        return self._decoder


def chooser(sampling: Sampling) -> Choose | None:
    """Return how `transformers.generate` chooses the next tokens with these settings.

    None: the likeliest.
    """
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k > 0:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))

    if not processors:
        return None

    def choose(ids: Tensor, logits: Tensor) -> Tensor:
        logits = cast(Any, processors)(ids, logits.float())
        if sampling.temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial(logits.softmax(-1), 1).squeeze(1)

    return choose
