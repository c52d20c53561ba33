"""What an engine says, or fails to say: all the ways in which it is away become one error."""

import http.client
from collections.abc import Iterator
from contextlib import contextmanager

import docker.errors
import requests
import urllib3.exceptions

from runner.errors import EngineUnavailable


@contextmanager
def must_answer() -> Iterator[None]:
    """What the engine refuses is the caller's to judge."""
    try:
        yield
    except docker.errors.APIError:
        raise
    except (docker.errors.DockerException, requests.exceptions.RequestException, OSError) as error:
        raise EngineUnavailable(f"the container engine does not answer: {error}") from error
    except (urllib3.exceptions.HTTPError, http.client.HTTPException) as error:  # cut off in mid-answer
        raise EngineUnavailable(f"the container engine broke off its answer: {error!r}") from error


@contextmanager
def must_agree() -> Iterator[None]:
    """An engine that refuses, where the caller does not judge that himself, counts as one that is away."""
    try:
        with must_answer():
            yield
    except docker.errors.APIError as error:
        raise EngineUnavailable(f"the engine refused: {error.explanation or error}") from error
