"""data.validation: named sets, a plain list, and names that are refused."""

import pytest

from megatron_hybrid.config.load import dump_run, load_run
from tests.config.wrong_runs import TINY, Case, assert_named, each

WITHOUT = [override for override in TINY if not override.startswith("data.validation")]
WRONG: list[Case] = [
    (["data.validation={code: []}"], "data.validation.code", "has 0 entries", "at least 1"),
    (["data.validation={a.b: [{path: x}]}"], "data.validation.a.b", "'a.b' does not name", "letters, digits"),
    (["data.validation={'7': [{path: x}]}"], "data.validation.7", "'7' does not name", "not digits alone"),
    (["data.validation={'': [{path: x}], b: [{path: x}]}"], "data.validation.''", "'' does not name", "letters"),
    (["data.validation={code: {path: x}}"], "data.validation.code", "is not a list", "write"),
    (["data.validation={code: [{path: x.bin}]}"], "data.validation.code.0.path", "x.bin", "their prefix, x"),
    (["data.validation=5"], "data.validation", "5 is no list of sources", "sets by their names"),
]


@each(WRONG)
def test_wrong_sets(overrides, field, wrong, remedy):
    assert_named(overrides, field, wrong, remedy)


@pytest.mark.parametrize(
    "overrides, fields",
    [
        ([], []),
        (["data.validation.0.path=v"], ["data.validation.0"]),
        (["data.validation=[{path: a}, {path: b}]"], ["data.validation.0", "data.validation.1"]),
        (
            ["data.validation.code.0.path=v", "data.validation.docs=[{path: a}, {path: b}]"],
            ["data.validation.code.0", "data.validation.docs.0", "data.validation.docs.1"],
        ),
    ],
)
def test_sets_and_their_fields(overrides, fields, tmp_path):
    run = load_run(None, [*WITHOUT, *overrides])
    assert [field for field in run.data.sources() if field != "data.train.0"] == fields
    (tmp_path / "run.yaml").write_text(dump_run(run))
    assert load_run(str(tmp_path / "run.yaml")) == run
