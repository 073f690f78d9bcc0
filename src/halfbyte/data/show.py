"""Rows token by token, learned ones in colour, as a terminal and as a web page show them."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from halfbyte.data.audit import Report, verdict
from halfbyte.data.chat import IGNORE_INDEX
from halfbyte.data.findings import Finding
from halfbyte.data.gather import Gathered, Split

_REPLACEMENT = "\ufffd"
# A character of UTF-8 is at most four bytes, so at most four tokens.
_MAX_JOINED = 4


@dataclass(frozen=True)
class Piece:
    """A token as text; several where only together they are a character.

    Args:
        text: As it is decoded.
        ids: The tokens.
        learned: Whether they are supervised.
        special: Whether it is an added token, such as the stop token.
    """

    text: str
    ids: tuple[int, ...]
    learned: bool
    special: bool


@dataclass(frozen=True)
class ShownRow:
    """One row of tokens, and where it comes from."""

    where: str
    pieces: tuple[Piece, ...]

    def __rich__(self) -> Text:
        """Return it in colour: learned green, the rest grey, added tokens reversed."""
        text = Text(f"{self.where}\n", style="bold")
        for piece in self.pieces:
            style = ("green" if piece.learned else "bright_black") + " not bold"
            text.append(visible(piece.text), style + (" reverse" if piece.special else ""))
            text.append("\n" if piece.text.endswith("\n") else "|", "not bold dim")
        return text


def shown_rows(gathered: Gathered, split: Split, count: int) -> list[ShownRow]:
    """Return the first `count` rows of a split."""
    tokenizer = gathered.encoder.tokenizer
    rows = split.rows
    edges = rows.offsets[: count + 1].tolist()
    return [
        ShownRow(
            split.source.row(int(number))[0],
            tuple(pieces(tokenizer, rows.input_ids[a:b].tolist(), rows.labels[a:b].tolist())),
        )
        for number, a, b in zip(rows.source[:count], edges, edges[1:], strict=False)
    ]


def pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]
) -> Iterator[Piece]:
    """Yield the tokens of a row as text, whole characters only."""
    added = tokenizer.added_tokens_decoder
    at = 0
    while at < len(ids):
        end, text = _whole(tokenizer, ids, at)
        yield Piece(text, tuple(ids[at:end]), labels[at] != IGNORE_INDEX, ids[at] in added)
        at = end


def _whole(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], at: int) -> tuple[int, str]:
    """Return where the character that begins with token `at` ends, and its text."""
    first = _decode(tokenizer, ids, at, at + 1)
    if _REPLACEMENT in first:
        for end in range(at + 2, min(at + _MAX_JOINED, len(ids)) + 1):
            text = _decode(tokenizer, ids, at, end)
            if _REPLACEMENT not in text:
                return end, text
    return at + 1, first


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int, end: int) -> str:
    """Decode some tokens as they read behind the one before: some decoders drop a first space."""
    before = list(ids[max(0, start - 1) : start])
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    lead = str(tokenizer.decode(before, **options)) if before else ""
    text = str(tokenizer.decode([*before, *ids[start:end]], **options))
    return (
        text[len(lead) :] if text.startswith(lead) else str(tokenizer.decode(list(ids[start:end])))
    )


def visible(text: str) -> str:
    """Return text with line ends and control characters made visible."""
    text = text.replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() or c == " " else f"\\x{ord(c):02x}" for c in text)


def page(report: Report, rows: dict[str, list[ShownRow]], title: str) -> str:
    """Return the report and the rows of each split as one HTML file that loads nothing."""
    parts = [f"<h1>{_escape(title)}</h1>", f"<p>{_escape(verdict(report))}</p>", _table(report)]
    parts += [_finding(finding) for finding in report.findings]
    for name, split in report.splits.items():
        most = max((bar.rows for bar in split.histogram), default=1)
        parts.append(f"<h2>lengths of {name} rows, in tokens</h2><table class=bars>")
        parts += [
            f"<tr><td>{bar.first:,} - {bar.last:,}"
            f"<td><i style='width:{100 * bar.rows / most:.1f}%'></i><td>{bar.rows:,}"
            for bar in split.histogram
        ]
        parts.append("</table>")
        for row in rows.get(name, []):
            spans = "".join(_span(piece) for piece in row.pieces)
            parts.append(f"<h3>{_escape(row.where)}</h3><pre>{spans}</pre>")
    body = "\n".join(parts)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{_escape(title)}</title><style>{_STYLE}</style><body>{body}</body></html>\n"
    )


def _table(report: Report) -> str:
    names = list(report.splits)
    keys = ("rows_read", "rows", "total_tokens", "supervised_tokens", "median", "p95", "max")
    head = "<tr><th>" + "".join(f"<th>{name}" for name in names)
    lines = [
        f"<tr><td>{key.replace('_', ' ')}"
        + "".join(f"<td>{getattr(report.splits[name], key):,}" for name in names)
        for key in keys
    ]
    stop = f"<p>stop token: <code>{_escape(report.stop)}</code></p>" if report.stop else ""
    return f"<table>{head}{''.join(lines)}</table>{stop}"


def _finding(finding: Finding) -> str:
    level = "allowed" if finding.allowed else finding.level.value
    examples = "".join(f"<li>{_escape(text)}" for text in finding.examples)
    said = f"<b class={level}>{level}</b> {_escape(f'{finding.name}: {finding.text}')}"
    return f"<div>{said}<ul>{examples}</ul></div>"


def _span(piece: Piece) -> str:
    kinds = " ".join(name for name, holds in (("l", piece.learned), ("s", piece.special)) if holds)
    line_end = "\n" if "\n" in piece.text else ""
    ids = " ".join(map(str, piece.ids))
    return f'<span class="{kinds}" title="{ids}">{_escape(visible(piece.text))}</span>{line_end}'


def _escape(text: str) -> str:
    """Return text that is text in HTML whatever it spells; half characters become U+FFFD."""
    return html.escape(text.encode("utf-8", "replace").decode(), quote=True)


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f6;padding:.7rem}"
    "pre span{color:#777;border-right:1px solid #ddd}pre .l{color:#0a6b2b;background:#dcf5e3}"
    "pre .s{outline:1px solid #999}td,th{padding:.1rem .7rem;text-align:right}"
    "td:first-child{text-align:left}.bars i{display:block;background:#69c;height:.8rem}"
    ".bars td:nth-child(2){width:30rem;text-align:left}.ruins{color:#b00}.warning,.allowed{color:"
    "#a60}.info{color:#06a}ul{margin:.2rem 0 1rem;color:#555}"
)
