"""The builds of a tenant, by what is asked of them."""

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.store import build_search
from coordinator.store.build_search import Search
from coordinator.tables import Build


def find_builds(tx: Session, caller: Caller, search: Search) -> tuple[list[Build], int]:
    """A page of the builds that the caller may see, and how many there are on all pages."""
    if caller.tenant_id is None:
        return [], 0
    return build_search.search_builds(tx, caller.tenant_id, search)
