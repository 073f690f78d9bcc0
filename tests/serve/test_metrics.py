"""Counters are Prometheus' text, and two servers do not share them."""

from prometheus_client.parser import text_string_to_metric_families

from halfbyte.serve.metrics import Metrics


def test_what_is_counted_is_in_the_text():
    first, second = Metrics(), Metrics()
    first.requests.labels("red", "stop").inc()
    first.step.observe(0.02)
    families = {f.name: f for f in text_string_to_metric_families(first.text().decode())}
    samples = families["halfbyte_requests"].samples
    assert [s.value for s in samples if s.name.endswith("_total")] == [1.0]
    assert samples[0].labels == {"model": "red", "outcome": "stop"}
    assert b'model="red"' not in second.text()
