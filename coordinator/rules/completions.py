"""Whether what a completion says can be true, decided from its words alone."""

from coordinator.errors import Invalid
from shared.faults import Fault
from shared.protocol import ArtifactEntry, Completion
from shared.references import InvalidReference, refuse_unshowable
from shared.step_paths import output_pattern

MAX_BARE_PATHS = 1000
MAX_NAME_BYTES = 255


def require_sane(said: Completion) -> None:
    """Invalid, with every fault, unless what it says can be true."""
    faults = []
    if said.status == "success" and said.exit_code not in (None, 0):
        faults.append(Fault("exitCode", "must be 0 when status is success"))
    if said.status == "success" and said.reason is not None:
        faults.append(Fault("reason", "must be absent when status is success"))
    below = _below_no_directory(said.artifacts)
    seen: set[str] = set()
    for index, entry in enumerate(said.artifacts):
        reason = (
            _entry_fault(entry)
            or ("names a path twice" if entry.path in seen else None)
            or (f"lies below {below[entry.path]!r}, no directory" if entry.path in below else None)
        )
        seen.add(entry.path)
        if reason:
            faults.append(Fault(f"artifacts[{index}].path", reason))
    if faults:
        raise Invalid("the completion is not valid", details=tuple(faults[:100]))


def _below_no_directory(entries: list[ArtifactEntry]) -> dict[str, str]:
    """The paths that no workspace can hold, each with the file or link that it would lie below."""
    below: dict[str, str] = {}
    above: str | None = None
    # in this order all that lies below a path comes right behind it
    for entry in sorted(entries, key=lambda entry: entry.path.replace("/", "\0")):
        if above is not None and entry.path.startswith(f"{above}/"):
            below[entry.path] = above
        elif entry.type != "directory":
            above = entry.path
    return below


def _entry_fault(entry: ArtifactEntry) -> str | None:
    parts = entry.path.split("/")
    if "" in parts or "." in parts or ".." in parts or any(ord(letter) < 32 for letter in entry.path):
        return "must be a relative, normalised path"
    try:
        refuse_unshowable("the path", entry.path)
    except InvalidReference as error:
        return str(error).removeprefix("the path ")
    if any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        return f"must not hold a name of more than {MAX_NAME_BYTES} bytes"
    if entry.type == "file" and len(entry.sha256) != 64:
        return "needs the digest of its bytes"
    if entry.type == "link" and not _stays_inside(entry):
        return "must not point out of the workspace"
    return None


def _stays_inside(entry: ArtifactEntry) -> bool:
    if not entry.target or entry.target.startswith("/") or "\0" in entry.target:
        return False
    depth = entry.path.count("/")
    for part in entry.target.split("/"):
        if part == "..":
            depth -= 1
        elif part not in ("", "."):
            depth += 1
        if depth < 0:
            return False
    return True


def bare_paths(paths: list[str]) -> list[str]:
    """The paths that a caller without a lease names, each once; Invalid, with every fault."""
    if len(paths) > MAX_BARE_PATHS:
        raise Invalid(
            "the completion is not valid",
            details=(Fault("outputPaths", f"must hold at most {MAX_BARE_PATHS} paths"),),
        )
    faults = []
    for index, path in enumerate(paths):
        try:
            output_pattern(path)
        except InvalidReference as error:
            faults.append(Fault(f"outputPaths[{index}]", str(error)))
    if faults:
        raise Invalid("the completion is not valid", details=tuple(faults))
    return list(dict.fromkeys(paths))
