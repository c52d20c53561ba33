"""Who is calling, and may they do this. Every route declares its policy; there is no default."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from coordinator.errors import Denied


class Audience(StrEnum):
    """Whom a route is for."""

    ANYONE = "anyone"
    USER = "user"
    ENROLMENT = "enrolment"
    RUNNER = "runner"
    STEP = "step"


class Scope(StrEnum):
    """What decides about which tenant a request of a user is."""

    NOTHING = "nothing"
    """It is about none: the caller itself, or what is public."""
    INSTALLATION = "installation"
    """It is about all of them: for the operator only."""
    RESOURCE = "resource"
    """The tenant is that of the project, build, image or account that is named."""
    TENANT = "tenant"
    """The header chooses; a member of only one tenant need not."""
    HEADER = "header"
    """The header chooses and is a must."""


@dataclass(frozen=True)
class Policy:
    """What a route demands of its caller: the audience, one permission of the documented set, the scope."""

    audience: Audience
    permission: str
    scope: Scope = Scope.NOTHING


@dataclass(frozen=True)
class Caller:
    """Who is calling, known by the credential alone.

    `tenant_id` is the one that the request is about, where the credential or the header has settled that.
    `grants` are the permissions in each tenant the caller belongs to; None means: everything, everywhere (the
    local user, the operator). `permission` is the one that the route asks for. `address` is the peer's.
    `expires_at` is when the credential stops to count.
    """

    actor: str
    audience: Audience
    address: str = ""
    tenant_id: str | None = None
    runner_id: str | None = None
    enrolment_token_id: str | None = None
    user_id: str | None = None
    grants: Mapping[str, frozenset[str]] | None = None
    permission: str = ""
    credential: str = field(default="", repr=False)
    expires_at: datetime | None = None

    @property
    def is_operator(self) -> bool:
        return self.audience is Audience.USER and self.grants is None

    @property
    def sees_all_tenants(self) -> bool:
        return self.is_operator and self.tenant_id is None

    @property
    def tenants(self) -> frozenset[str] | None:
        """The tenants whose rows there are for this caller; None for who is kept from none."""
        if self.audience is not Audience.USER or self.sees_all_tenants:
            return None
        return frozenset({self.tenant_id}) if self.tenant_id is not None else frozenset(self.grants or ())

    def may_see_tenant(self, tenant_id: str) -> bool:
        if self.tenant_id is not None:
            return self.tenant_id == tenant_id
        return self.sees_all_tenants or (self.grants is not None and tenant_id in self.grants)

    def may_administer(self, tenant_id: str | None) -> bool:
        """Also what belongs to no tenant and serves all of them: that is the operator's, who names none."""
        return self.sees_all_tenants if tenant_id is None else self.may_see_tenant(tenant_id)

    def may(self, permission: str, tenant_id: str) -> bool:
        return self.grants is None or permission in self.grants.get(tenant_id, frozenset())

    def require_in(self, tenant_id: str) -> None:
        """Denied unless the caller may do in this tenant what the route is for."""
        if self.permission and not self.may(self.permission, tenant_id):
            reason = f"this needs the permission {self.permission}"
            raise Denied(reason, actor=self.actor, tenant_id=tenant_id)


SYSTEM = Caller(actor="system", audience=Audience.USER)
