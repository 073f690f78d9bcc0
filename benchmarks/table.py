"""Markdown tables from a result of `run.py`, so that no number is ever typed.

    python benchmarks/table.py results/h100/2026-11-22.json            # print
    python benchmarks/table.py results/h100/2026-11-22.json --into README.md

`--into` replaces what stands between `<!-- benchmarks -->` and `<!-- /benchmarks -->`.
"""

import argparse
import json
from pathlib import Path

import step_profile

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
NAMES = {"default": "default", "plain": "plain checkpointing", "off": "no checkpointing"}
PEERS = {
    "unsloth": "Unsloth", "transformers": "transformers + bitsandbytes + peft",
    "transformers+liger": "the same + Liger", "trl": "trl SFTTrainer",
}  # fmt: skip


def markdown(result: dict) -> str:
    """Return every table that the result has rows for."""
    parts = [heading(result["machine"])]
    for make in (
        steps_table,
        decode_table,
        kernel_table,
        cpu_kernel_table,
        load_table,
        other_rows,
        failures,
    ):
        parts += [text for text in [make(result["cases"])] if text]
    return "\n\n".join(parts) + "\n"


def heading(machine: dict) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    where = machine["card"] or machine["cpu"]
    return f"{where}, {machine['date']}, commit {machine['commit']}. {versions}."


def rows_of(cases: dict, *groups: str) -> list[dict]:
    """Return the rows of the cases of these groups."""
    return [
        row for case in cases.values() if case["group"] in groups for row in case.get("rows", ())
    ]


def grid(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def contestant(row: dict) -> str:
    if "memory" in row:
        compute = row.get("compute", "bf16")
        return f"Halfbyte, {row['memory']}" + (f", {compute}" if compute != "bf16" else "")
    return f"{PEERS.get(row['impl'], row['impl'])}, {NAMES[row['checkpointing']]}"


def steps_table(cases: dict) -> str:
    """Tokens a second and peak memory: cases down, contestants across; the fastest is bold."""
    cells: dict[str, dict[str, dict]] = {}
    columns: list[str] = []
    for row in rows_of(cases, "steps"):
        if "case" not in row:
            continue
        line = row["case"] + (f", dropout {row['dropout']}" if row.get("dropout") else "")
        cells.setdefault(line, {})[contestant(row)] = row
        columns += [contestant(row)] * (contestant(row) not in columns)
    body = []
    for line, found in cells.items():
        best = max(row.get("tokens_per_second", 0) for row in found.values())
        body.append([line, *(step_cell(found.get(name), best) for name in columns)])
    return grid(["batch x tokens", *columns], body) if body else ""


def step_cell(row: dict | None, best: float) -> str:
    if row is None:
        return ""
    if "error" in row:
        return "out of memory" if "memory" in row["error"] else "failed"
    rate = f"{row['tokens_per_second']:,}"
    rate = f"**{rate}**" if row["tokens_per_second"] == best else rate
    return f"{rate} ({row['peak_gib']} GiB)"


def decode_table(cases: dict) -> str:
    body = [
        ["transformers" if "impl" in row else "Halfbyte", str(row["batch"]),
         f"{row['tokens_per_second']:,}"]
        for row in rows_of(cases, "decode") if "tokens_per_second" in row
    ]  # fmt: skip
    return grid(["decoding with an adapter", "batch", "tokens/s"], body) if body else ""


def kernel_table(cases: dict) -> str:
    """Each kernel against its limit and its twin."""
    body = []
    for row in rows_of(cases, "kernels"):
        if "us" not in row:
            continue
        tb = row.get("tb_per_second")
        rate = f"{tb} TB/s" if tb is not None else f"{row['tflop_per_second']} TFLOP/s"
        twin = f"{row['twin_us']:,} ({row['twin']})" if "twin" in row else ""
        of_limit = f"{100 * row['of_limit']:.0f} %"
        body.append([row["kernel"], row["shape"], f"{row['us']:,}", rate, of_limit, twin])
    return grid(["kernel", "shape", "us", "rate", "of limit", "peer, us"], body) if body else ""


def profile_table(cases: dict) -> str:
    rows = [row for row in rows_of(cases, "kernels") if "kinds" in row]
    return "\n\n".join(step_profile.table(row) for row in rows)


def cpu_kernel_table(cases: dict) -> str:
    """The CPU kernels of each contestant, median of 1e9 elements a second."""
    rows = [row for row in rows_of(cases, "cpu") if "rates" in row]
    body = [
        [row["case"], ", ".join(f"{name} {rate['median']}" for name, rate in row["rates"].items())]
        for row in rows
    ]
    return grid(["CPU kernel", "1e9 elements/s"], body) if body else ""


def load_table(cases: dict) -> str:
    body = [
        [f"{row['case']}, {row['device']}", f"{row['gb']} GB", f"{row['bare_read_s']} s",
         f"{row['load_s']} s", str(row["ratio"])]
        for row in rows_of(cases, "loading", "cpu") if "bare_read_s" in row
    ]  # fmt: skip
    return grid(["loading into 4 bits", "bf16", "bare read", "load", "ratio"], body) if body else ""


def other_rows(cases: dict) -> str:
    """What has no table of its own: a line of the numbers of each row."""
    lines = []
    for name, case in cases.items():
        if case["group"] in ("compiling", "loss", "memory", "cpu"):
            for row in case.get("rows", ()):
                if not {"bare_read_s", "rates"} & row.keys():
                    facts = [f"{k} {v}" for k, v in row.items() if isinstance(v, int | float | str)]
                    lines.append(f"- {name}: {', '.join(facts)}")
    return "\n".join(lines)


def failures(cases: dict) -> str:
    lines = [f"- {n}: {c['status']}" for n, c in cases.items() if c["status"] != "ok"]
    return "\n".join(["Not run to the end:", "", *lines]) if lines else ""


def replaced(text: str, table: str) -> str:
    """Return the text with the table between the marks.

    Raises:
        SystemExit: The marks are missing.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"expected {BEGIN} and {END} in the file")
    return f"{head}{BEGIN}\n{table}{END}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--into", type=Path)
    args = parser.parse_args()
    table = markdown(json.loads(args.result.read_text(encoding="utf-8")))
    if args.into is None:
        print(table, end="")
    else:
        text = args.into.read_text(encoding="utf-8")
        args.into.write_text(replaced(text, table), encoding="utf-8")


if __name__ == "__main__":
    main()
