"""Each check that fails says what to do next, in the report and on the terminal; what passed says nothing."""

import ast
import io
from pathlib import Path

import pytest
from rich.console import Console

from afd.evaluation import checks
from afd.evaluation.report import ADVICE, LARGER, TEMPLATES, VERDICTS, advice, advised
from afd.evaluation.terminal import present

CHECKS = Path(checks.__file__)


def results(*verdicts, protocol="quick"):
    """Results of which nothing is set but the checks, from (name, verdict) pairs."""
    found = [
        {"name": name, "verdict": said, "number": 3.0, "unit": "points", "allowed": 0.2, "meaning": "masked gradients"}
        for name, said in verdicts
    ]
    worst = max((said for _, said in verdicts), key=["skipped", "pass", "warn", "fail"].index)
    return {
        "subject": {"name": "net"}, "protocol": {"name": protocol}, "checks": found, "verdict": worst, "clean": 0.9,
        "data": {"name": "digits", "images": "the first 3", "split": "test"}, "attacks": [], "worst_case": {},
    }  # fmt: skip


def verdict(found):
    """The part of a report with the verdict."""
    return TEMPLATES.get_template("parts.html").module.verdict(found)


def named_in(path):
    """Names that a file of checks gives them: what `judge` is called with, or what `name` is set to."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("judge", "skipped"):
            yield from _text(node.args[0])
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "name":
            yield from _text(node.value)


def _text(node):
    if isinstance(node, ast.Constant):
        yield node.value
    if isinstance(node, ast.JoinedStr):
        yield node.values[0].value


def test_every_check_has_advice_and_there_is_no_advice_for_none():
    assert set(named_in(CHECKS)) == set(ADVICE)


@pytest.mark.parametrize("protocol", ["quick", "autoattack", "reference", "paper"])
def test_autoattack_is_recommended_where_it_was_not_run(protocol):
    told = advice("Square beats white-box", protocol)
    assert ("--protocol autoattack" in told) == (protocol in ("quick", "paper"))
    assert "masked" in told
    assert not {"{", "}"} & set("".join(advice(name, protocol) for name in ADVICE))


def test_failures_come_first_and_what_passed_says_nothing():
    found = advised(
        results(("re-verification", "pass"), ("doubling the steps", "warn"), ("accuracy at ε = 1", "fail"))["checks"],
        "quick",
    )
    assert [(name, said) for name, said, _ in found] == [("accuracy at ε = 1", "fail"), ("doubling the steps", "warn")]
    assert found[0][2] == advice(LARGER, "quick") != ""


def test_the_report_and_the_terminal_say_it_beside_the_verdict():
    found = results(("Square beats white-box", "fail"), ("random outputs", "pass"))
    page = verdict(found)
    assert VERDICTS["fail"] in page
    assert '<li><b class="fail">Square beats white-box</b> Gradients are masked' in page
    assert "<code>--protocol autoattack</code>" in page
    assert "random numbers" not in page
    console = Console(file=io.StringIO(), width=200)
    present(found, console)
    text = " ".join(console.file.getvalue().split())
    assert VERDICTS["fail"] in text
    assert "`--protocol autoattack`" in text
    calm = results(("random outputs", "pass"))
    assert "What to do next" not in verdict(calm)
    console = Console(file=io.StringIO(), width=200)
    present(calm, console)
    assert "what to do next" not in console.file.getvalue()
