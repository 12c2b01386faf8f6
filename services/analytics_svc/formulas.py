"""Formulas of measures become SQL: a small grammar, read by hand, of which only numbers and known columns go on.

sum     = term (("+" | "-") term)*
term    = factor (("*" | "/") factor)*
factor  = "-" factor | number | name | function "(" sum ("," sum)* ")" | "(" sum ")"
"""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn

from services.chassis import errors

# How deep parentheses, functions and signs may be nested.
MAX_DEPTH = 50

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)
      | (?P<name>[^\W\d][\w.]*)
      | "(?P<quoted>(?:[^"\\]|\\.)*)"
      | (?P<sign>[-+*/(),])
      | (?P<end>$)
    )""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
# A lambda names its arguments once, so that SQL does not grow with each level.
_OF_TWO = "arrayMap((x, y) -> if(isNull(x) OR isNull(y), NULL, {function}(x, y)), [{0}], [{1}])[1]"
_FUNCTIONS: Mapping[str, tuple[int, str]] = {
    "abs": (1, "abs({0})"),
    "least": (2, _OF_TWO.replace("{function}", "least")),
    "greatest": (2, _OF_TWO.replace("{function}", "greatest")),
    "ifnull": (2, "ifNull({0}, {1})"),
}
_DIGITS = re.compile(r"\d")


class _Token(NamedTuple):
    kind: str
    text: str
    position: int


def compile_formula(formula: str, resolve: Callable[[str], str | None], known: list[str], path: str) -> str:
    """SQL of a Nullable(Float64), never infinite. `resolve` gives the SQL of a name, None when there is none.

    Raises INVALID_ARGUMENT (FORMULA_INVALID) with the position, in characters from 1; `known` are the names there are.
    """
    sql = _Parser(formula, resolve, known, path).parse()
    return f"arrayMap(x -> if(isFinite(x), x, NULL), [{sql}])[1]"


class _Parser:
    def __init__(
        self, formula: str, resolve: Callable[[str], str | None], known: list[str], path: str
    ) -> None:
        self._formula = formula
        self._resolve = resolve
        self._known = known
        self._path = path
        self._depth = 0
        self._at = 0
        self._token = self._read()

    def parse(self) -> str:
        sql = self._sum()
        if self._token.kind != "end":
            self._fail(f"{self._token.text} does not belong here.")
        return sql

    def _read(self) -> _Token:
        found = _TOKEN.match(self._formula, self._at)
        if found is None:
            start = len(self._formula) - len(self._formula[self._at :].lstrip())
            self._token = _Token("", self._formula[start], start)
            self._fail("This cannot be read.")
        self._at = found.end()
        kind = str(found.lastgroup)
        return _Token(kind, found[kind], found.start(kind))

    def _take(self, text: str) -> bool:
        if self._token.kind != "sign" or self._token.text != text:
            return False
        self._token = self._read()
        return True

    def _expect(self, text: str) -> None:
        if not self._take(text):
            self._fail(f"{text} is missing.")

    def _sum(self) -> str:
        sql = self._term()
        while self._token.text in ("+", "-") and self._token.kind == "sign":
            operator, self._token = self._token.text, self._read()
            sql = f"({sql} {operator} {self._term()})"
        return sql

    def _term(self) -> str:
        sql = self._factor()
        while True:
            if self._take("*"):
                sql = f"({sql} * {self._factor()})"
            elif self._take("/"):
                sql = f"({sql} / nullIf({self._factor()}, 0))"
            else:
                return sql

    def _factor(self) -> str:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._fail(f"More than {MAX_DEPTH} levels.")
        sql = self._operand()
        self._depth -= 1
        return sql

    def _operand(self) -> str:
        if self._take("-"):
            return f"(-{self._factor()})"
        if self._take("("):
            sql = self._sum()
            self._expect(")")
            return sql
        token = self._token
        if token.kind == "number":
            self._token = self._read()
            return f"toFloat64({float(token.text)!r})" if float(token.text) < float("inf") else "inf"
        if token.kind in ("name", "quoted"):
            self._token = self._read()
            if token.kind == "name" and self._take("("):
                return self._function(token)
            return self._named(token)
        self._fail("A number, a name or a parenthesis is missing.")

    def _named(self, token: _Token) -> str:
        name = re.sub(r"\\(.)", r"\1", token.text, flags=re.DOTALL) if token.kind == "quoted" else token.text
        sql = self._resolve(name)
        if sql is None:
            nearest = difflib.get_close_matches(name, self._known)
            self._fail(f"No measure before this one is named {name}.", token, nearest=", ".join(nearest))
        return sql

    def _function(self, token: _Token) -> str:
        if token.text == "round":
            return self._round()
        if token.text not in _FUNCTIONS:
            nearest = difflib.get_close_matches(token.text, [*_FUNCTIONS, "round"])
            self._fail(f"There is no function {token.text}.", token, nearest=", ".join(nearest))
        count, sql = _FUNCTIONS[token.text]
        arguments = [self._sum()]
        while self._take(","):
            arguments.append(self._sum())
        if len(arguments) != count:
            self._fail(f"{token.text} takes {count} of them, not {len(arguments)}.", token)
        self._expect(")")
        for index, argument in enumerate(arguments):
            sql = sql.replace(f"{{{index}}}", argument)
        return sql

    def _round(self) -> str:
        argument, digits = self._sum(), "0"
        if self._take(","):
            if not _DIGITS.fullmatch(self._token.text):
                self._fail("The number of digits is one of 0 to 9.")
            digits, self._token = self._token.text, self._read()
        self._expect(")")
        return f"round({argument}, {digits})"

    def _fail(self, text: str, token: _Token | None = None, **metadata: str) -> NoReturn:
        position = (token or self._token).position + 1
        raise errors.invalid_argument(
            "FORMULA_INVALID",
            f"At character {position}: {text}",
            field=self._path,
            position=position,
            **metadata,
        )
