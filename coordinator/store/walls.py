"""The second wall between tenants: where the database can, it hides the rows of others by itself.

Every question that a user asks carries its tenant already. Should one forget it, the database answers as if
the rows of other tenants did not exist: for the time of the transaction it takes on a role without rights
of its own, for which each table has a policy. What the coordinator does by itself, and what runners do,
stands before the wall.
"""

from collections.abc import Collection

from sqlalchemy import text
from sqlmodel import Session

from coordinator.store.dialect import has_row_policies

ROLE = "buildmill_tenant"
TENANTS = "buildmill.tenants"
COMMONS = "buildmill.commons"


def are_up(tx: Session) -> bool:
    """Whether this database has the role, and lets us take it on."""
    if not has_row_policies(tx):
        return False
    statement = text(
        "SELECT EXISTS (SELECT 1 FROM pg_roles WHERE rolname = :role AND pg_has_role(oid, 'MEMBER'))"
    )
    return bool(tx.connection().execute(statement, {"role": ROLE}).scalar_one())


def stand_behind(tx: Session, tenant_ids: Collection[str], commons: str | None) -> None:
    """Until the transaction ends, only the rows of these tenants are there, and the common ones."""
    statement = text(
        "SELECT set_config(:tenants_name, :tenants, true), set_config(:commons_name, :commons, true), "
        "set_config('role', :role, true)"
    )
    tx.connection().execute(
        statement,
        {
            "tenants_name": TENANTS,
            "tenants": ",".join(sorted(tenant_ids)),
            "commons_name": COMMONS,
            "commons": commons or "",
            "role": ROLE,
        },
    )
