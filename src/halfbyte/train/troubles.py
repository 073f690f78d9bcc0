"""The kinds of trouble that a run's numbers can show: what is seen, the likely cause, a way out."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from halfbyte.train.adapter_norms import AdapterNorms
from halfbyte.train.events import TrainingStarted

_HIGH_NORM = 10.0  # healthy fine-tuning stays near or below 1; clipping hides more, and heals none
_WINDOW = 10
_MEAN_STEPS = 5
_HIGH_NORM_STEPS = 3  # of a window: a single one is a strange batch
_SPIKES = 3
_SPIKE_STEPS = 100
_FLAT_STEPS = range(60, 600, 10)  # a run that is flat later on has converged
_FLAT_SHARE = 0.03  # a run that learns anything lowers its loss by more in its first hundred steps
_DEAD_STEPS = 20
_LARGE_UPDATE = 0.5  # of A's own size in one step: what A had learned is then mostly overwritten
_SMALL_UPDATE = 0.01  # of a step's learning rate: Adam moves a weight that has a gradient by ~ 1
_ONE_SOURCE = 0.9


@dataclass(frozen=True)
class Trouble:
    """What is wrong, in the words that the user reads."""

    name: str
    what: str
    cause: str
    advice: str


@dataclass
class History:
    """The steps of this process, oldest first.

    Attributes:
        best: The lowest mean loss of five steps.
        spikes: Positions of the steps that stood out.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    best: float = math.inf
    spikes: list[int] = field(default_factory=list)

    def add(self, loss: float, norm: float, rate: float) -> None:
        """Take in a step."""
        if self._stands_out(loss, norm):
            self.spikes.append(len(self.losses))
        self.losses.append(loss)
        self.norms.append(norm)
        self.rates.append(rate)
        if len(self.losses) >= _MEAN_STEPS:
            self.best = min(self.best, self.recent_loss())

    def recent_loss(self) -> float:
        """Return the mean loss of the last five steps."""
        return statistics.fmean(self.losses[-_MEAN_STEPS:])

    def _stands_out(self, loss: float, norm: float) -> bool:
        """Whether loss and gradient norm are both far above those of the twenty steps before."""
        losses, norms = self.losses[-2 * _WINDOW :], self.norms[-2 * _WINDOW :]
        if len(losses) < 2 * _WINDOW:
            return False
        middle = statistics.median(losses)
        spread = statistics.median(abs(value - middle) for value in losses)
        is_high = loss > max(1.5 * middle, middle + 8 * spread)
        return is_high and norm > 3 * statistics.median(norms)


def high_norm(history: History, rate: float) -> Trouble | None:
    """Gradient norms over 10, before clipping."""
    recent = history.norms[-_WINDOW:]
    high = [norm for norm in recent if norm > _HIGH_NORM]
    if len(high) < _HIGH_NORM_STEPS:
        return None
    return Trouble(
        "gradient_norm",
        f"the gradient norm was over {_HIGH_NORM:g} in {len(high)} of the last {len(recent)} steps "
        f"({max(high):.3g} at most)",
        "the learning rate is too high, or the rows are very unlikely to the model, as with a "
        "wrong chat template",
        f"look at rows with `halfbyte audit --show 3`, then try learning_rate {rate / 2:.1e}",
    )


def exploding_loss(history: History, rate: float) -> Trouble | None:
    """The mean loss of five steps far above the best that five steps had."""
    if len(history.losses) < 2 * _WINDOW:
        return None
    now, best = history.recent_loss(), history.best
    if now <= 1.5 * best + 0.5:
        return None
    return Trouble(
        "exploding_loss",
        f"the loss rose to {now:.3g}, from {best:.3g} at best",
        "the learning rate is too high, so that updates undo what was learned",
        f"go back to a checkpoint before that with learning_rate {rate / 3:.1e} and "
        "resume_with_changes: true, or warm up for longer",
    )


def loss_spikes(history: History, rate: float) -> Trouble | None:
    """Single steps whose loss and gradient norm both stand out from the twenty before."""
    first = max(0, len(history.losses) - _SPIKE_STEPS)
    spikes = [position for position in history.spikes[-_SPIKE_STEPS:] if position >= first]
    if len(spikes) < _SPIKES:
        return None
    return Trouble(
        "loss_spikes",
        f"the loss jumped {len(spikes)} times in the last {len(history.losses) - first} steps, to "
        f"{max(history.losses[i] for i in spikes):.3g}, each with a large gradient",
        "the learning rate is too high for bf16, whose products have three digits",
        f"try learning_rate {rate / 2:.1e}, or a larger gradient_accumulation_steps",
    )


def flat_loss(history: History, rate: float) -> Trouble | None:
    """A loss of which it is certain (two standard errors) that it has hardly fallen."""
    count = len(history.losses)
    if count not in _FLAT_STEPS:
        return None
    first, last = history.losses[: count // 4], history.losses[-(count // 4) :]
    start, now = statistics.fmean(first), statistics.fmean(last)
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / len(first))
    if now - start > error or start - now + 2 * error > _FLAT_SHARE * start:
        return None
    return Trouble(
        "flat_loss",
        f"the loss has not fallen in {count} steps: {start:.4g} at first, {now:.4g} now",
        "the learning rate is too low, or the rows teach nothing that the model does not know",
        f"try learning_rate {min(1.0, rate * 3):.1e}; `halfbyte audit --show 3` shows what is "
        "learned of a row",
    )


def vanishing_gradient(history: History, num_parameters: int, epsilon: float) -> Trouble | None:
    """Gradients so small that Adam's epsilon takes the place of their size."""
    recent = history.norms[-_WINDOW:]
    limit = epsilon * math.sqrt(num_parameters)
    if len(recent) < _WINDOW or max(recent) >= limit:
        return None
    return Trouble(
        "vanishing_gradient",
        f"the gradient norm was below {limit:.1e} in the last {len(recent)} steps, "
        f"{max(recent):.1e} at most",
        "hardly anything is learned of these rows, or the model answers them perfectly; below "
        "adam_epsilon an update vanishes",
        "look at the mask with `halfbyte audit --show 3`, or stop: the run has converged",
    )


def dead_adapters(
    history: History, first: Mapping[str, AdapterNorms], norms: Mapping[str, AdapterNorms]
) -> Trouble | None:
    """Adapters whose B is to the bit what it was when the run began."""
    if sum(rate > 0 for rate in history.rates) < _DEAD_STEPS:
        return None
    dead = [name for name, norm in norms.items() if norm.rms_b == first[name].rms_b]
    if not dead:
        return None
    whole = len(dead) == len(norms)
    return Trouble(
        "dead_adapters",
        f"{len(dead)} of {len(norms)} adapters have not moved in {len(history.rates)} steps, "
        f"such as {_short(dead[0])}",
        "no gradient reaches the adapters: nothing is supervised, or their layers are not used"
        if whole
        else "no token reaches these layers, as with experts that are never chosen",
        "check target_modules and the mask" if whole else "leave them out with exclude_modules",
    )


def small_updates(
    history: History, first: Mapping[str, AdapterNorms], norms: Mapping[str, AdapterNorms]
) -> Trouble | None:
    """Adapters that moved, but by far less than Adam moves a weight in a single step."""
    if sum(rate > 0 for rate in history.rates) < _DEAD_STEPS:
        return None
    limit = _SMALL_UPDATE * max(history.rates)
    small = [
        name
        for name, norm in norms.items()
        if 0 < norm.rms_b < limit and norm.rms_b != first[name].rms_b
    ]
    if 2 * len(small) <= len(norms):
        return None
    return Trouble(
        "vanishing_updates",
        f"the B of {len(small)} of {len(norms)} adapters is still below {limit:.1e} after "
        f"{len(history.rates)} steps",
        "their gradients are near adam_epsilon or mostly zero, so updates vanish",
        "check what is supervised with `halfbyte audit --show 3`; a smaller adam_epsilon lets "
        "small gradients count",
    )


def large_updates(
    history: History, norms: Mapping[str, AdapterNorms], rate: float
) -> Trouble | None:
    """A learning rate that is large beside A itself: Adam moves each weight by about as much."""
    shares = {n: history.rates[-1] / norm.rms_a for n, norm in norms.items() if norm.rms_a > 0}
    worst = max(shares, key=shares.__getitem__, default=None)
    if worst is None or shares[worst] <= _LARGE_UPDATE:
        return None
    return Trouble(
        "learning_rate",
        f"one step may change the A of {_short(worst)} by {shares[worst]:.0%} of its size",
        "the learning rate is too high for weights of this size, in bf16 more than ever",
        f"try learning_rate {rate * _LARGE_UPDATE / (5 * shares[worst]):.1e}: a tenth a step",
    )


def one_source(event: TrainingStarted) -> Trouble | None:
    """One of several files with nearly all that is learned."""
    sources: Mapping[str, int] = event.data.train.sources if event.data is not None else {}
    total = sum(sources.values())
    if len(sources) < 2 or not total:
        return None
    name = max(sources, key=sources.__getitem__)
    share = sources[name] / total
    if share <= _ONE_SOURCE:
        return None
    return Trouble(
        "one_source",
        f"{name} has {share:.0%} of the learned tokens of {len(sources)} files",
        "files are mixed by their size",
        f"take a part of it with split, as in train[:{max(1, round(100 / len(sources)))}%], or "
        "give the small ones several times",
    )


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.")
