"""Onto which form of the base: what is measured decides, and says why.

The measure is the KL divergence from what was trained (`halfbyte.export.measure`). It is not the
loss: whatever was found good about a run was found with the adapter on its 4-bit base, and the
merge is to be that same model. On a few thousand tokens the divergence also tells candidates apart
that the loss cannot. Where the loss says otherwise, the words do too.
"""

from dataclasses import dataclass

from halfbyte.errors import DeviceError
from halfbyte.export.config import Form
from halfbyte.export.measure import Measurement, measure
from halfbyte.export.source import Source

_NAMES: dict[Form, str] = {
    "dequantized": "the dequantized base",
    "original": "the original base",
    "quantized": "the original base, quantized again",
}


@dataclass(frozen=True)
class Choice:
    """What the adapter is added to, and why.

    Attributes:
        onto: The form that was chosen.
        reason: Why, in a sentence.
        measured: What was measured; None if nothing was.
    """

    onto: Form
    reason: str
    measured: Measurement | None = None

    def words(self) -> list[str]:
        """Return the reason, and what the measurements say, a sentence each."""
        if self.measured is None:
            return [self.reason]
        found, reference = self.measured.candidates, self.measured.reference_loss
        said = [
            self.reason,
            f"Measured on {self.measured.tokens:,} supervised tokens of {self.measured.rows:,} "
            f"rows; the adapter on its base has a loss of {reference:.4f}.",
        ]
        for form, one in found.items():
            said.append(
                f"Onto {_NAMES[form]}: KL {one.kl:.2g} (±{one.kl_error:.1g}) nats a token, loss "
                f"{one.loss:.4f} ({one.loss - reference:+.4f}), the same likeliest token in "
                f"{one.agreement:.1%}."
            )
        best = min(found, key=lambda form: found[form].loss)
        if best != self.onto and found[best].loss < reference:
            said.append(
                f"On these rows {_NAMES[best]} has the lower loss, also than what was trained: "
                f"onto={best} takes it."
            )
        return said


def choose(source: Source) -> Choice:
    """Return what to merge onto: as the settings say, or for "auto" what measures better.

    Raises:
        AdapterError: the form asked for cannot be had.
        DataError: the rows to measure on cannot be read.
    """
    asked = source.config.onto
    if asked in ("original", "quantized"):
        source.merger(asked)  # raises where the 16-bit base is missing
    possible = _possible(source)
    measured, obstacle = None, "no rows were given to measure on"
    if source.config.data is not None:
        forms = possible if asked == "auto" or asked in possible else [*possible, asked]
        try:
            measured = measure(source, forms)
        except DeviceError as error:
            obstacle = error.message
    if asked != "auto":
        why = f"Merged onto {_NAMES[asked]}, as asked for."
        return Choice(asked, why if measured else f"{why} Not measured: {obstacle}.", measured)
    if len(possible) == 1:
        only = "is there in 4 bits only" if source.is_packed else "was held in 16 bits by training"
        return Choice(possible[0], f"Merged onto {_NAMES[possible[0]]}: the base {only}.", measured)
    if measured is None:
        why = f"it is what training saw. Not measured: {obstacle}."
        return Choice("dequantized", f"Merged onto {_NAMES['dequantized']}: {why}")
    return _nearer(measured)


def _possible(source: Source) -> list[Form]:
    """Return the plain forms between which there is a choice."""
    if source.is_packed:
        return ["dequantized"]
    if source.config.onto == "original" and source.config.data is None:
        return ["original"]  # how training held the base need not be known then
    return ["original"] if source.recipe is None else ["dequantized", "original"]


def _nearer(measured: Measurement) -> Choice:
    best, other = sorted(measured.candidates, key=lambda form: measured.candidates[form].kl)[:2]
    near, far = measured.candidates[best].kl, measured.candidates[other].kl
    return Choice(
        best,
        f"Merged onto {_NAMES[best]}: it is nearer to what was trained, with a KL divergence of "
        f"{near:.2g} nats a token against {far:.2g} for {_NAMES[other]}.",
        measured,
    )
