"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server. Any thread may count."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"imsm_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"imsm_{name}", text, buckets=_SECONDS, registry=registry)

        self.requests = counter("requests", "Requests by path and the status of their answer", "path", "status")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts, of texts that have begun")
        self.held_tokens = counter("cached_prompt_tokens", "Tokens of prompts that the prefix cache had")
        self.new_tokens = counter("generated_tokens", "Tokens that were generated")
        self.texts = counter("texts", "Texts by how they ended", "ended")
        self.step_failures = counter("step_failures", "Steps of the model that failed")
        self.first_token = histogram("time_to_first_token_seconds", "From a request to its first token")
        self.between_tokens = histogram("time_per_token_seconds", "From a token to the next one of the same text")
        self.whole = histogram("text_seconds", "From a request to the end of a text")

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Tell a value that is asked for when it is read."""
        Gauge(f"imsm_{name}", text, registry=self._registry).set_function(value)

    def told(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self._registry)
