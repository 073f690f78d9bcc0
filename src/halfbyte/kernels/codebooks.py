"""The tables behind four-bit and eight-bit codes, as exact float32 values.

Every table is spelled as the hexadecimal bits of float32: a decimal literal that passes through
a double, or a table recomputed on another CPU, can be one unit in the last place off, and then
codes no longer equal those of bitsandbytes.

- NF4 levels: Dettmers et al., "QLoRA" (arXiv 2305.14314), appendix E.
- FP4 levels: sign, two exponent bits, one mantissa bit, divided by the largest (12).
- Dynamic maps: Dettmers, "8-bit approximations" (arXiv 1511.04561), as bitsandbytes builds them
  where torch has AVX2 or AVX-512. On other CPUs bitsandbytes' own map differs in 42 last places, so
  whoever loads a checkpoint uses the map that came with it.
"""

import functools
import struct

import torch

_NF4_LEVELS = (
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)

_FP4_LEVELS = (
    "00000000 3baaaaab 3f2aaaab 3f800000 3eaaaaab 3f000000 3e2aaaab 3e800000 "
    "00000000 bbaaaaab bf2aaaab bf800000 beaaaaab bf000000 be2aaaab be800000"
)

# bitsandbytes' CPU code compares with the float32 midpoints of neighbouring levels; its CUDA code
# with decimal literals, four of which lie one unit in the last place off.
_NF4_THRESHOLDS_CPU = (
    "bf591cd8 bf1c5270 beeb8480 beadea76 be703cec be0d38bc bd3a7871 3d22faff "
    "3df64862 3e5067e0 3e9582d4 3ec753f9 3f006d04 3f248daf 3f5c89da"
)

_NF4_THRESHOLDS_CUDA = (
    "bf591cd9 bf1c5270 beeb8480 beadea76 be703cec be0d38bc bd3a7871 3d22faff "
    "3df64863 3e5067e0 3e9582d4 3ec753f9 3f006d03 3f248daf 3f5c89d9"
)

_FP4_THRESHOLDS_CPU = (
    "bf555556 bf155556 bed55556 be955556 be555556 bdb00000 bb2aaaab 00000000 "
    "3b2aaaab 3db00000 3e555556 3e955556 3ed55556 3f155556 3f555556"
)

# On CUDA |x| > t decides and x < 0 sets the sign bit; as x > T, a negative T is the float below -t.
_FP4_THRESHOLDS_CUDA = (
    "bf555556 bf155551 bed55557 be955556 be555556 bdb00001 bb2aaaba 80000001 "
    "3b2aaab9 3db00000 3e555555 3e955555 3ed55556 3f155550 3f555555"
)

# Codes from the lowest level to the highest. FP4 has two zeros, 0 and 8, which bitsandbytes orders
# by device: its CPU code gives 0 to x <= 0 and 8 to tiny positive x, CUDA gives 8 to x < 0.
_NF4_ORDER = bytes(range(16))
_FP4_ORDER_CPU = bytes([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3])
_FP4_ORDER_CUDA = bytes([11, 10, 13, 12, 15, 14, 9, 8, 0, 1, 6, 7, 4, 5, 2, 3])

# The 127 positive values below 1 of the signed map; the negative ones mirror them.
_SIGNED_DYNAMIC_MAP = (
    "3513a3b7365a1a94370205ff37b2420638378034388aefb338ba1f4b3923d70b398ce70539c7e2833a016f01"
    "3a1eecc13a3c6a803a59e83e3a7765ff3aa7ef9d3af1a9fc3b1db22d3b428f5c3b676c8a3b8624dd3b989374"
    "3bab020d3bbd70a43bcfdf3b3be24dd33bf4bc6a3c0395813c0ccccd3c1604183c1f3b643c3ae1483c68f5c3"
    "3c8b851f3ca28f5d3cb9999a3cd0a3d73ce7ae153cfeb8523d0ae1483d1666673d21eb853d2d70a33d38f5c3"
    "3d447ae13d5000003d5b851f3d670a3d3d728f5d3d7e147b3d84cccd3d8a8f5d3d9051eb3d96147b3d9bd70a"
    "3da1999a3da75c2a3dad1eb83db2e1483db8a3d73dbe66673dc428f73dc9eb853ddb33343df800003e0a6666"
    "3e18cccd3e2733333e35999a3e4400003e5266663e60cccd3e6f33333e7d99993e8600003e8d33343e946666"
    "3e9b999a3ea2cccc3eaa00003eb133333eb866663ebf999a3ec6cccc3ece00003ed533333edc66663ee3999a"
    "3eeacccc3ef200003ef933323f0033333f03cccc3f0766663f0b00003f0e999a3f1233343f15cccd3f196666"
    "3f1d00003f20999a3f2433343f27cccd3f2b66663f2f00003f32999a3f3633343f39cccd3f3d66663f410000"
    "3f44999a3f4833333f4bcccd3f4f66663f5300003f56999a3f5a33333f5dcccd3f6166663f6500003f68999a"
    "3f6c33333f6fcccd3f7366663f7700003f7a999a3f7e3333"
)

# The 254 values between 0 and 1 of the unsigned map.
_UNSIGNED_DYNAMIC_MAP = (
    "34ae7baa35500998360e9b383692ccf636de4c513714e5d53783126e37e171a0381fe868384f1800387e479a"
    "3896bb9938ae536438c5eb313906594b394154ca397c5049399ba5e439b923a239d6a16339f41f223a08ce71"
    "3a178d503a264c303a350b103a43c9ef3a5288d03a6147af3a70068e3a7ec56e3a9581063aba5e353adf3b64"
    "3b020c4a3b147ae13b26e9783b3958103b4bc6a73b5e35403b70a3d73b8189373b8ac0823b93f7cf3b9d2f1a"
    "3ba666663baf9db23bb8d4fd3bc20c4a3bcb43953bd47ae13bddb22e3be6e9783bf020c53bf9580f3c0147ae"
    "3c05e3543c0a7ef93c0f1aa03c13b6453c1851eb3c1ced923c2189373c2f5c2a3c4666673c5d70a33c747ae2"
    "3c85c28f3c9147af3c9ccccd3ca851eb3cb3d70b3cbf5c293ccae1473cd666673ce1eb873ced70a33cf8f5c3"
    "3d023d703d0800003d0dc28f3d13851f3d1947af3d1f0a3d3d24cccd3d2a8f5c3d3051eb3d36147b3d3bd70a"
    "3d41999a3d475c283d4d1eb83d52e1473d58a3d73d5e66673d6428f73d69eb873d6fae153d7570a33d7b3333"
    "3d807ae23d835c2a3d863d713d891eb83d8c00003d8ee1483d91c2903d94a3d73d97851f3d9a66673d9d47af"
    "3da028f63da30a3e3da5eb853da8cccd3dabae153dae8f5c3db170a43db451eb3db733333dba147b3dbcf5c3"
    "3dbfd70b3dc2b8523dc5999a3dc87ae23dcb5c293dd400003de266663df0cccd3dff33333e06cccc3e0e0000"
    "3e1533343e1c66663e23999a3e2acccc3e3200003e3933343e4066663e47999a3e4ecccc3e5600003e5d3334"
    "3e6466663e6b999a3e72cccc3e7a00003e8099993e8433333e87cccd3e8b66663e8f00003e92999a3e963333"
    "3e99cccc3e9d66663ea100003ea4999a3ea833333eabcccc3eaf66663eb300003eb6999a3eba33333ebdcccc"
    "3ec166663ec500003ec8999a3ecc33333ecfcccc3ed366663ed700003eda999a3ede33333ee1cccc3ee56666"
    "3ee900003eec999a3ef033333ef3cccc3ef766663efb00003efe99993f01199a3f02e6663f04b3333f068000"
    "3f084ccc3f0a199a3f0be6663f0db3343f0f80003f114ccd3f13199a3f14e6663f16b3343f1880003f1a4ccd"
    "3f1c199a3f1de6663f1fb3343f2180003f234ccd3f25199a3f26e6663f28b3343f2a80003f2c4ccd3f2e199a"
    "3f2fe6663f31b3343f3380003f354ccd3f37199a3f38e6663f3ab3343f3c80003f3e4ccd3f40199a3f41e666"
    "3f43b3343f4580003f474ccc3f49199a3f4ae6663f4cb3343f4e80003f504ccc3f52199a3f53e6663f55b334"
    "3f5780003f594ccc3f5b199a3f5ce6663f5eb3343f6080003f624ccc3f64199a3f65e6663f67b3343f698000"
    "3f6b4ccc3f6d199a3f6ee6663f70b3343f7280003f744ccc3f76199a3f77e6663f79b3343f7b80003f7d4ccc"
    "3f7f199a"
)


def _float32(hexadecimal: str) -> torch.Tensor:
    """Return the float32 values whose big-endian bits are spelled in `hexadecimal`."""
    big_endian = torch.frombuffer(bytearray.fromhex(hexadecimal), dtype=torch.uint8)
    return big_endian.view(-1, 4).flip(1).contiguous().view(torch.float32).flatten()


def levels(quant_type: str, device_type: str = "cpu") -> torch.Tensor:
    """Return the value of each of the 16 codes, float32 [16] on the CPU.

    Code 8 of FP4 is a negative zero on CUDA, as bitsandbytes decodes it there.
    """
    if quant_type == "nf4":
        return _float32(_NF4_LEVELS)
    values = _float32(_FP4_LEVELS)
    if device_type == "cuda":
        values[8] = -0.0
    return values


def thresholds(quant_type: str, device_type: str = "cpu") -> torch.Tensor:
    """Return float32 [15], ascending: the rank of x among the levels is the count of T < x."""
    if quant_type == "nf4":
        return _float32(_NF4_THRESHOLDS_CUDA if device_type == "cuda" else _NF4_THRESHOLDS_CPU)
    return _float32(_FP4_THRESHOLDS_CUDA if device_type == "cuda" else _FP4_THRESHOLDS_CPU)


def codes_by_rank(quant_type: str, device_type: str = "cpu") -> torch.Tensor:
    """Return uint8 [16]: the codes, from that of the lowest level to that of the highest."""
    order = _NF4_ORDER
    if quant_type == "fp4":
        order = _FP4_ORDER_CUDA if device_type == "cuda" else _FP4_ORDER_CPU
    return torch.frombuffer(bytearray(order), dtype=torch.uint8)


def dynamic_map(*, signed: bool = True) -> torch.Tensor:
    """Return the 256 values of the dynamic eight-bit type, ascending, float32 [256] on the CPU."""
    return torch.frombuffer(bytearray(_dynamic_bytes(signed)), dtype=torch.float32)


@functools.cache
def _dynamic_bytes(signed: bool) -> bytes:  # noqa: FBT001
    """Return the map in the machine's order of bytes: every weight that is loaded has its own."""
    spelled = bytes.fromhex(_SIGNED_DYNAMIC_MAP if signed else _UNSIGNED_DYNAMIC_MAP)
    positive = struct.unpack(f">{len(spelled) // 4}f", spelled)
    negative = [-value for value in reversed(positive)] if signed else []
    return struct.pack("=256f", *negative, 0.0, *positive, 1.0)


def dynamic_thresholds(*, signed: bool = True) -> torch.Tensor:
    """Return float32 [255]: the index of the value nearest to x is the count of T < x.

    A midpoint itself belongs to the even index, as in bitsandbytes' search on CUDA: between an odd
    index and the even one above it, T is the float below the midpoint.
    """
    values = dynamic_map(signed=signed)
    midpoints = (values[:-1] + values[1:]) * 0.5
    midpoints[1::2] = torch.nextafter(midpoints[1::2], torch.full_like(midpoints[1::2], -torch.inf))
    return midpoints
