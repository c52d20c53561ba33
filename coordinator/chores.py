"""What has to be done again and again: the watch, uploads nobody finished."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial

import structlog

from coordinator.actions.forget_secrets import forget_secrets
from coordinator.api.state import AppState
from coordinator.bell import READY
from coordinator.errors import CoordinatorError
from coordinator.store.kept_answers import delete_old_answers
from coordinator.store.login_counts import delete_old_counts
from coordinator.watch import Watch

log = structlog.get_logger()

EVERY_S = 1.0
SWEEP_EVERY_S = 600.0
UPLOAD_LIFE_S = 24 * 3600.0
MOST_BATCHES = 200


async def do_chores(state: AppState) -> None:
    """Until cancelled. A chore that fails is told and tried again; the others go on."""
    watch, swept_at = Watch(state), float("-inf")
    while True:
        await asyncio.sleep(EVERY_S)
        await _try(_look, state, watch)
        if time.monotonic() - swept_at > SWEEP_EVERY_S:
            swept_at = time.monotonic()
            await _try(_sweep_uploads, state)
            await _try(_forget_secrets, state)
            await _try(delete_old, state, delete_old_counts)
            await _try(delete_old, state, delete_old_answers)


async def _try(chore: Callable[..., Awaitable[None]], *about: object) -> None:
    try:
        await chore(*about)
    except (CoordinatorError, OSError) as error:
        log.warning("chore_failed", chore=chore.__name__, cause=str(error))
    except Exception:  # the last line of defence: without the chores no lease would ever run out
        log.exception("chore_failed", chore=chore.__name__)


async def _look(state: AppState, watch: Watch) -> None:
    moved = await watch.look()
    if moved:
        log.info("leases_expired", steps=moved)
        state.bell.ring(READY)


async def _sweep_uploads(state: AppState) -> None:
    await asyncio.to_thread(state.site.blobs.sweep, older_than_s=UPLOAD_LIFE_S, now_s=time.time())


async def _forget_secrets(state: AppState) -> None:
    await state.lanes.write(partial(forget_secrets, now=state.clock()))


async def delete_old(state: AppState, delete_some: Callable[..., int]) -> None:
    """Batch by batch, as others write in between; what is left waits for the next sweep."""
    for _ in range(MOST_BATCHES):
        if not await state.lanes.write(partial(delete_some, now=state.clock())):
            return
