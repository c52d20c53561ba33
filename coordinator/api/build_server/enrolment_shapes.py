"""What enrolment tokens look like on the wire."""

from datetime import datetime
from typing import Annotated

from pydantic import Field

from coordinator.access_tables import EnrolmentToken
from coordinator.api.build_server.shapes import Input, Moment, Shape
from coordinator.rules.enrolment import DEFAULT_LIFETIME, MAX_LIFETIME, MAX_USES, TokenState, state_of
from shared.protocol import Label


class EnrolmentCreate(Input):
    name: Annotated[str, Field(min_length=1, max_length=100, description="What the token is for")]
    labels: Annotated[
        list[Label] | None,
        Field(max_length=64, description="The labels that its runners may have; any where it is left out"),
    ] = None
    max_uses: Annotated[int, Field(ge=1, le=MAX_USES, description="How many runners it lets in")] = 1
    expires_in_seconds: Annotated[
        int, Field(ge=1, le=int(MAX_LIFETIME.total_seconds()), description="After how long it stops to count")
    ] = int(DEFAULT_LIFETIME.total_seconds())
    shared: Annotated[
        bool, Field(description="Whether its runners serve every tenant; for the operator only")
    ] = False


class EnrolmentOut(Shape):
    id: str
    name: str
    account_id: Annotated[str | None, Field(description="Whose steps its runners take")] = None
    is_shared: Annotated[bool, Field(description="Whether its runners serve every tenant")]
    labels: Annotated[
        list[str] | None, Field(description="The labels that its runners may have; absent means any")
    ] = None
    max_uses: int
    uses: Annotated[int, Field(description="How many runners it has let in")]
    state: Annotated[
        str,
        Field(
            description="Whether it lets anybody in",
            json_schema_extra={"enum": [str(state) for state in TokenState]},
        ),
    ]
    created_at: Moment
    expires_at: Moment
    revoked_at: Moment | None = None


class EnrolmentCreated(EnrolmentOut):
    token: Annotated[str, Field(description="Shown in this answer and nowhere else")]


def enrolment_out(token: EnrolmentToken, account: str | None, *, now: datetime) -> EnrolmentOut:
    return EnrolmentOut(
        id=token.id,
        name=token.name,
        account_id=account,
        is_shared=token.tenant_id is None,
        labels=token.labels,
        max_uses=token.max_uses,
        uses=token.uses,
        state=state_of(token, now=now),
        created_at=token.created_at,
        expires_at=token.expires_at,
        revoked_at=token.revoked_at,
    )


def enrolment_created(
    token: EnrolmentToken, account: str | None, secret: str, *, now: datetime
) -> EnrolmentCreated:
    return EnrolmentCreated(**enrolment_out(token, account, now=now).model_dump(), token=secret)
