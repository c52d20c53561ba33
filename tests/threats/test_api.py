"""What the real coordinator answers to names, addresses, paths and shapes that want to be something else."""

import time
from typing import Any

import httpx
import pytest

from tests.factories import ON_SQLITE, Api, a_spec, a_step
from tests.threats.stack import Stack, raw

SHELL = [
    "$(touch /tmp/PWN-{})",
    "`touch /tmp/PWN-{}`",
    "a;touch /tmp/PWN-{}",
    "a&&touch /tmp/PWN-{}",
    "a|touch /tmp/PWN-{}",
    ">/tmp/PWN-{}",
    "'; touch /tmp/PWN-{}; '",
    '"; touch /tmp/PWN-{}; "',
    "\\'; touch /tmp/PWN-{} #",
    "!!",
    "~root",
    "*",
    "{a,b}",
    "${{ secrets.X }}",
    "{{7*7}}",
    "%s%n",
    "${jndi:ldap://x/a}",
]
CONTROL = ["a\nb", "a\rb", "a\x85b", "a\u2028b", "a\x1b[31mb", "a\tb"]


def payloads(case: str) -> list[str]:
    return [text.format(case) if "{}" in text else text for text in SHELL]


@pytest.fixture
def project(stack: Stack) -> str:
    return stack.a_project()


@pytest.fixture
def workflow(stack: Stack) -> dict[str, Any]:
    """One whose steps no runner takes."""
    return stack.api.a_workflow([a_step(labels=["nobody"])])


def build_with(stack: Stack, workflow: dict[str, Any], **request: Any) -> httpx.Response:
    path = f"/api/projects/{workflow['projectId']}/builds"
    return stack.http.post(path, json={"workflowId": workflow["id"], **request})


# Paths, hosts and methods


@pytest.mark.threat("A16")
@pytest.mark.parametrize(
    "target",
    [
        "//api/projects?accountId=a", "/api//projects?accountId=a", "/api/./projects", "/api/x/../projects",
        "/api/%2e%2e/healthz", "/api/..;/projects", "/%61pi/projects?accountId=a", "/api%2Fprojects",
        "/api/projects;x=.js?accountId=a", "/api/projects/?accountId=a", "/API/projects?accountId=a",
        "/api/projects%00", "/api/projects%20", "/x?jsp=/api/projects;.jsp", "/api\\projects",
    ],
)  # fmt: skip
def test_a_path_in_disguise_is_no_path(stack: Stack, target: str) -> None:
    answer = raw(stack, f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())

    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400")), answer[:200]


@pytest.mark.threat("A17")
@pytest.mark.parametrize(
    "head",
    [
        "GET /api/runners HTTP/1.1\r\nHost: evil.example",
        "GET /api/runners HTTP/1.1\r\nHost: evil/%2f..admin?",
        "GET /api/runners HTTP/1.1\r\nHost: localhost@evil.example",
        "GET /api/runners HTTP/1.1\r\nHost: localhost\r\nHost: evil.example",
        "GET /api/runners HTTP/1.1",
        "GET @google.com HTTP/1.1\r\nHost: localhost",
        "GET http://localhost/api/runners HTTP/1.1\r\nHost: localhost",
        "GET http://evil.example/api/runners HTTP/1.1\r\nHost: localhost",
    ],
)
def test_a_request_for_another_host_is_refused(stack: Stack, head: str) -> None:
    answer = raw(stack, f"{head}\r\nConnection: close\r\n\r\n".encode())

    assert answer.startswith(b"HTTP/1.1 400"), answer[:200]


@pytest.mark.threat("A18")
def test_a_method_is_what_the_request_line_says(stack: Stack, project: str) -> None:
    path = f"/api/projects/{project}"

    for name in ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"):
        assert stack.http.get(path, headers={name: "DELETE"}).status_code == 200
    stack.refused(stack.http.get(f"{path}?_method=DELETE"), 400)
    for method in ("HEAD", "OPTIONS", "TRACE", "PURGE"):
        assert stack.http.request(method, path).status_code in (403, 404, 405)

    assert stack.http.get(path).status_code == 200


# Names, references and variables


@pytest.mark.threat("B01")
@pytest.mark.threat("B09")
def test_a_name_that_looks_like_shell_is_a_name(stack: Stack) -> None:
    for text in payloads("B01"):
        answer = stack.http.post("/api/projects", json={"accountId": text, "name": text})

        if answer.status_code == 400:
            stack.refused(answer)
        else:
            made = answer.json()
            assert (answer.status_code, made["name"], made["accountId"]) == (201, text, text)
            assert stack.http.get(f"/api/projects/{made['id']}").json()["name"] == text


@pytest.mark.threat("B02")
@pytest.mark.parametrize(
    "branch", ['zzz";echo${IFS}"hello";#', "x$({touch,/tmp/PWN-B02})", "a`id`", "a|b;c&&d", "a'b"]
)
def test_a_branch_that_git_allows_is_kept_as_it_is(
    stack: Stack, workflow: dict[str, Any], branch: str
) -> None:
    answer = build_with(stack, workflow, repoUrl="https://git.example/o/r", branch=branch)

    assert answer.status_code == 201, answer.text
    assert stack.api.build(answer.json()["id"])["branch"] == branch
    stack.cancel(answer.json()["id"])


@pytest.mark.threat("B03")
@pytest.mark.parametrize("field", ["branch", "commitHash"])
@pytest.mark.parametrize(
    "text", ["--upload-pack=touch /tmp/PWN-B03", "--output=/tmp/PWN-B03", "-c core.pager=id", "-", "--", "-u"]
)
def test_a_reference_that_begins_like_an_option_is_refused(
    stack: Stack, workflow: dict[str, Any], field: str, text: str
) -> None:
    stack.refused(build_with(stack, workflow, **{"repoUrl": "https://a.b/c", field: text}), path=field)


@pytest.mark.threat("C10")
@pytest.mark.parametrize(
    "branch",
    ["refs/../x", "HEAD", "@", "HEAD@{1}", "main@{yesterday}", ":/msg", "main^", "main~1", "a..b", "a.lock",
     "a/.b", "main:file", "a b", "a\\b", "x" * 245, "", "/a", "a/", "a//b", "é" * 123],
)  # fmt: skip
def test_what_git_would_expand_is_no_branch(stack: Stack, workflow: dict[str, Any], branch: str) -> None:
    stack.refused(build_with(stack, workflow, repoUrl="https://a.b/c", branch=branch), path="branch")


@pytest.mark.threat("C10")
@pytest.mark.parametrize("commit", ["abcdef", "ABCDEF1", "g" * 40, "a" * 65, "HEAD", "a" * 40 + "\n", ""])
def test_only_a_hash_is_a_commit(stack: Stack, workflow: dict[str, Any], commit: str) -> None:
    stack.refused(build_with(stack, workflow, repoUrl="https://a.b/c", commitHash=commit), path="commitHash")


@pytest.mark.threat("B04")
@pytest.mark.parametrize("text", CONTROL)
def test_a_name_holds_no_control_character(stack: Stack, workflow: dict[str, Any], text: str) -> None:
    project = workflow["projectId"]
    post = stack.http.post

    stack.refused(post("/api/projects", json={"accountId": "a", "name": text}), path="name")
    stack.refused(stack.post_workflow(a_step(), project_id=project, name=text), path="name")
    stack.refused(stack.post_workflow(a_step(text), project_id=project), path="steps[0].name")
    stack.refused(build_with(stack, workflow, repoUrl="https://a.b/c", branch=text), path="branch")
    stack.refused(post("/api/docker-images", json={"slug": text, "imageUrl": "a"}), path="slug")
    stack.refused(post("/api/docker-images", json={"slug": "a", "imageUrl": text}), path="imageUrl")


@pytest.mark.threat("B05")
@pytest.mark.threat("L05")
def test_nul_is_refused_in_every_text(stack: Stack, workflow: dict[str, Any]) -> None:
    post, project = stack.http.post, workflow["projectId"]
    for body in ({"accountId": "a\0", "name": "a"}, {"accountId": "a", "name": "\0"}):
        stack.refused(post("/api/projects", json=body))
    for fields in (
        {"name": "a\0"}, {"runScript": "echo \0"}, {"env": {"A": "\0"}}, {"env": {"A\0": ""}},
        {"cacheDirs": ["a\0"]}, {"outputPaths": ["a\0b"]}, {"dependsOn": ["\0"]}, {"imageSlug": "a\0"},
        {"labels": ["\0"]},
    ):  # fmt: skip
        stack.refused(stack.post_workflow(a_step(**{"name": "n", **fields}), project_id=project))
    for field in ("repoUrl", "branch", "commitHash", "commitMessage", "commitAuthor"):
        stack.refused(build_with(stack, workflow, **{field: "\0"}), path=field)
    stack.refused(stack.http.get("/api/projects?accountId=%00"), path="accountId")
    stack.refused(stack.http.get("/api/audit-logs?action=%00"), path="action")
    assert stack.http.get("/api/builds/%00").status_code == 404


@pytest.mark.threat("B07")
@pytest.mark.parametrize(
    "name",
    ["BASH_ENV", "ENV", "LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "IFS", "PS4", "SHELLOPTS", "BASHOPTS",
     "BASH_FUNC_ls%%", "BASH_FUNC_ls", "PROMPT_COMMAND", "BUILDMILL_STEP", "BUILDMILL_NONCE"],
)  # fmt: skip
def test_variables_that_steer_the_shell_or_are_ours_are_refused(
    stack: Stack, project: str, name: str
) -> None:
    step = a_step(env={name: "touch /tmp/PWN-B07"})

    stack.refused(stack.post_workflow(step, project_id=project))


@pytest.mark.threat("B08")
@pytest.mark.parametrize(
    "env",
    [
        {"A=B": ""}, {"": ""}, {"a b": ""}, {"A" * 65536: ""}, {"é": ""}, {"1A": ""}, {"A-B": ""},
        {f"A{number}": "" for number in range(10_000)}, {"A": "x" * 131_072},
        {f"A{number}": "x" * 100_000 for number in range(4)}, {"A": 1}, {"A": None}, [], "A=B",
    ],
    ids=lambda env: str(env)[:24],
)  # fmt: skip
def test_variables_that_no_program_could_be_handed_are_refused(stack: Stack, project: str, env: Any) -> None:
    stack.refused(stack.post_workflow(a_step(env=env), project_id=project))


@pytest.mark.threat("B11")
@pytest.mark.parametrize("name", ["a\u202eb", "x" * 10_240, "", " ", "a\u2066b", "a ", 3, None, ["a"]])
def test_a_name_that_nobody_could_read_is_refused(stack: Stack, project: str, name: Any) -> None:
    stack.refused(stack.post_workflow(a_step(name), project_id=project), path="steps[0].name")


@pytest.mark.threat("B12")
@pytest.mark.parametrize(
    "image",
    ["alpine; id", "-v/:/h alpine", "--privileged", "alpine\n", "Alpine", "alpine@sha256:abc",
     "alpine@sha512:" + "a" * 64, "a" * 64, "/alpine", "alpine/", "alpine:", "http://alpine", "$(id)", "../x",
     "registry:65536/x", "a//b", "alpine:ta g", "älpine", ""],
)  # fmt: skip
def test_an_image_is_a_reference_and_nothing_else(stack: Stack, image: str) -> None:
    answer = stack.http.post("/api/docker-images", json={"slug": "odd", "imageUrl": image})

    stack.refused(answer, path="imageUrl")


@pytest.mark.threat("B13")
@pytest.mark.parametrize(
    "fields",
    [{"entrypoint": "sh -c 'id'"}, {"entrypoint": ["sh"]}, {"command": "id"}, {"cmd": "id"}, {"args": []},
     {"shell": "/bin/evil"}, {"runScript": ["echo", "a"]}, {"runScript": {"run": "a"}}, {"runScript": None}],
)  # fmt: skip
def test_a_step_names_no_program_but_its_script(stack: Stack, project: str, fields: dict[str, Any]) -> None:
    field = next(iter(fields))

    stack.refused(stack.post_workflow(a_step(**fields), project_id=project), path=f"steps[0].{field}")


@pytest.mark.threat("B14")
@pytest.mark.threat("E01")
@pytest.mark.parametrize(
    "field",
    ["privileged", "cap_add", "capAdd", "devices", "pid", "ipc", "userns", "security_opt", "securityOpt",
     "volumes", "mounts", "binds", "cgroup_parent", "sysctls", "runtime", "workdir", "workingDir", "hostname",
     "containerName", "dockerLabels", "ulimits", "tmpfs", "extraHosts", "dns", "hostConfig", "ports"],
)  # fmt: skip
def test_no_field_reaches_into_the_container(stack: Stack, project: str, field: str) -> None:
    for value in (True, ["/:/h"], "/proc/self/fd/8", {"a": "b"}):
        stack.refused(
            stack.post_workflow(a_step(**{field: value}), project_id=project), path=f"steps[0].{field}"
        )


@pytest.mark.threat("E01")
@pytest.mark.parametrize(
    "fields",
    [{"network": "host"}, {"network": "container:x"}, {"user": "0:0"}, {"user": "nobody"},
     {"resources": {"privileged": True}}, {"resources": {"cpus": -1}}, {"resources": {"pids": 2**40}},
     {"labels": ["a", "A B"]}, {"labels": ["--privileged"]}],
)  # fmt: skip
def test_known_fields_take_no_way_around(stack: Stack, project: str, fields: dict[str, Any]) -> None:
    stack.refused(stack.post_workflow(a_step(**fields), project_id=project))


@pytest.mark.threat("B14")
@pytest.mark.threat("E01")
def test_unknown_fields_are_refused_by_name_everywhere(stack: Stack, workflow: dict[str, Any]) -> None:
    post = stack.http.post
    for field in ("id", "tenantId", "state", "status", "isAdmin", "createdAt", "__proto__", "class"):
        extra = {field: "x"}

        stack.refused(post("/api/projects", json={"accountId": "a", "name": "a", **extra}), path=field)
        stack.refused(post("/api/docker-images", json={"slug": "a", "imageUrl": "a", **extra}), path=field)
        stack.refused(build_with(stack, workflow, **extra), path=field)
        stack.refused(post("/api/runners", json={"name": "r", **extra}), path=field)
        body = {"name": "w", "steps": [a_step()], **extra}
        stack.refused(post(f"/api/projects/{workflow['projectId']}/workflows", json=body), path=field)


# Repositories

ADDRESSES = {
    "C01": [
        "ext::sh -c touch% /tmp/PWN-C01", "EXT::sh -c id", " ext::sh -c id", "ext::https://a/b", "ext://sh/x",
        "fd::17", "remote-ext::x", "\text::sh",
    ],
    "C02": ["/srv/other-tenant.git", "../other", "./x", "C:\\x", "file://host/etc", "file://../etc", "etc",
            "file:///a/../etc", "file:///%2e%2e/etc", "FILE:etc"],
    "C03": ["ssh://-oProxyCommand=touch%20/tmp/PWN-C03/x", "git@-oProxyCommand=touch /tmp/PWN-C03:x",
            "ssh://host/-upload", "ssh://-host/x", "ssh://a@-host/x", "ssh://-u@host/x", "git@host:o/r"],
    "C04": ["https://user:pass@host/x", "https:///host/x", "https://host:22/x", "git://host/x",
            "https://github.com@evil.example/x", "https://token@host/x", "https://host", "https://host/",
            "https://host:0/x", "https://host:99999/x", "https://host:/x", "https://a@b@c/x"],
    "C05": ["https://evil/x%0d%0aHeader:y", "https://a/b%00", "https://gіthub.com/o/r", "https://[fe80::1%25eth0]/x",
            "https://a/b\r\nHost: x", "https://a\n/b", "https://a/b?c=d", "https://a/b#c", "https://a/b c",
            "https://a/" + "x" * 3000, "javascript:alert(1)", "data:,x", ""],
}  # fmt: skip


@pytest.mark.parametrize(
    "address",
    [
        pytest.param(address, marks=pytest.mark.threat(case), id=f"{case}-{number}")
        for case, addresses in ADDRESSES.items()
        for number, address in enumerate(addresses)
    ],
)
def test_an_address_that_means_something_else_is_refused(
    stack: Stack, workflow: dict[str, Any], address: str
) -> None:
    stack.refused(build_with(stack, workflow, repoUrl=address), path="repoUrl")
    if address:
        answer = stack.http.patch(f"/api/projects/{workflow['projectId']}", json={"repoUrl": address})
        stack.refused(answer, path="repoUrl")


@ON_SQLITE
@pytest.mark.threat("C02")
@pytest.mark.threat("C04")
@pytest.mark.parametrize("address", ["file:///etc", "http://host/x", "FILE:///etc", "HTTP://host/x"])
def test_as_delivered_neither_folders_nor_open_lines_are_repositories(api: Api, address: str) -> None:
    workflow = api.a_workflow(a_spec())
    body = {"workflowId": workflow["id"], "repoUrl": address}

    answer = api.client.post(f"/api/projects/{workflow['projectId']}/builds", json=body)

    assert answer.status_code == 400
    assert answer.json()["details"][0]["path"] == "repoUrl"


# Paths in the workspace


@pytest.mark.parametrize(
    "path",
    [
        *(
            pytest.param(path, marks=pytest.mark.threat("D01"))
            for path in ["..", "../../etc", "a/../../b", "/etc", "//x", "~", "", ".", "./", "a//b", "~root/x"]
        ),
        *(
            pytest.param(path, marks=pytest.mark.threat("D02"))
            for path in ["%2e%2e/", "..\\", "a\\..\\b", "\uff0e\uff0e/", "\u2025/x", "a\0b", "\u202e", "a\nb"]
        ),
        *(
            pytest.param(path, marks=pytest.mark.threat("D19"))
            for path in ["/", "/proc", "/proc/1", "/workspace", ".git", "/workspace/.git", "/var/run/x",
                         "/sys/x", "/dev/shm", "/etc/x", "/usr", "/lib64/x", "/buildmill", "/buildmill/rc"]
        ),
    ],
)  # fmt: skip
def test_a_path_that_leaves_its_place_is_refused(stack: Stack, project: str, path: str) -> None:
    caches = stack.post_workflow(a_step(cacheDirs=[path]), project_id=project)
    outputs = stack.post_workflow(a_step(outputPaths=[path]), project_id=project)

    stack.refused(caches, path="steps[0].cacheDirs[0]")
    stack.refused(outputs, path="steps[0].outputPaths[0]")


@pytest.mark.threat("D19")
@pytest.mark.parametrize(
    ("caches", "outputs"),
    [(["a", "a/b"], []), (["a", "./a/"], []), (["/workspace/a", "a"], []), (["a"], ["a"]),
     (["a"], ["a/b/**"]), (["a/b"], ["a"]), (["/opt/x", "/opt/x/y"], [])],
)  # fmt: skip
def test_places_that_overlap_are_refused(stack: Stack, project: str, caches: Any, outputs: Any) -> None:
    step = a_step(cacheDirs=caches, outputPaths=outputs)

    stack.refused(stack.post_workflow(step, project_id=project))


@pytest.mark.threat("D20")
@pytest.mark.parametrize(
    "pattern",
    ["/".join(["**"] * 50), "[", "a[", "[a", "[]", "[z-a]", "a**", "a" * 5000, "/".join("a" * 100),
     "/".join(["**", "a"] * 30), "[a]" * 200],
    ids=lambda pattern: pattern[:12],
)  # fmt: skip
def test_a_pattern_that_would_cost_too_much_is_refused_at_once(
    stack: Stack, project: str, pattern: str
) -> None:
    begun = time.monotonic()
    answer = stack.post_workflow(a_step(outputPaths=[pattern]), project_id=project)

    stack.refused(answer, path="steps[0].outputPaths[0]")
    assert time.monotonic() - begun < 1


@pytest.mark.threat("D20")
def test_braces_are_letters(stack: Stack, project: str) -> None:
    begun = time.monotonic()
    answer = stack.post_workflow(a_step(outputPaths=["{a,b}" * 30]), project_id=project)

    assert answer.status_code == 201
    assert time.monotonic() - begun < 1


# Shapes of workflows


@pytest.mark.threat("F08")
@pytest.mark.parametrize(
    ("steps", "word"),
    [
        pytest.param([a_step("a", ["a"])], "itself", id="self"),
        pytest.param([a_step("a", ["c"]), a_step("b", ["a"]), a_step("c", ["b"])], "circle", id="circle"),
        pytest.param([a_step("a"), a_step("a")], "repeats", id="twice"),
        pytest.param([a_step("a"), a_step("b", ["a", "a"])], "twice", id="same dependency"),
        pytest.param([a_step("a", ["zz"])], "no step", id="unknown"),
        pytest.param([], "1 to", id="none"),
        pytest.param([a_step(str(number)) for number in range(1001)], "1 to", id="1001 steps"),
    ],
)
def test_a_graph_that_cannot_be_built_is_refused(stack: Stack, project: str, steps: Any, word: str) -> None:
    begun = time.monotonic()
    answer = stack.post_workflow(*steps, project_id=project)

    assert word in " ".join(fault["reason"] for fault in stack.refused(answer)["details"])
    assert time.monotonic() - begun < 1


@pytest.mark.threat("F08")
def test_the_largest_graphs_are_judged_within_a_second(stack: Stack, project: str) -> None:
    chain = [a_step(f"s{n}", [f"s{n - 1}"] if n else []) for n in range(1000)]
    circle = [a_step(f"s{n}", [f"s{(n - 1) % 1000}"]) for n in range(1000)]
    dense = [a_step(f"s{n}", [f"s{m}" for m in range(n)]) for n in range(300)]
    for steps, status in ((chain, 201), (circle, 400), (dense, 400)):
        begun = time.monotonic()
        answer = stack.post_workflow(*steps, project_id=project)

        assert answer.status_code == status, answer.text[:300]
        assert time.monotonic() - begun < 2  # generous on a busy machine


@pytest.mark.threat("F08")
def test_a_million_steps_are_refused_within_a_second(stack: Stack, project: str) -> None:
    body = b'{"name":"w","steps":[' + b",".join([b"{}"] * 1_000_000) + b"]}"
    headers = {"Content-Type": "application/json"}
    begun = time.monotonic()

    answer = stack.http.post(f"/api/projects/{project}/workflows", content=body, headers=headers)

    assert time.monotonic() - begun < 2
    stack.refused(answer, answer.status_code)
    assert answer.status_code in (400, 413)
