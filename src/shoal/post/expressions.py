"""Arithmetic expressions over whole numbers: read, written, and worked out operation by operation."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from fractions import Fraction

OPERATIONS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
LONGEST = 200
"""Characters of an expression that is read; longer ones are no honest answer, and deep ones would exhaust the parser."""


@dataclass(frozen=True)
class Operation:
    """Two expressions and what is done with them."""

    sign: str
    left: Expression
    right: Expression


Expression = Operation | Fraction


def parse(text: str) -> Expression | None:
    """The expression in `text`, made of whole numbers, + - * / and brackets; None for anything else."""
    if len(text) > LONGEST:
        return None
    try:
        return _convert(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _convert(node: ast.AST) -> Expression:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return Operation(OPERATIONS[type(node.op)], _convert(node.left), _convert(node.right))
    raise ValueError("not an expression")


def value(expression: Expression) -> Fraction | None:
    """None where it divides by zero."""
    if isinstance(expression, Fraction):
        return expression
    left, right = value(expression.left), value(expression.right)
    if left is None or right is None or (expression.sign == "/" and not right):
        return None
    return _apply(expression.sign, left, right)


def _apply(sign: str, left: Fraction, right: Fraction) -> Fraction:
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    return left * right if sign == "*" else left / right


def numbers(expression: Expression) -> list[Fraction]:
    """The numbers it is made of, from left to right."""
    return [expression] if isinstance(expression, Fraction) else numbers(expression.left) + numbers(expression.right)


def render(expression: Expression) -> str:
    """As text, with no more brackets than needed."""
    if isinstance(expression, Fraction):
        return str(expression)
    left, right = render(expression.left), render(expression.right)
    if isinstance(expression.left, Operation) and expression.sign in "*/" and expression.left.sign in "+-":
        left = f"({left})"
    if isinstance(expression.right, Operation) and (
        expression.sign == "/"
        or (expression.sign == "*" and expression.right.sign != "*")
        or (expression.sign == "-" and expression.right.sign in "+-")
    ):
        right = f"({right})"
    return f"{left}{expression.sign}{right}"


def work_out(expression: Expression) -> list[str]:
    """The expression, then what is left of it after every operation, down to its value: `["2*(3+4)", "2*7", "14"]`."""
    lines = [render(expression)]
    while isinstance(expression, Operation):
        expression = _reduce(expression)
        lines.append(render(expression))
    return lines


def _reduce(expression: Operation) -> Expression:
    """Do the first operation that has two numbers."""
    left, right = expression.left, expression.right
    if isinstance(left, Operation):
        return Operation(expression.sign, _reduce(left), right)
    if isinstance(right, Operation):
        return Operation(expression.sign, left, _reduce(right))
    return _apply(expression.sign, left, right)
