"""The metrics in the text format of Prometheus; the only file that knows this format."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from coordinator.actions.take_measure import Measure, RunnerMeasure
from coordinator.tally import Tally

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Sample:
    """One value under its labels."""

    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


OF_EACH_RUNNER: Mapping[str, tuple[str, Callable[[RunnerMeasure], float]]] = {
    "runner_online": ("1 while the runner is heard", lambda runner: runner.is_online),
    "runner_free_slots": ("Steps that the runner could take", lambda runner: runner.free_slots),
    "runner_disk_free_bytes": (
        "Bytes free on the disk of the runner's state folder",
        lambda runner: runner.disk_free,
    ),
    "runner_low_disk": (
        "1 while the runner takes no steps because too little of its disk is free",
        lambda runner: runner.has_low_disk,
    ),
    "runner_paused_seconds": (
        "For how long the runner takes no steps because its machine keeps failing",
        lambda runner: runner.paused_for_s,
    ),
}


def render_metrics(measure: Measure, tally: Tally, waiting: Mapping[str, int]) -> str:
    """Every family with its help, its type and its samples."""
    online = [runner for runner in measure.runners if runner.is_online]
    return "".join(
        [
            _family("builds", "gauge", "Builds by state", _by("state", measure.builds)),
            _family(
                "steps", "gauge", "Steps that wait for a runner or have one", _by("state", measure.steps)
            ),
            _family(
                "oldest_ready_step_age_seconds",
                "gauge",
                "How long the step has waited that became ready first",
                [Sample(measure.oldest_ready_s)],
            ),
            _family(
                "runners",
                "gauge",
                "Runners heard lately, by condition; one may have several",
                _by("condition", _conditions(online)),
            ),
            *_of_each_runner(measure.runners),
            _family(
                "audit_unsealed_rows",
                "gauge",
                "Rows of the audit trail that have no place in its chains yet",
                [Sample(measure.unsealed)],
            ),
            _family(
                "audit_unsealed_age_seconds",
                "gauge",
                "How long the first of these rows has waited",
                [Sample(measure.unsealed_for_s)],
            ),
            _family(
                "claims_total",
                "counter",
                "Steps handed to runners by this process since its start",
                [Sample(tally.claims)],
            ),
            _family(
                "completions_total",
                "counter",
                "Completions that this process accepted since its start",
                _by("status", {"failed": 0, "success": 0} | tally.completions),
            ),
            _family(
                "database_waiting",
                "gauge",
                "Transactions that wait for a connection",
                _by("lane", waiting),
            ),
        ]
    )


def _conditions(online: Iterable[RunnerMeasure]) -> dict[str, int]:
    runners = list(online)
    return {
        "online": len(runners),
        "draining": sum(runner.is_draining for runner in runners),
        "low_disk": sum(runner.has_low_disk for runner in runners),
        "paused": sum(runner.paused_for_s > 0 for runner in runners),
    }


def _of_each_runner(runners: Iterable[RunnerMeasure]) -> Iterable[str]:
    """One sample for each runner, under its id and its name."""
    labelled = [(runner, {"id": runner.id, "name": runner.name}) for runner in runners]
    for name, (meaning, value_of) in OF_EACH_RUNNER.items():
        samples = [Sample(value_of(runner), labels) for runner, labels in labelled]
        yield _family(name, "gauge", meaning, samples)


def _by(label: str, values: Mapping[str, int]) -> list[Sample]:
    return [Sample(value, {label: str(key)}) for key, value in sorted(values.items())]


def _family(name: str, kind: str, meaning: str, samples: Iterable[Sample]) -> str:
    full = f"buildmill_{name}"
    lines = [f"# HELP {full} {meaning}", f"# TYPE {full} {kind}"]
    lines += [f"{full}{_labels(sample.labels)} {_number(sample.value)}" for sample in samples]
    return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
