"""Builds as the Build Execution API takes and shows them."""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PlainSerializer, WithJsonSchema
from starlette.responses import Response

from coordinator.actions.show_progress import Progress
from coordinator.api.endpoint import Query, QueryInt
from coordinator.api.executions.shapes import Input, Shape
from coordinator.store.build_search import Search, SortBy
from coordinator.tables import Build
from shared.clock import to_wire
from shared.references import branch_name
from shared.states import BuildState

MOST_PAGES = 2**31 - 1
_UUID = r"^[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}$"
_COMMIT = r"^[0-9A-Fa-f]{7,40}$"
_LONGEST_BRANCH = 255

Status = Literal["queued", "in_progress", "success", "failed", "cancelled"]
STATUS: dict[BuildState, Status] = {
    BuildState.CREATED: "queued",
    BuildState.QUEUED: "in_progress",
    BuildState.RUNNING: "in_progress",
    BuildState.CANCELLING: "in_progress",
    BuildState.SUCCEEDED: "success",
    BuildState.FAILED: "failed",
    BuildState.CANCELLED: "cancelled",
}


def _uuid(text: str) -> str:
    if re.fullmatch(_UUID.strip("^$"), text) is None:
        raise ValueError("must be a UUID: xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx")
    return text.lower()


def _branch(text: str) -> str:
    if not 1 <= len(text) <= _LONGEST_BRANCH:
        raise ValueError(f"must be 1 to {_LONGEST_BRANCH} letters long")
    return branch_name(text, longest=4 * _LONGEST_BRANCH)


def _commit(text: str) -> str:
    if re.fullmatch(_COMMIT.strip("^$"), text) is None:
        raise ValueError("must be 7 to 40 hex digits")
    return text.lower()


def _as(schema: dict[str, object]) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", **schema})


Moment = Annotated[
    datetime,
    PlainSerializer(to_wire, return_type=str),
    WithJsonSchema({"type": "string", "format": "date-time"}, mode="serialization"),
]
MaybeMoment = Annotated[
    datetime | None,
    PlainSerializer(lambda moment: None if moment is None else to_wire(moment)),
    WithJsonSchema({"type": ["string", "null"], "format": "date-time"}, mode="serialization"),
]
Uuid = Annotated[str, AfterValidator(_uuid), _as({"format": "uuid", "pattern": _UUID})]
Branch = Annotated[
    str,
    AfterValidator(_branch),
    _as({"format": "git-branch", "minLength": 1, "maxLength": _LONGEST_BRANCH, "examples": ["main"]}),
]
Commit = Annotated[str, AfterValidator(_commit), _as({"pattern": _COMMIT, "minLength": 7, "maxLength": 40})]


# What goes in


class ExecutionCreate(Input):
    """A build that is wanted."""

    project_id: Annotated[Uuid, Field(description="Whose repository is built, by its workflow")]
    git_branch: Annotated[Branch, Field(description="The branch that is built")]
    git_commit: Annotated[
        Commit | None, Field(description="The commit that is built; the newest of the branch by default")
    ] = None


class ExecutionQuery(Query):
    """Which builds are listed, and in which order."""

    status: Annotated[Status | None, Field(description="Only builds of this status")] = None
    project_id: Annotated[Uuid | None, Field(description="Only builds of this project")] = None
    page: Annotated[QueryInt, Field(ge=1, le=MOST_PAGES, description="Number of the page, from 1")] = 1
    limit: Annotated[QueryInt, Field(ge=1, le=100, description="Builds on a page")] = 20
    sort_by: Annotated[SortBy, Field(description="What decides about the order")] = "created_at"
    sort_order: Annotated[Literal["asc", "desc"], Field(description="Least or greatest first")] = "desc"

    def search(self) -> Search:
        states = None
        if self.status is not None:
            states = [state for state, status in STATUS.items() if status == self.status]
        return Search(
            states=states,
            project_id=self.project_id,
            sort_by=self.sort_by,
            is_descending=self.sort_order == "desc",
            limit=self.limit,
            offset=(self.page - 1) * self.limit,
        )


# What comes out


class Execution(Shape):
    """A build."""

    id: str
    project_id: str
    build_number: Annotated[int, Field(description="Counts the builds of the project, from 1")]
    git_branch: Annotated[
        str | None, Field(description="Absent only for builds of the Build Server API that named none")
    ]
    git_commit: Annotated[
        str | None, Field(description="The commit that was asked for, or that the branch was found at")
    ]
    workflow_id: Annotated[str, Field(description="The workflow whose steps run")]
    status: Status
    reason: Annotated[str | None, Field(description="Why it did not succeed")]
    retry_of: Annotated[str | None, Field(description="The build that is tried again by this one")]
    created_at: Moment
    updated_at: Moment
    started_at: Annotated[Moment | None, Field(description="When a runner took its first step")]
    finished_at: Moment | None


class ExecutionPage(Shape):
    """One page of a list of builds."""

    builds: list[Execution]
    total_count: Annotated[int, Field(description="Builds on all pages")]
    page: int
    limit: int
    has_more: Annotated[bool, Field(description="There is a page behind this one")]


class ExecutionProgress(Shape):
    """How many of a build's steps have ended."""

    current_step: Annotated[int, Field(description="Steps that have ended")]
    total_steps: int
    percentage: Annotated[int, Field(ge=0, le=100)]


class ExecutionStatus(Shape):
    """How far a build is."""

    build_id: str
    status: Status
    progress: ExecutionProgress
    started_at: Annotated[Moment | None, Field(description="When a runner took its first step")]
    estimated_completion: Annotated[
        MaybeMoment,
        Field(description="When it will probably end; null unless it is in progress and there is history"),
    ]


def execution(build: Build) -> Execution:
    return Execution(
        id=build.id,
        project_id=build.project_id,
        build_number=build.number,
        git_branch=build.branch,
        git_commit=build.commit_hash or build.requested_commit,
        workflow_id=build.workflow_id,
        status=STATUS[BuildState(build.state)],
        reason=build.reason,
        retry_of=build.retry_of,
        created_at=build.created_at,
        updated_at=build.updated_at or build.created_at,
        started_at=build.started_at,
        finished_at=build.finished_at,
    )


def execution_page(builds: Sequence[Build], total: int, query: ExecutionQuery) -> ExecutionPage:
    return ExecutionPage(
        builds=[execution(build) for build in builds],
        total_count=total,
        page=query.page,
        limit=query.limit,
        has_more=query.page * query.limit < total,
    )


def status_answer(progress: Progress) -> Response:
    """The one answer with a null in it: nobody can say yet when this build ends."""
    build = progress.build
    shown = ExecutionStatus(
        build_id=build.id,
        status=STATUS[BuildState(build.state)],
        progress=ExecutionProgress(
            current_step=progress.ended_steps,
            total_steps=progress.all_steps,
            percentage=progress.percentage,
        ),
        started_at=build.started_at,
        estimated_completion=progress.estimated_completion,
    )
    unset = {"started_at"} if build.started_at is None else None
    return Response(shown.model_dump_json(exclude=unset), media_type="application/json")
