"""transformers' quantizer for `NF4Config`: linear layers become 4-bit ones while a model loads.

`from_pretrained` builds the model without memory, has its layers replaced here, and then hands over
each weight as it is read; it is quantized at once and the original let go. The tensors of a weight
that is already quantized come together through `_Deserialize`.

An error in an operation would end as a line in transformers' loading report, under a general
RuntimeError; so the first one is kept and raised when loading is over.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from halfbyte.checkpoint.pages import release_pages
from halfbyte.device import default_device, join_memory
from halfbyte.errors import CheckpointError, ConfigError, HalfbyteError, QuantizationError
from halfbyte.quant import layout
from halfbyte.quant.config import METHOD, NF4Config, to_dtype
from halfbyte.quant.linear import NF4Linear
from halfbyte.quant.weight import QuantizedWeight

# Codes are half a byte; absmax in eight bits adds 1/64, and in float32 4/64 of a byte.
_BYTES_PER_ELEMENT = {True: 0.5 + 1 / 64, False: 0.5 + 4 / 64}


def num_parameters(
    model: nn.Module,
    only_trainable: bool = False,  # noqa: FBT001, FBT002  (as PreTrainedModel.num_parameters)
    exclude_embeddings: bool = False,  # noqa: FBT001, FBT002
) -> int:
    """Return how many parameters a model has, a 4-bit weight counted as its matrix.

    Args:
        model: Any model.
        only_trainable: Leave out what gets no gradient.
        exclude_embeddings: Leave out the weights of `nn.Embedding`.
    """
    total = 0
    seen = set()  # a tied weight counts once, and not at all where it is an embedding's
    if exclude_embeddings:
        seen = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or (only_trainable and not parameter.requires_grad):
                continue
            seen.add(id(parameter))
            if isinstance(module, NF4Linear) and module.is_quantized and name == "weight":
                total += module.in_features * module.out_features
            else:
                total += parameter.numel()
    return total


@register_quantizer(METHOD)
class NF4Quantizer(HfQuantizer):
    """Loads models in four bits, and gives them back in sixteen."""

    requires_calibration = False
    quantization_config: NF4Config

    def __init__(self, quantization_config: NF4Config, **kwargs: Any) -> None:
        # A copy, since the compute dtype is filled in per model.
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.failure: HalfbyteError | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse weights on disk: a quantized weight cannot be read back from the original file."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigError(
                "expected a device_map of GPUs and CPU, got one that leaves weights on disk",
                hint="free memory, or take a smaller model",
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Compute in the dtype of the model, unless the configuration names another."""
        if self.quantization_config.compute_dtype is None:
            self.quantization_config.compute_dtype = dtype
        return dtype

    def update_device_map(self, device_map: Any) -> Any:
        """Load onto the default device when the user names none."""
        join_memory()
        return {"": default_device()} if device_map is None else device_map

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        """Leave a tenth of each device for what quantizing needs on the way."""
        return {key: value * 0.9 for key, value in max_memory.items()}

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Return the bytes that an element of this parameter will take."""
        if self.param_needs_quantization(model, param_name):
            return _BYTES_PER_ELEMENT[self.quantization_config.double_quant]
        return param.element_size()

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Return whether the parameter is the weight of a 4-bit layer."""
        path, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(path), NF4Linear)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        skipped = self.get_modules_to_not_convert(
            model, config.skip_modules, model._keep_in_fp32_modules
        )
        for name, module in quantizable_modules(model, skipped):
            layer = _empty_layer(module, config.compute_dtype)
            if self.pre_quantized:
                # transformers casts what it reads to the dtype of the placeholder.
                placeholder = layer.weight.to(config.storage_dtype or torch.uint8)
                layer.weight = nn.Parameter(placeholder, requires_grad=False)
            model.set_submodule(name, layer)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        empty = [name for name, layer in nf4_layers(model) if not layer.is_quantized]
        if empty:
            raise CheckpointError(
                f"the checkpoint lacks {len(empty)} weights, among them {empty[0] + '.weight'!r}",
                hint="it is incomplete or belongs to another model: copy it again",
            )
        # What is saved is bitsandbytes' layout already; there is nothing to convert back.
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or []
            if not any(isinstance(op, _Deserialize) for op in getattr(conversion, "operations", ()))
        ] or None
        model.is_loaded_in_4bit = True
        # transformers' own asks bitsandbytes which parameters hold two weights in a byte.
        model.num_parameters = functools.partial(num_parameters, model)
        return model

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that quantizes a weight as it is read."""
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Return how the tensors of an already quantized weight are put together."""
        if not self.pre_quantized:
            return []
        # Longest first: transformers takes the first pattern that matches.
        sources = sorted(("weight" + suffix for suffix in layout.SUFFIXES), key=len, reverse=True)
        return [WeightConverter(sources, "weight", [_Deserialize(self)])]

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        # After `save_pretrained` the model's dtype, which is the default here, is a string.
        dtype = to_dtype("dtype", dtype)
        for name, layer in nf4_layers(model):
            model.set_submodule(name, _dense_layer(layer, dtype))
        model.is_loaded_in_4bit = False
        del model.num_parameters
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        """Return true: `save_pretrained` writes bitsandbytes' layout."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters train on the 4-bit model."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: `torch.compile` traces the layers."""
        return True


def quantizable_modules(
    model: nn.Module, skipped: list[str]
) -> list[tuple[str, nn.Linear | Conv1D]]:
    """Return the modules that transformers' rules quantize, with their names.

    Args:
        model: A model; it may be on the meta device.
        skipped: Names or patterns that keep their precision.
    """
    return [
        (name, module)
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and should_convert_module(name, skipped)
    ]


def nf4_layers(model: nn.Module) -> list[tuple[str, NF4Linear]]:
    """Return the 4-bit layers of a model, with their names."""
    return [
        (name, module) for name, module in model.named_modules() if isinstance(module, NF4Linear)
    ]


def _empty_layer(module: nn.Linear | Conv1D, compute_dtype: torch.dtype | None) -> NF4Linear:
    is_conv1d = isinstance(module, Conv1D)
    columns, rows = module.weight.shape if is_conv1d else module.weight.shape[::-1]
    return NF4Linear(
        columns,
        rows,
        module.bias is not None,
        compute_dtype=compute_dtype,
        dtype=module.weight.dtype,
        is_conv1d=is_conv1d,
    )


def _dense_layer(layer: NF4Linear, dtype: torch.dtype | None) -> nn.Module:
    weight = layer.dequantize(dtype)
    with torch.device("meta"):
        if layer.is_conv1d:
            dense: nn.Module = Conv1D(layer.out_features, layer.in_features)
            weight = weight.T.contiguous()
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    dense.bias = layer.bias
    return dense.train(layer.training)


class _Operation(ConversionOps):
    """A step of transformers' loader that keeps its first error for the end of loading."""

    def __init__(self, hf_quantizer: NF4Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Operation":
        """Stay one: transformers copies operations for each weight, but the error is to be kept."""
        return self

    def attempt(self, layer: NF4Linear, make: Callable[[], QuantizedWeight]) -> Tensor:
        """Set the layer's weight to what `make` returns; give the packed codes back."""
        quantizer = self.hf_quantizer
        if quantizer.failure is None:
            try:
                layer.quantized = make()
            except HalfbyteError as error:
                quantizer.failure = error
        if quantizer.failure is not None:
            # Anything real keeps transformers from filling the weight with random numbers.
            return nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
        return layer.weight


class _Quantize(_Operation):
    """Quantizes a weight that was just read."""

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the packed codes by parameter name; the scales go to the layer."""
        packed = {}
        for name, value in input_dict.items():
            tensor: Tensor = value[0] if isinstance(value, list) else value
            layer = kwargs["model"].get_submodule(name.rpartition(".")[0])
            packed[name] = self.attempt(layer, functools.partial(self._make, name, tensor, layer))
            release_pages(tensor)
        return packed

    def _make(self, name: str, value: Tensor, layer: NF4Linear) -> QuantizedWeight:
        config = self.hf_quantizer.quantization_config
        expected = (layer.out_features, layer.in_features)
        matrix = value.T.contiguous() if layer.is_conv1d else value
        if tuple(matrix.shape) != expected:
            shape = expected[::-1] if layer.is_conv1d else expected
            raise CheckpointError(
                f"expected {name!r} to be {list(shape)} as in config.json, got {list(value.shape)}",
                hint="the weights belong to another model than config.json: copy both again",
            )
        try:
            return QuantizedWeight.quantize(
                matrix,
                quant_type=config.quant_type,
                block_size=config.block_size,
                double_quant=config.double_quant,
            )
        except QuantizationError as error:
            raise QuantizationError(f"{name!r}: {error.message}", hint=error.hint) from error


class _Deserialize(_Operation):
    """Puts the tensors of a weight together that was saved in bitsandbytes' layout."""

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the packed codes, or a weight that was never quantized as it is."""
        name, model = kwargs["full_layer_name"], kwargs["model"]
        tensors = {key: value[0] for key, value in input_dict.items()}
        layer = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(layer, NF4Linear):
            return {"weight": self._plain(name, tensors, model)}
        named = {name + key.removeprefix("weight"): tensor for key, tensor in tensors.items()}
        shape = (layer.out_features, layer.in_features)
        make = functools.partial(layout.from_tensors, name, named, shape=shape)
        return {"weight": self.attempt(layer, make)}

    def _plain(self, name: str, tensors: dict[str, Tensor], model: nn.Module) -> Tensor:
        """Return a weight that is not quantized in the model, in the dtype of its placeholder."""
        expected = model.get_parameter(name)
        if set(tensors) == {"weight"}:
            weight = tensors["weight"]
            return weight.to(expected.dtype) if weight.is_floating_point() else weight
        if self.hf_quantizer.failure is None:
            self.hf_quantizer.failure = CheckpointError(
                f"{name!r} is quantized in the checkpoint, but not by its quantization_config",
                hint="copy config.json and the weights again from where they came",
            )
        # Of the expected shape, or transformers would fail before the failure is raised.
        return torch.zeros(1, dtype=expected.dtype).expand(expected.shape)
