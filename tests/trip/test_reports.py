"""Many steps of one runner that start and end at the same moment tell it together."""

import json
import time

from runner.reporter import MOST_UNDER_WAY
from tests.factories import a_step
from tests.trip.faults import Wire
from tests.trip.stage import steps_of, until

STEPS = 24


class CountingWire(Wire):
    """Knows how many reports went in each request that had several."""

    def __init__(self, **faults):
        super().__init__(**faults)
        self.sizes = []

    def handle_request(self, request):
        if request.url.path.endswith("/reports"):
            said = json.loads(request.read())
            self.sizes.append(len(said["starts"]) + len(said["completions"]))
        return super().handle_request(request)


def test_steps_that_start_together_tell_it_together_and_none_runs_twice(stage):
    """Also when answers are lost, or requests arrive twice."""
    wire = CountingWire(lose={"reports": 2}, repeat={"reports": 3})
    record = stage.folder / "record"
    arrived = stage.gate.hold_before("start")
    spec = [a_step(f"s{number}", runScript=f"echo {number} >> {record}") for number in range(STEPS)]
    build = stage.submit(spec)
    stage.a_runner(slots=STEPS, wire=wire)
    assert arrived.wait(30)
    until(lambda: len(stage.gate.times_of("start")) == MOST_UNDER_WAY)
    time.sleep(1.0)  # the others have something to tell by now, and wait for a turn
    assert len(stage.gate.times_of("start")) == MOST_UNDER_WAY
    stage.gate.open()

    ended = stage.await_end(build["id"])

    assert ended["status"] == "SUCCESS", stage.tell(build["id"])
    assert sorted(map(int, record.read_text().split())) == list(range(STEPS))
    assert max(wire.sizes) > 1
    for step in steps_of(ended).values():
        assert step["attempt"] == 1
        assert stage.transitions(step["id"]) == ["step.claimed", "step.started", "step.finished"]
