"""The documentation says what the code does: links, fields, reasons, commands and the map."""

import ast
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from coordinator.cli.main import main
from coordinator.errors import CoordinatorError
from shared import paths
from shared.plan import plan_steps
from shared.reasons import Reason
from shared.workflow import Resources, Retry, StepSpec, WireModel

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "scripts" / "README.md",
    *sorted(DOCS.rglob("*.md")),
]
# Somebody's own folders and papers, and addresses that packages come from.
FORBIDDEN = re.compile(
    r"/(work|home)/|/tmp/b\w+|rulings\.md"
    r"|pypi\.|pythonhosted|npmjs|crates\.io|proxy\.golang|debian\.org"
    r"|/simple/|index[-]url *=|://[a-z.]*registry\.",
    re.IGNORECASE,
)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", without_code(text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text_of(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        is_there = place.exists() and place.is_relative_to(ROOT)
        if not is_there or (anchor and anchor not in anchors_of(place)):
            broken.append(target)

    assert broken == []


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=named)
def test_every_page_can_be_reached_from_the_index(page: Path) -> None:
    reached: set[Path] = set()
    waiting = [DOCS / "index.md"]
    while waiting:
        here = waiting.pop()
        if here in reached or here.suffix != ".md" or not here.exists():
            continue
        reached.add(here)
        waiting += [(here.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s:]+)", text_of(here))]

    assert page in reached


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_page_speaks_of_one_workplace_or_of_where_packages_come_from(page: Path) -> None:
    assert FORBIDDEN.findall(text_of(page)) == []


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=named)
def test_every_page_has_one_title_and_one_sentence_per_line(page: Path) -> None:
    lines = without_code(text_of(page)).splitlines()
    titles = [line for line in lines if line.startswith("# ")]
    crowded = [
        line for line in lines if not line.startswith("|") and re.search(r"[a-z`)]\. [A-Z][a-z]+ [a-z]", line)
    ]

    assert lines[0] == titles[0]
    assert len(titles) == 1
    assert crowded == []


def test_the_readme_begins_with_the_two_commands() -> None:
    block = re.search(r"^```sh\n(.*?)^```", text_of(ROOT / "README.md"), re.MULTILINE | re.DOTALL)

    assert block is not None
    assert [line.split()[0] for line in block.group(1).splitlines()] == ["./scripts/demo", "./scripts/test"]


# --- workflows and reasons


def table_rows(page: Path) -> dict[str, list[str]]:
    """The rows of all tables by their first cell, for first cells that are one word of code."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text_of(page).splitlines() if line.startswith("|")]
    return {
        cells[0].strip().strip("`"): [cell.strip() for cell in cells[1:]]
        for cells in rows
        if re.fullmatch(r"`[^`]+`", cells[0].strip())
    }


def shown_default(model: type[WireModel], name: str) -> str:
    field = model.model_fields[name]
    if field.is_required():
        return "required"
    if isinstance(field.default, Resources | Retry):
        return "`{}`"
    return "none" if field.default is None else f"`{json.dumps(field.default)}`"


@pytest.mark.parametrize("model", [StepSpec, Resources, Retry])
def test_every_field_of_a_step_stands_in_the_page_with_its_default(model: type[WireModel]) -> None:
    rows = table_rows(DOCS / "workflow.md")
    wanted = {str(field.alias): shown_default(model, name) for name, field in model.model_fields.items()}

    assert {name: rows[name][0] for name in wanted if name in rows} == wanted


def bounds_of(model: type[WireModel]) -> Iterator[tuple[str, str]]:
    for field in model.model_fields.values():
        for bound in field.metadata:
            for word in ("ge", "gt", "le", "min_length", "max_length"):
                if hasattr(bound, word):
                    yield str(field.alias), str(getattr(bound, word))


@pytest.mark.parametrize("model", [StepSpec, Resources, Retry])
def test_every_bound_of_a_step_stands_beside_its_field(model: type[WireModel]) -> None:
    rows = table_rows(DOCS / "workflow.md")
    spelled = {"8388608": "8 MiB"}
    elsewhere = {("dependsOn", "1000")}  # a step cannot depend on more steps than there are
    missing = [
        (name, number)
        for name, number in bounds_of(model)
        if (name, number) not in elsewhere
        and not re.search(rf"\b{re.escape(spelled.get(number, number))}\b", rows[name][1])
    ]

    assert missing == []


def test_the_example_of_a_workflow_can_be_planned() -> None:
    examples = re.findall(r"^```json\n(.*?)^```", text_of(DOCS / "workflow.md"), re.MULTILINE | re.DOTALL)
    assert examples

    for example in examples:
        plan = plan_steps(json.loads(example)["steps"], known_images=lambda slugs: slugs)
        assert len(plan.steps) > 1


def test_the_reasons_are_a_closed_table_with_class_and_meaning() -> None:
    page = text_of(DOCS / "reasons.md")
    sections = dict(re.findall(r"^## (User|Infrastructure)$(.*?)(?=^## )", page, re.MULTILINE | re.DOTALL))

    for heading, is_infrastructure in (("User", False), ("Infrastructure", True)):
        found = re.findall(r"^\| `(\w+)` \| (.+) \|$", sections[heading], re.MULTILINE)
        assert found == [(str(r), r.meaning) for r in Reason if r.is_infrastructure is is_infrastructure]


def test_reasons_that_no_code_gives_are_said_to_be_reserved() -> None:
    code = "".join(
        path.read_text(encoding="utf-8")
        for package in ("coordinator", "runner")
        for path in (ROOT / package).rglob("*.py")
    )
    never_given = {str(reason) for reason in Reason if f"Reason.{reason.name}" not in code}
    line = next(line for line in text_of(DOCS / "reasons.md").splitlines() if "are reserved" in line)

    assert set(re.findall(r"`(\w+)`", line)) == never_given


# --- commands


def commands() -> Iterator[tuple[str, click.Command]]:
    assert isinstance(main, click.Group)
    context = click.Context(main)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        yield name, command


def options_of(command: click.Command) -> set[str]:
    """With those of the commands below it."""
    below = command.commands.values() if isinstance(command, click.Group) else ()
    return set().union(*map(options_of, below)) | {
        word
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for word in (*parameter.opts, *parameter.secondary_opts)
    }


@pytest.mark.parametrize(
    ("name", "command"), list(commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_command_and_option_is_documented(name: str, command: click.Command) -> None:
    operations, runner = text_of(DOCS / "operations.md"), text_of(DOCS / "runner.md")
    rows = [line for line in operations.splitlines() if re.match(rf"\| `buildmill {name}\b", line)]
    said = runner if name == "runner" else "\n".join(rows)

    assert rows

    missing = {option for option in options_of(command) if not re.search(rf"{option}(?![\w-])", said)}
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_page_uses_an_option_that_does_not_exist(page: Path) -> None:
    known = dict(commands())
    lines = re.sub(r"\\\n", " ", text_of(page)).splitlines()
    wrong = []
    for line in lines:
        for said in re.finditer(r"\bbuildmill (\w+)((?: [^`|#;&\n]*)?)", line):
            name, rest = said.groups()
            if name not in known or not re.search(r" --", rest):
                continue
            options = set(re.findall(r"(?<= )--[a-z-]+", rest))
            wrong += [f"{name} {option}" for option in options - options_of(known[name]) - {"--help"}]

    assert wrong == []


def test_every_command_says_in_its_help_what_each_option_means() -> None:
    silent = [
        f"{name} {parameter.opts[0]}"
        for name, command in commands()
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.help
    ]

    assert silent == []


# --- the map and the protocol


def line_of(text: str) -> str:
    found = re.search(r"^shared\b.*?\bcli$", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return " ".join(found.group().split())


@pytest.mark.parametrize("package", ["coordinator", "runner"])
def test_the_map_has_the_line_of_imports_of_the_package(package: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")))
    page = text_of(DOCS / "architecture.md").split(f"<!-- line: {package} -->")[1]

    assert line_of(page) == line_of(docstring or "")


@pytest.mark.parametrize(
    ("package", "heading"),
    [("coordinator", "The coordinator"), ("runner", "The runner"), ("shared", "What is shared")],
)
def test_the_map_says_what_each_part_is(package: str, heading: str) -> None:
    section = text_of(DOCS / "architecture.md").split(f"### {heading}\n")[1]
    section = re.split(r"^##", section, maxsplit=1, flags=re.MULTILINE)[0]
    parts = {
        path.stem
        for path in (ROOT / package).iterdir()
        if not path.name.startswith("__") and (path.suffix == ".py" or (path / "__init__.py").exists())
    }

    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == parts


def test_the_protocol_page_has_every_path_of_the_runner_protocol() -> None:
    page = text_of(DOCS / "protocol.md")
    spelled = {
        value.replace("{step_id}", "{stepId}")
        for name, value in vars(paths).items()
        if name.isupper() and isinstance(value, str) and value.startswith("/")
    }

    assert {path for path in spelled if not re.search(rf"{re.escape(path)}[`?]", page)} == set()


def test_the_protocol_page_has_every_code_of_an_error() -> None:
    def codes(kind: type[CoordinatorError]) -> set[str]:
        return {kind.code}.union(*(codes(child) for child in kind.__subclasses__()))

    page = text_of(DOCS / "protocol.md").split("## Errors")[1]

    assert {code for code in codes(CoordinatorError) - {"error"} if f"`{code}`" not in page} == set()


# --- what stands beside the pages


def test_decisions_are_numbered_without_a_gap_and_say_situation_choice_and_price() -> None:
    pages = sorted((DOCS / "decisions").glob("*.md"))

    assert [page.name[:4] for page in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
    for page in pages:
        assert re.findall(r"^## (.+)$", text_of(page), re.MULTILINE) == ["Situation", "Choice", "Price"]


def test_the_example_of_an_environment_names_what_compose_reads() -> None:
    compose = text_of(ROOT / "compose" / "compose.yaml")
    example = text_of(ROOT / "compose" / "example.env")
    read = set(re.findall(r"\$\{([A-Z_]+)", compose))
    named_there = set(re.findall(r"^([A-Z_]+)=", example, re.MULTILINE))

    assert read - named_there <= {"BUILDMILL_NAME"}
    assert named_there <= read


def test_the_licence_is_the_one_the_package_names() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        licence = tomllib.load(file)["project"]["license"]

    text = " ".join(text_of(ROOT / "LICENSE").split())
    assert licence == "Apache-2.0"
    assert text.startswith("Apache License Version 2.0, January 2004")
    assert text.endswith(
        "See the License for the specific language governing permissions and limitations under the License."
    )
