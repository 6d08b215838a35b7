"""Readers: whatever is in a file, the answer is its content or one message that a person can use.

Some damaged inputs of each reader; `python -m tests.fuzz` runs as many as one likes, and its docstring says how to add a reader.
"""

from functools import cache

import pytest
from fuzz import Case, address_space, cases, files_of, groups, judge
from fuzz.mutations import damage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
