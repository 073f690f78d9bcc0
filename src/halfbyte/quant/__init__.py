"""The 4-bit weight, the linear layer on it, and the quantizer that transformers finds."""

from halfbyte.quant import quantizer as quantizer
