"""Who is calling, and may they do this. Every route declares its policy; there is no default."""

from dataclasses import dataclass
from enum import StrEnum


class Audience(StrEnum):
    """Whom a route is for."""

    ANYONE = "anyone"
    USER = "user"
    ENROLMENT = "enrolment"
    RUNNER = "runner"
    STEP = "step"


@dataclass(frozen=True)
class Policy:
    """What a route demands of its caller: the audience and one permission of the documented set."""

    audience: Audience
    permission: str


@dataclass(frozen=True)
class Caller:
    """Who is calling, known by the credential alone.

    `tenant_id` None means: not bound to one (the local user, the administrator). `address` is the peer's.
    """

    actor: str
    audience: Audience
    address: str = ""
    tenant_id: str | None = None
    runner_id: str | None = None

    @property
    def sees_all_tenants(self) -> bool:
        return self.audience is Audience.USER and self.tenant_id is None

    def may_see_tenant(self, tenant_id: str) -> bool:
        return self.sees_all_tenants or self.tenant_id == tenant_id


SYSTEM = Caller(actor="system", audience=Audience.USER)
