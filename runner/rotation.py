"""A new secret for this runner, when the coordinator asks for one.

The runner makes the secret itself and tells its digest. It writes it down before it tells anybody, and lets
the former one go before it uses the new one; the coordinator takes the former one until then. Wherever this
is cut short, what is on the disk counts, and the coordinator asks again.
"""

import hashlib
import secrets
from dataclasses import replace
from pathlib import Path

import structlog

from runner.client import Client
from runner.errors import BadSetup, LeaseLost, Refused, Unreachable
from runner.state_dir import load_identity, save_identity
from shared.protocol import NewSecret

log = structlog.get_logger()


def rotate_secret(client: Client, state: Path) -> bool:
    """Take a new secret; False when that could not be done now, and the present one goes on counting."""
    try:
        identity = load_identity(state)
        if identity is None:
            raise BadSetup(f"{state / 'identity.json'} is not there any more")
        following = identity.next_secret or secrets.token_urlsafe(32)
        # the same one each time: of two that are told, the one that arrives last is what counts
        save_identity(state, replace(identity, next_secret=following))
        client.rotate(NewSecret(secret_sha256=hashlib.sha256(following.encode()).hexdigest()))
        save_identity(state, replace(identity, secret=following, next_secret=""))
    except (Unreachable, Refused, LeaseLost, BadSetup, OSError) as error:
        log.warning("secret_not_rotated", cause=str(error))
        return False
    client.use_secret(following)
    log.info("secret_rotated", runner=identity.runner_id)
    return True
