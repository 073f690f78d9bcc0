"""What the server counts, for Prometheus.

One registry a server, so that two in one process do not mix.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server; thread-safe."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "halfbyte_requests", "Answers that ended, by how.", ["model", "outcome"],
            registry=registry,
        )  # fmt: skip
        self.refused = Counter(
            "halfbyte_requests_refused", "Requests that were not taken, by HTTP status.",
            ["status"], registry=registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "halfbyte_prompt_tokens", "Prompt tokens read.", ["model"], registry=registry
        )
        self.generation_tokens = Counter(
            "halfbyte_generation_tokens", "Tokens generated.", ["model"], registry=registry
        )
        self.waiting = Gauge("halfbyte_answers_waiting", "Answers in queue.", registry=registry)
        self.running = Gauge("halfbyte_answers_running", "Answers in slots.", registry=registry)
        self.slots = Gauge("halfbyte_slots", "Most answers at once.", registry=registry)
        self.adapters = Gauge("halfbyte_adapters", "Adapters loaded.", registry=registry)
        self.first_token = Histogram(
            "halfbyte_time_to_first_token_seconds", "From arrival to the first token.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.latency = Histogram(
            "halfbyte_answer_seconds", "From arrival to the last token.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.step = Histogram(
            "halfbyte_step_seconds", "One more token in every running answer.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self._registry)
