"""Files that GitHub and citation tools read: they parse, have the fields that matter, and name what exists."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

import megatron_hybrid
from tests.test_packaging import tracked_files

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yaml"))
FORMS = [ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml" for name in ("bug", "feature", "model")]


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_name_actions_and_files_that_exist(path):
    workflow = load(path)
    assert workflow[True] and workflow["permissions"] == {"contents": "read"}  # YAML reads `on` as true
    for name, job in workflow["jobs"].items():
        assert job["runs-on"].startswith("ubuntu-"), name
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), (name, step)
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@v[\d.]+", step["uses"]), step["uses"]
            for script in re.findall(r"bash (\S+)", step.get("run", "")):
                assert (ROOT / script).is_file(), script


def test_workflows_cover_lint_tests_docs_and_wheels():
    jobs = {name for path in WORKFLOWS for name in load(path)["jobs"]}
    assert {"lint", "tests", "build", "wheels"} <= jobs
    commands = [step.get("run") for path in WORKFLOWS for job in load(path)["jobs"].values() for step in job["steps"]]
    assert "bash .ci/run" in commands and "mkdocs build --strict" in commands


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_have_what_github_needs(path):
    form = load(path)
    assert form["name"] and form["description"] and form["labels"]
    entries = {entry["id"]: entry for entry in form["body"]}
    assert len(entries) == len(form["body"]), "ids are unique"
    for entry in entries.values():
        assert entry["type"] in ("textarea", "input", "dropdown", "checkboxes") and entry["attributes"]["label"]
    assert any(entry.get("validations", {}).get("required") for entry in entries.values())


def test_the_bug_form_asks_for_what_a_report_needs():
    required = {e["id"] for e in load(FORMS[0])["body"] if e.get("validations", {}).get("required")}
    assert {"command", "log", "environment"} <= required


def test_owners_name_folders_that_exist():
    lines = [
        line.split() for line in (ROOT / ".github" / "CODEOWNERS").read_text().splitlines() if line[:1] not in ("#", "")
    ]
    assert lines[0][0] == "*"
    for pattern, *owners in lines[1:]:
        assert (ROOT / pattern.strip("/")).is_dir() and all(owner.startswith("@") for owner in owners)


def test_dependabot_looks_at_files_that_exist():
    found = {update["package-ecosystem"] for update in load(ROOT / ".github" / "dependabot.yml")["updates"]}
    assert (
        found == {"pip", "github-actions", "docker"}
        and (ROOT / "Dockerfile").is_file()
        and (ROOT / "setup.py").is_file()
    )


def test_the_citation_is_of_this_project():
    citation = load(ROOT / "CITATION.cff")
    assert citation["title"] == "megatron_hybrid" == megatron_hybrid.__name__ and citation["license"] == "Apache-2.0"
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["message"]


def test_pre_commit_has_the_rules_of_the_tests():
    config = load(ROOT / ".pre-commit-config.yaml")
    hooks = {hook["id"]: hook for repository in config["repos"] for hook in repository["hooks"]}
    assert {"ruff-check", "ruff-format", "codespell", "check-github-workflows", "validate-cff", "prose"} <= set(hooks)
    (ruff,) = (repository["rev"] for repository in config["repos"] if repository["repo"].endswith("ruff-pre-commit"))
    installed = subprocess.run(["ruff", "--version"], capture_output=True, text=True).stdout.split()[1]
    assert ruff == f"v{installed}", "the formatter of pre-commit and of the tests is the same"
    chosen = re.compile(hooks["prose"]["files"]), re.compile(hooks["prose"]["exclude"])
    names = [str(path.relative_to(ROOT)) for path in tracked_files()]
    checked = {name for name in names if chosen[0].search(name) and not chosen[1].search(name)}
    assert {"README.md", "megatron_hybrid/train/trainer.py", "docs/guides/data.md"} <= checked
