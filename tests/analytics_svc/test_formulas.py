"""Formulas: what they become, and where they are wrong."""

import pytest

from services.analytics_svc.formulas import MAX_DEPTH, compile_formula
from services.chassis.errors import Error
from tests.analytics_svc.injections import INJECTIONS

KNOWN = {"buyers": "m0", "p95_properties.latency": "m1", 'a "b" \\': "m2"}


def compiled(formula: str) -> str:
    return compile_formula(formula, KNOWN.get, list(KNOWN), "query.measures[3].formula")


def inner(formula: str) -> str:
    sql = compiled(formula)
    start, end = "arrayMap(x -> if(isFinite(x), x, NULL), [", "])[1]"
    assert sql.startswith(start)
    assert sql.endswith(end)
    return sql.removeprefix(start).removesuffix(end)


@pytest.mark.parametrize(
    ("formula", "sql"),
    [
        ("buyers", "m0"),
        ('"buyers"', "m0"),
        ("p95_properties.latency", "m1"),
        ('"a \\"b\\" \\\\"', "m2"),
        ("1 - 2 - 3", "((toFloat64(1.0) - toFloat64(2.0)) - toFloat64(3.0))"),
        ("buyers * -buyers + 1", "((m0 * (-m0)) + toFloat64(1.0))"),
        ("-(buyers + 1)", "(-(m0 + toFloat64(1.0)))"),
        ("buyers / buyers", "(m0 / nullIf(m0, 0))"),
        ("round(buyers, 2)", "round(m0, 2)"),
        ("ifnull(abs( buyers ),1)", "ifNull(abs(m0), toFloat64(1.0))"),
    ],
)
def test_reads(formula: str, sql: str) -> None:
    assert inner(formula) == sql


@pytest.mark.parametrize(
    ("formula", "position"),
    [
        ("buyers +", 9),
        ("buyers buyers", 8),
        ("(buyers", 8),
        ("buyers + visitors", 10),
        ("sqrt(buyers)", 1),
        ("least(buyers)", 1),
        ("abs(buyers, 1)", 1),
        ("round(buyers, buyers)", 15),
        ("round(buyers, 10)", 15),
        ("buyers % 2", 8),
        ("buyers ; 1", 8),
        ('"buyers', 1),
        ("{p0:String}", 1),
        ("'x'", 1),
        ("1..2", 2),
        ("ｂuyers", 1),
        ("", 1),
        ("buyers -- 1 )", 13),
        ('"buyers"(1)', 9),
    ],
)
def test_says_where_it_is_wrong(formula: str, position: int) -> None:
    with pytest.raises(Error) as caught:
        compiled(formula)
    assert (caught.value.reason, caught.value.metadata["position"]) == ("FORMULA_INVALID", str(position))
    assert caught.value.violations[0][0] == "query.measures[3].formula"


def test_names_what_was_meant() -> None:
    for formula, nearest in (("buyer + 1", "buyers"), ("rund(1)", "round")):
        with pytest.raises(Error) as caught:
            compiled(formula)
        assert caught.value.metadata["nearest"].split(", ")[0] == nearest


def test_depth_and_size_are_bounded() -> None:
    for formula in ("(" * 499, "-" * 499, "abs(" * 124 + "1" + ")" * 124):
        with pytest.raises(Error) as caught:
            compiled(formula)
        assert caught.value.reason == "FORMULA_INVALID"
    deepest = "least(1," * (MAX_DEPTH - 1) + "1" + ")" * (MAX_DEPTH - 1)
    assert len(compiled(deepest)) < 10_000


@pytest.mark.parametrize("injection", INJECTIONS)
def test_no_sql_gets_through(injection: str) -> None:
    with pytest.raises(Error) as caught:
        compiled(injection)
    assert caught.value.reason == "FORMULA_INVALID"
