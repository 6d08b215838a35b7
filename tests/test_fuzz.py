"""Readers: whatever is in a file, the answer is its content or one message that a person can use.

Some damaged inputs of each reader; `python -m tests.fuzz` runs as many as one likes, and its docstring says how to add a reader.
"""

from functools import cache

import pytest
from fuzz import Case, address_space, cases, files_of, groups, judge
from fuzz.mutations import damage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskgpt.errors import UserError

CASES = [case for group in groups() for case in cases(group)]
MEMORY = 1 << 30  # bytes beyond what the tests use already: far more than these small files can ask for
made = cache(files_of)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(random=st.randoms(use_true_random=False))
def test_a_damaged_file_is_read_or_refused(case: Case, random):
    """No other exception, no hang, no memory beyond measure, and a message that names the file in a line."""
    with address_space(MEMORY):
        _, finding = judge(case, damage(random, made(case), case.damage))
    assert finding is None, f"{finding.kind}\n{finding.detail}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_undamaged_files_are_read(case: Case):
    """What is damaged above is good before; otherwise nothing would be tested."""
    outcome, finding = judge(case, made(case))
    assert outcome == "read", finding and finding.detail


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("x.bin: too short"), None),
        (UserError("too short"), "message without a file name"),
        (UserError("x.bin: too\nshort"), "message of several lines"),
        (UserError("x.bin: too short" * 100), "message of 1,000 characters or more"),
        (KeyError("x.bin"), "KeyError"),
        (MemoryError(), "MemoryError"),
        (DeprecationWarning("x.bin"), "DeprecationWarning"),
    ],
)
def test_the_judge_finds_what_is_wrong(error, kind):
    """Of answers to a damaged file, only a short message in one line that names it passes."""

    def read(folder):
        raise error

    outcome, finding = judge(Case("made_up", lambda folder: None, read), {"x.bin": b""})
    assert outcome == ("refused" if isinstance(error, UserError) else "failed")
    assert finding is None if kind is None else finding.kind.startswith(kind)
