"""What the numbers of a run say about it: each trouble once, with its likely cause and a way out.

Nothing is computed for this but the size of the adapters, at logging steps that are at least
`PROBE_STEPS` apart; the rest is what is logged anyway.
"""

from collections.abc import Callable, Mapping

from halfbyte.train.adapter_norms import AdapterNorms, AdapterProbe
from halfbyte.train.config import TrainConfig
from halfbyte.train.events import Event, HealthFinding, StepFinished, TrainingStarted
from halfbyte.train.troubles import (
    History,
    Trouble,
    dead_adapters,
    exploding_loss,
    flat_loss,
    high_norm,
    large_updates,
    loss_spikes,
    one_source,
    small_updates,
    vanishing_gradient,
)

PROBE_STEPS = 10


class HealthMonitor:
    """A listener that tells of a `HealthFinding`, each kind once.

    Args:
        config: Named in the advice.
        num_parameters: Trained elements.
        probe: Measures the adapters.
        log_every: Steps between two logged ones; 0 for never.
        tell: Where findings go.
    """

    def __init__(
        self,
        config: TrainConfig,
        num_parameters: int,
        probe: AdapterProbe,
        *,
        log_every: int,
        tell: Callable[[Event], None],
    ) -> None:
        self._config, self._num_parameters = config, num_parameters
        self._probe, self._log_every, self._tell = probe, log_every, tell
        self._history = History()
        self._first_norms: dict[str, AdapterNorms] = {}
        self._first_step = self._probed_step = 0
        self._told: set[str] = set()

    def __call__(self, event: Event) -> None:
        """Look at a step."""
        if isinstance(event, TrainingStarted):
            self._first_step = self._probed_step = event.first_step
            self._probe.measure()
            self._first_norms = self._probe.read() or {}
            self._report(event.first_step, one_source(event))
        elif isinstance(event, StepFinished):
            self._history.add(event.loss, event.grad_norm, event.learning_rate)
            for finding in self._of_steps():
                self._report(event.step, finding)
            for finding in self._of_adapters(self._probe.read()):
                self._report(event.step, finding)
            is_logged = self._log_every and event.step % self._log_every == 0
            if is_logged and event.step - self._probed_step >= PROBE_STEPS:
                self._probed_step = event.step
                self._probe.measure()

    def _report(self, step: int, finding: Trouble | None) -> None:
        if finding is not None and finding.name not in self._told:
            self._told.add(finding.name)
            self._tell(
                HealthFinding(step, finding.name, finding.what, finding.cause, finding.advice)
            )

    def _of_steps(self) -> list[Trouble | None]:
        rate = self._config.learning_rate
        return [
            high_norm(self._history, rate),
            exploding_loss(self._history, rate),
            loss_spikes(self._history, rate),
            vanishing_gradient(self._history, self._num_parameters, self._config.adam_epsilon),
            flat_loss(self._history, rate) if self._first_step == 0 else None,
        ]

    def _of_adapters(self, norms: Mapping[str, AdapterNorms] | None) -> list[Trouble | None]:
        if not norms:
            return []
        return [
            dead_adapters(self._history, self._first_norms, norms),
            small_updates(self._history, self._first_norms, norms),
            large_updates(self._history, norms, self._config.learning_rate),
        ]
