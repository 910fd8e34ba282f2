"""README.md and docs/: figures come from result files, links lead somewhere, and sentences are short."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from testing.prose import too_long

ROOT = Path(__file__).resolve().parent.parent
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "guides").glob("*.md"))]
CONCEPTS = sorted((ROOT / "docs" / "concepts").glob("*.md"))
REFERENCE = [ROOT / "docs" / "reference" / name for name in ("exit-status.md", "file-formats.md")]
PAGES = [*GUIDES, *CONCEPTS, *REFERENCE, *sorted((ROOT / "docs" / "development").glob("*.md")), ROOT / "CONTRIBUTING.md"]
FIGURE = re.compile(r"\d[\d,.]*\s*(?:tokens/s|TFLOP/s|ms\b|nats|GiB\b|minutes)|\bMFU of \d")
NOT_MEASURED = ("989 TFLOP/s", "128 GiB", "42 GiB")
"""Figures in pages that are no measurements: a peak, the size of a machine, arithmetic."""


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def figures():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import figures

        yield figures
    finally:
        sys.path.pop(0)


def test_tables_are_those_of_the_result_files(figures):
    for page in figures.pages():
        text = page.read_text()
        assert figures.with_figures(text) == text, f"{name(page)}: run python benchmarks/tables.py"
    assert "12,860" in figures.headline() and figures.figure("main_job-cpu", *MAIN_JOB) > 1


MAIN_JOB = "examples/pretrain_hybrid_tiny.sh, TP2 x PP2 on 4 ranks", "validation loss at the end"


def test_a_figure_that_no_file_holds_is_an_error(figures):
    with pytest.raises(figures.Missing, match="no ours of 'nothing'"):
        figures.figure("main_job-cpu", "nothing", "tokens")


def test_measurements_are_those_of_the_result_files(figures):
    import tables

    texts = tables.pages()
    assert {path: path.read_text() for path in tables.TARGET.glob("*.md")} == texts, "run python benchmarks/tables.py"
    assert sum(len(text.splitlines()) for text in texts.values()) > 500


@pytest.fixture
def generate():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import generate

        yield generate
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize("page", ["configuration", "commands", "python-api"])
def test_the_reference_is_that_of_the_code(generate, page):
    if page == "commands" and sys.version_info[:2] != (3, 12):
        pytest.skip("argparse formats help differently in other versions of Python than 3.12")
    assert (ROOT / "docs" / "reference" / f"{page}.md").read_text() == generate.PAGES[page](), "run docs/generate.py"


@pytest.mark.parametrize("page", [page for page in GUIDES if page.name not in ("tuning.md", "layer-spec.md")], ids=name)
def test_measured_figures_are_in_tables(page, figures):
    """A figure in running text would not follow its result file."""
    text = figures.REGION.sub("", page.read_text())
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for known in NOT_MEASURED:
        text = text.replace(known, "")
    assert FIGURE.findall(text) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [*GUIDES, *CONCEPTS, *REFERENCE], ids=name)
def test_sentences_are_short(page):
    assert not too_long(page.read_text())


def test_the_api_page_has_every_public_name(generate):
    """Names of megatron_hybrid.spec, and an operation of each folder of hybrid_kernels."""
    import megatron_hybrid.spec

    assert set(generate.API["megatron_hybrid.spec"]) == set(megatron_hybrid.spec.__all__)
    folders = {path.parent.name for path in (ROOT / "kernels" / "hybrid_kernels").glob("*/reference.py")}
    assert {name.split(".")[1] for name in generate.API if name.startswith("hybrid_kernels.")} == folders


def test_every_field_is_described(generate):
    def undescribed(path, section):
        for name, field in section.model_fields.items():
            inner = list(generate.sections_in(field.annotation))
            if not inner and not field.description:
                yield f"{path}{name}"
            for one in inner:
                yield from undescribed(f"{path}{name}.", one)

    assert list(undescribed("", generate.RunConfig)) == []


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_readme_counts_the_layouts_that_are_tested():
    from testing.layouts import LAYOUTS

    readme = (ROOT / "README.md").read_text()
    assert re.findall(r"(\d+) (?:combinations of TP|layouts \|)", readme) == [str(len(LAYOUTS))] * 2


def test_every_guide_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("guides/*.md"):
        assert f"docs/guides/{page.name}" in readme, page.name


def test_the_site_builds_without_warnings(tmp_path):
    """Strict: a warning, such as one of a page that is in no menu or of a broken anchor, is an error."""
    pytest.importorskip("mkdocs", reason="mkdocs-material is in the dev extra")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Gated DeltaNet" in (tmp_path / "index.html").read_text()
