"""What the judges of text accept, in the words of a specification: patterns and formats per field.

The judges themselves are in `shared.references`; a test holds each pattern against its judge.
"""

from collections.abc import Mapping
from typing import Any

_UNSHOWABLE = r"\u0000-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069"
_SPACES = r"\u0020\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000"
_EDGE = f"[^{_UNSHOWABLE}{_SPACES}]"

# Most patterns are written for any regular expression engine, so they avoid classes such as \p{Cc}.
DISPLAY_NAME = f"^{_EDGE}(?:[^{_UNSHOWABLE}]*{_EDGE})?$"
SLUG = r"^[A-Za-z0-9][A-Za-z0-9._/-]*$"
LABEL = r"^[a-z0-9](?:[a-z0-9._=-]*[a-z0-9])?$"
COMMIT = r"^[0-9a-f]{7,64}$"
# Of the names that shells know only the short ones are left out, which somebody may well hit by chance.
SECRET_NAME = r"^(?!BUILDMILL_|LD_|BASH_FUNC_|(?:_|CI|ENV|IFS|PS4|UID)$)[A-Z_][A-Z0-9_]{0,63}$"  # noqa: S105
ENV_NAME = r"^(?!BUILDMILL_|LD_|BASH_FUNC_)[A-Za-z_][A-Za-z0-9_]*$"

_NAME = {"pattern": DISPLAY_NAME}
_URL = {"format": "uri", "examples": ["https://git.example/owner/name"]}
_BRANCH = {"format": "git-branch", "examples": ["main"]}

# Component -> field -> what is asked of it; `field[]`: of each item of a list, `field{}`: of each key.
WORDS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "ProjectCreate": {"accountId": _NAME, "name": _NAME},
    "ProjectPatch": {"name": _NAME, "repoUrl": _URL, "defaultBranch": _BRANCH},
    "ExecutionProjectPatch": {"repo_url": _URL, "default_branch": _BRANCH},
    "DockerImageCreate": {
        "slug": {"pattern": SLUG},
        "imageUrl": {"format": "docker-reference", "examples": ["alpine", "docker://ghcr.io/owner/name:1"]},
    },
    "WorkflowCreate": {"name": _NAME},
    "StepSpec": {
        "name": _NAME,
        "imageSlug": {"pattern": SLUG},
        "labels[]": {"pattern": LABEL, "minLength": 1, "maxLength": 64},
        "secrets[]": {"pattern": SECRET_NAME},
        "env{}": {"pattern": ENV_NAME, "minLength": 1, "maxLength": 256},
    },
    "BuildCreate": {
        "repoUrl": _URL,
        "branch": {**_BRANCH, "minLength": 1},
        "commitHash": {"pattern": COMMIT, "minLength": 7},
    },
    "Registration": {"name": _NAME, "labels[]": {"pattern": LABEL}},
}

# Path parameters that are no ids.
PATH_WORDS: Mapping[str, Mapping[str, Any]] = {
    "name": {"pattern": SECRET_NAME, "minLength": 1, "maxLength": 64},
}

# Fields whose null gets no further than the model.
NEVER_NULL = {("ProjectPatch", "name")}
