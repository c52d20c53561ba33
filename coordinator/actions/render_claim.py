"""A claimed step as its runner gets to see it."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from sqlmodel import Session

from coordinator.actions.give_secrets import give_secrets
from coordinator.rules.leases import lease_token
from coordinator.site import Site
from coordinator.store import artifacts, rounds, steps
from shared.protocol import Claim, InputFile, Limits, Mount, Source, Timings
from shared.script import render_step_script, script_digest
from shared.workflow import StepSpec

MAX_INPUTS = 100_000


class TooManyInputs(Exception):
    """The steps before this one hand on more than one step can take."""


def render_script(step: Any, build: Any, *, attempt: int) -> str:
    """The bash script of this attempt."""
    return _render_script(step, build, StepSpec.model_validate(step.spec, by_alias=True), attempt)


def _render_script(step: Any, build: Any, spec: StepSpec, attempt: int) -> str:
    variables = {
        "CI": "true",
        "BUILDMILL_PROJECT_ID": build.project_id,
        "BUILDMILL_BUILD_ID": build.id,
        "BUILDMILL_BUILD_NUMBER": str(build.number),
        "BUILDMILL_STEP": step.name,
        "BUILDMILL_ATTEMPT": str(attempt),
    }
    if build.commit_hash:
        variables["BUILDMILL_COMMIT"] = build.commit_hash
    if build.branch:
        variables["BUILDMILL_BRANCH"] = build.branch
    return render_step_script(name=step.name, run_script=spec.run_script, env=spec.env, variables=variables)


def render_claim(tx: Session, site: Site, step: Any, build: Any) -> Claim:
    """Everything the runner needs to run this attempt; TooManyInputs or SecretsRefused when it cannot."""
    spec = StepSpec.model_validate(step.spec, by_alias=True)
    script = _render_script(step, build, spec, step.attempt)
    settings = site.settings
    return Claim(
        step_id=step.id,
        attempt=step.attempt,
        lease=lease_token(
            site.lease_key,
            step_id=step.id,
            attempt=step.attempt,
            runner_id=step.runner_id,
            request_id=step.request_id,
        ),
        build_id=build.id,
        project_id=build.project_id,
        name=step.name,
        script=script,
        script_sha256=script_digest(script),
        image=step.image_url,
        env={},
        secret_names=spec.secrets,
        secrets=give_secrets(tx, site, step, build, spec.secrets) if spec.secrets else {},
        mounts=[Mount(path=path, key=build.project_id) for path in spec.cache_dirs],
        output_paths=spec.output_paths,
        source=_source(build),
        inputs=_inputs(tx, step) if step.dependency_count else [],
        limits=Limits(
            timeout_s=spec.timeout_seconds,
            grace_s=spec.grace_seconds,
            no_output_s=spec.no_output_seconds,
            pull_timeout_s=spec.pull_timeout_seconds,
            log_bytes=settings.log_limit,
            artifact_bytes=settings.artifact_limit,
            artifact_count=settings.artifact_count,
            cpus=spec.resources.cpus,
            memory_mb=spec.resources.memory_mb,
            pids=spec.resources.pids,
        ),
        timings=_timings(site, step),
        network=spec.network,
        exclusive=spec.exclusive,
        user=spec.user,
    )


def _timings(site: Site, step: Any) -> Timings:
    settings = site.settings
    up_s = (step.claimed_at - site.started_at).total_seconds()
    amnesty_s = max(0.0, settings.amnesty - up_s)
    return _make_timings(settings.heartbeat, settings.claim_ttl, settings.lost_after, amnesty_s)


@lru_cache(maxsize=8)
def _make_timings(heartbeat_s: float, claim_ttl_s: float, lost_after_s: float, amnesty_s: float) -> Timings:
    """The same for nearly all claims, and dear to make."""
    return Timings(
        heartbeat_s=heartbeat_s, claim_ttl_s=claim_ttl_s, lost_after_s=lost_after_s, amnesty_s=amnesty_s
    )


def _source(build: Any) -> Source | None:
    if not build.repo_url:
        return None
    return Source(
        repo_url=build.repo_url,
        branch=build.branch or "",
        commit=build.commit_hash or build.requested_commit or "",
        default_branch=build.default_branch or "",
        is_project_repository=build.is_project_repository,
    )


def _inputs(tx: Session, step: Any) -> list[InputFile]:
    """The outputs of every step this one depends on, directly or not; the later step's come later."""
    count = artifacts.count_inputs(tx, step.build_id, step.id)
    if count > MAX_INPUTS:
        raise TooManyInputs(
            f"the steps before this one hand on {count} outputs; a step takes at most {MAX_INPUTS}"
        )
    behind = _all_behind(step.id, _arrows(tx, step))
    producers = steps.list_steps_by_id(tx, sorted(behind))
    found = artifacts.list_artifacts_of_steps(tx, step.build_id, behind)
    found.sort(key=lambda row: (producers[row.step_id].rank, row.path))
    return [
        InputFile(
            step=producers[row.step_id].name,
            path=row.path,
            type=row.type,
            mode=row.mode,
            size=row.size,
            sha256=row.sha256,
            target=row.target,
        )
        for row in found
    ]


def _arrows(tx: Session, step: Any) -> dict[str, list[str]]:
    """Who depends on whom; once a build was retried, without the rows that were replaced."""
    if step.round == 1:
        return steps.list_dependencies(tx, step.build_id)
    return rounds.list_latest_dependencies(tx, step.build_id)


def _all_behind(step_id: str, arrows: dict[str, list[str]]) -> set[str]:
    seen: set[str] = set()
    waiting: list[Iterable[str]] = [arrows.get(step_id, [])]
    while waiting:
        for other in waiting.pop():
            if other not in seen:
                seen.add(other)
                waiting.append(arrows.get(other, []))
    return seen
