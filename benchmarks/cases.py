"""What `run.py` can run: each case is one script, in a process of its own, with what it needs.

`{checkpoint}` in a command stands for the random bf16 checkpoint that all contestants load,
`{steps}` for the steps that are timed.
"""

from dataclasses import dataclass

STEP_SHAPES = "2x1024,4x2048"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command of this folder.

    Attributes:
        group: What it belongs to, one of `GROUPS`.
        command: Script and arguments, after the Python interpreter.
        needs: "gpu", "checkpoint", or modules that must be installed.
        is_quick: Whether `--quick` runs it too.
        timeout_s: Seconds after which it is ended.
    """

    name: str
    group: str
    command: str
    needs: tuple[str, ...] = ("gpu",)
    is_quick: bool = False
    timeout_s: int = 600


GROUPS = {
    "steps": "Training steps",
    "decode": "Decoding",
    "kernels": "Kernels",
    "loading": "Loading",
    "compiling": "Compiling",
    "loss": "Loss curves",
    "memory": "Memory",
    "cpu": "On a CPU",
}

_OURS = "gpu_step.py --checkpoint {checkpoint} --steps {steps}"
_PEER = "peers_step.py --model {checkpoint} --steps {steps}"
_STEPS = {
    "ours": (f"{_OURS} --shapes {STEP_SHAPES},1x8192 --memory auto,lean", (), True),
    "unsloth-default": (
        f"{_PEER} --impl unsloth --shapes {STEP_SHAPES},1x8192", ("unsloth",), True,
    ),
    "unsloth-best": (
        f"{_PEER} --impl unsloth --checkpointing off --shapes {STEP_SHAPES}", ("unsloth",), True,
    ),
    "transformers-default": (f"{_PEER} --impl transformers", ("bitsandbytes",), False),
    "transformers-best": (
        f"{_PEER} --impl transformers --liger --checkpointing off",
        ("bitsandbytes", "liger_kernel"), False,
    ),
    "trl-default": (f"{_PEER} --impl trl", ("bitsandbytes", "trl"), False),
    "ours-lengths": (f"{_OURS} --shapes lengths --steps 120", (), True),
    "unsloth-lengths": (
        f"{_PEER} --impl unsloth --checkpointing off --shapes lengths", ("unsloth",), False,
    ),
    "ours-fp8": (f"{_OURS} --compute fp8 --shapes {STEP_SHAPES}", (), True),
    "ours-dropout": (f"{_OURS} --dropout 0.05 --shapes {STEP_SHAPES}", (), True),
    "unsloth-dropout": (f"{_PEER} --impl unsloth --dropout 0.05", ("unsloth",), False),
    "ours-long": (
        f"{_OURS} --steps 3 --memory auto,lean"
        " --shapes 1x1024,1x2048,1x4096,1x16384,1x32768,1x65536", (), False,
    ),
}  # fmt: skip
_GPU = {
    "decode-ours": ("decode", "decode.py --batches 1,8 --new-tokens 128", ()),
    "decode-transformers": (
        "decode", "peers_step.py --impl transformers --generate 64 --model {checkpoint}",
        ("checkpoint", "bitsandbytes"),
    ),
    "kernels": ("kernels", "kernels_gpu.py", ()),
    "step-profile": ("kernels", "step_profile.py --shape 4x2048", ()),
    "load-warm": ("loading", "load_speed.py --model {checkpoint}", ("checkpoint",)),
    "compile": ("compiling", "compile_time.py", ()),
    "loss-curve": (
        "loss", "loss_curve.py --shape llama1b --device cuda", ("bitsandbytes", "peft"),
    ),
    "memory-plan": ("memory", "memory_plan.py", ()),
    "paging": ("memory", "paging.py", ()),
    "out-of-memory": ("memory", "oom.py", ()),
    "large-models": ("memory", "large_models.py", ()),
}  # fmt: skip
_CPU = {
    "cpu-kernels": ("kernels_cpu.py --repeats {steps}", (), True),
    "cpu-step": ("cpu_step.py", ("bitsandbytes",), False),
    "cpu-load": ("load_speed.py --device cpu --shape llama1b --layers 8 --cold", (), False),
    "cpu-load-memory": ("load_rss.py", (), False),
    "cpu-loss-curve": ("loss_curve.py --shape small --device cpu", ("bitsandbytes", "peft"), False),
}

CASES = tuple(
    [
        Case(name=n, group="steps", command=c, needs=("gpu", "checkpoint", *needs), is_quick=quick)
        for n, (c, needs, quick) in _STEPS.items()
    ]
    + [
        Case(name=n, group=g, command=c, needs=("gpu", *needs), is_quick=g in ("decode", "kernels"))
        for n, (g, c, needs) in _GPU.items()
    ]
    + [
        Case(name=n, group="cpu", command=c, needs=needs, is_quick=quick)
        for n, (c, needs, quick) in _CPU.items()
    ]
)
