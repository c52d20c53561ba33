"""A runner in this process whose coordinator is played by the test; scripts are processes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from runner.agent import Agent
from runner.cli import make_agent
from runner.client import Client
from runner.settings import Settings
from runner.state_dir import Identity, save_identity

ADDRESS = "http://coordinator.test"


def an_agent(
    state: Path, answer: Callable[[httpx.Request], httpx.Response], *, once: bool = False, **wishes: Any
) -> Agent:
    """It is registered already; `wishes` are the settings that the test wants otherwise."""
    save_identity(state, Identity("runner-1", "the-secret", ADDRESS))
    settings = Settings(coordinator=ADDRESS, state=state, executor="process", **wishes)
    connect = partial(Client, transport=httpx.MockTransport(answer))
    return make_agent(settings, once=once, connect=connect)
