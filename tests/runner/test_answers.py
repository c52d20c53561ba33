"""Whatever way an engine is away, it is one error; what it refuses is another matter."""

import http.client

import docker.errors
import pytest
import requests
import urllib3.exceptions

from runner.errors import EngineUnavailable
from runner.executor.answers import must_agree, must_answer

AWAY = [
    docker.errors.DockerException("no"),
    requests.exceptions.ConnectionError("no"),
    ConnectionResetError("no"),
    urllib3.exceptions.ProtocolError("cut off"),
    http.client.IncompleteRead(b"half"),
]


@pytest.mark.parametrize("asking", [must_answer, must_agree])
@pytest.mark.parametrize("error", AWAY, ids=lambda error: type(error).__name__)
def test_an_engine_that_does_not_answer_or_breaks_off_is_unavailable(asking, error):
    with pytest.raises(EngineUnavailable), asking():
        raise error


def test_what_the_engine_refuses_is_the_callers_to_judge():
    with pytest.raises(docker.errors.NotFound), must_answer():
        raise docker.errors.NotFound("no such container")


def test_a_refusal_that_nobody_judges_counts_as_no_answer():
    with pytest.raises(EngineUnavailable, match="refused: no such volume"), must_agree():
        raise docker.errors.APIError("no", explanation="no such volume")
