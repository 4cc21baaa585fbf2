"""What people get wrong in the parameters of a sweep: it is named at its place."""

from pathlib import Path

import pytest
from support.mistakes import (
    Case,
    added,
    assert_named_at_its_place,
    based,
    by_number,
    changed,
    searched,
    valued,
)

from orchestrator.errors import InvalidFile
from orchestrator.grid.sweep import validate

SEARCH = [
    Case(
        "15",
        changed("parameters:\n  learning_rate: {values: [5e-5, 1e-4]}\n", ""),
        "1:1",
        "E2104",
        "parameters is missing",
    ),
    Case(
        "15",
        changed("\n  learning_rate: {values: [5e-5, 1e-4]}", " {}"),
        "2:1",
        "E2104",
        "parameters is empty",
    ),
    Case(
        "15",
        changed("\n  learning_rate: {values: [5e-5, 1e-4]}", ""),
        "2:1",
        "E2111",
        "parameters must be a block",
    ),
    Case(
        "16",
        valued("{values: 1e-4}"),
        "3:27",
        "E2110",
        "'values: 1e-4' must be a list — write values: [1e-4]",
    ),
    Case("16", valued("[5e-5, 1e-4]"), "3:18", "E2114", "write learning_rate: {values: [5e-5, 1e-4]}"),
    Case("16", valued("1e-4"), "3:18", "E2114", "write learning_rate: {value: 1e-4}"),
    Case("17", valued("{values: []}"), "3:27", "E2114", "parameters.learning_rate.values is empty"),
    Case("18", valued("{values: [1e-4, 5e-5, 0.0001]}"), "3:40", "E2115", "lists 0.0001 twice"),
    Case("19", valued("{min: 1e-5, max: 1e-3}"), "3:19", "E2114", "'min' is for random and bayes search"),
    Case("19", valued("{}"), "3:18", "E2114", "has neither 'value' nor 'values'"),
    Case("20", changed("grid", "random"), "1:9", "E2113", "method 'random' is not supported: grid is what"),
    Case("21", changed("grid", "bayes"), "1:9", "E2113", "write method: grid and list the values"),
    Case("23", changed("grid", "gird"), "1:9", "E2113", "unknown method 'gird' — did you mean 'grid'?"),
    Case(
        "23",
        valued("{distribution: log_unifrom}"),
        "3:19",
        "E2114",
        "'distribution' is for random and bayes search",
    ),
    Case(
        "24", valued("{values: [1], value: 1}"), "3:19", "E2114", "has both 'value' and 'values' — keep one"
    ),
    Case("24", valued("{values: [1], min: 1}"), "3:32", "E2114", "'min' is for random and bayes search"),
    Case(
        "-",
        valued("{vals: [1]}"),
        "3:19",
        "E2103",
        "'vals' in parameters.learning_rate — did you mean 'values'?",
    ),
    Case(
        "25",
        changed("[5e-5, 1e-4]}", f"{list(range(1, 102))}}}\n  seed: {{values: {list(range(100))}}}"),
        "2:1",
        "E2116",
        "the parameters make 10100 runs (101 x 100), more than 10000",
    ),
    Case(
        "26",
        added("include: [{rank: 4, learning_rate: 1}]"),
        "6:12",
        "E2117",
        "names 'rank', which is not among",
    ),
    Case("26", added("exclude: [{learn_rate: 1}]"), "6:12", "E2117", "— did you mean 'learning_rate'?"),
    Case(
        "26",
        added("exclude: [{learning_rate: 5e-5}, {learning_rate: 1e-4}]"),
        "6:1",
        "E2117",
        "removes every run",
    ),
    Case("26", added("exclude: [{learning_rate: 3e-5}]"), "6:11", "E2117", "exclude[0] matches no run"),
    Case("26", added("exclude: [{}]"), "6:11", "E2117", "exclude[0] is empty"),
    Case(
        "26",
        searched("rank: {values: [4, 8]}") + "include: [{rank: 4}]\n",
        "7:11",
        "E2117",
        "does not say learning_rate",
    ),
    Case(
        "18",
        added("include: [{learning_rate: 5e-5}]"),
        "6:11",
        "E2115",
        "include[0] is the same run as one of parameters",
    ),
    Case("27", searched('rank: {value: "${parameters.alpha}"}'), "4:17", "E2118", "names no parameter"),
    Case(
        "27",
        searched('rank: {value: "${parameters.learning_rat}"}'),
        "4:17",
        "E2118",
        "did you mean 'learning_rate'?",
    ),
    Case("27", searched('rank: {value: "${parameters.rank}"}'), "4:17", "E2118", "is itself a reference"),
    Case(
        "27",
        searched('rank: {value: "${rank}"}'),
        "4:17",
        "E2118",
        "refers to nothing — write ${parameters.NAME}",
    ),
    Case(
        "28",
        added("metric: {name: val/los, goal: minimize}"),
        "6:16",
        "E2119",
        "'val/los' — did you mean 'val/loss'?",
    ),
    Case("28", added("metric: {name: accuracy}"), "6:16", "E2119", "or add an evaluate command"),
    Case(
        "28",
        added("metric: {name: val/loss}").replace("data}", "data, val_fraction: 0}"),
        "6:16",
        "E2119",
        "is 0",
    ),
    Case(
        "29", added("metric: {goal: minimise}"), "6:16", "E2111", "got 'minimise' — did you mean 'minimize'?"
    ),
    Case("30", added("early_terminate: {min_iter: 300}"), "6:1", "E2124", "remove it"),
    Case(
        "31", based("learning_rate: fast"), "4:43", "E2111", "base.learning_rate must be a number, got 'fast'"
    ),
]


@pytest.mark.parametrize("case", SEARCH, ids=by_number)
def test_a_mistake_is_named_at_its_place(case: Case, tmp_path: Path) -> None:
    assert_named_at_its_place(case, tmp_path)


def test_a_circle_of_references_is_named_at_each_link(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(searched('rank: {value: "${parameters.alpha}"}\n  alpha: {value: "${parameters.rank}"}'))
    with pytest.raises(InvalidFile) as caught:
        validate(file)
    assert [(problem.code, problem.where) for problem in caught.value.problems] == [
        ("E2118", f"{file}:4:17"),
        ("E2118", f"{file}:5:18"),
    ]
