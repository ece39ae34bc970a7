"""Tables of cases that make up one promise: one test runs through all of them."""

import inspect
import sys
from functools import wraps

import torch


def every_case(names, cases, ids=None):
    """Call a test with each case in turn, as if each were a test of `pytest.mark.parametrize`.

    For cases that take milliseconds and differ in their values alone. The seed is set before each
    case, fixtures are shared, and what was captured shows the case that failed.
    """
    names = [names] if isinstance(names, str) else list(names)

    def values_of(case):
        if hasattr(case, "marks"):  # a pytest.param
            return case.values
        return (case,) if len(names) == 1 else case

    def decorate(test):
        signature = inspect.signature(test)
        fixtures = [p for name, p in signature.parameters.items() if name not in names]

        @wraps(test)
        def run(**given):
            for case in cases:
                values = dict(zip(names, values_of(case), strict=True))
                sys.stdout.write(f"{values}\n")
                torch.manual_seed(0)
                test(**given, **values)

        run.__signature__ = signature.replace(parameters=fixtures)
        return run

    return decorate
