"""The names of optimizers, as in transformers' `optim`, and what each means."""

# Name: bits of the state, and whether it is paged.
OPTIMIZERS: dict[str, tuple[int, bool]] = {
    "adamw": (32, False),
    "adamw_torch": (32, False),
    "adamw_torch_fused": (32, False),
    "adamw_32bit": (32, False),
    "adamw_8bit": (8, False),
    "adamw_bnb_8bit": (8, False),
    "paged_adamw_32bit": (32, True),
    "paged_adamw_8bit": (8, True),
}
