"""Outcomes of calls, printed by a process without the checks of annotations that the tests run under."""

import json


def outcome(call):
    """Result of a call, or kind and message of its error."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def print_outcomes(kinds):
    """Print what becomes of every case of several kinds, each the calls, and what is expected of them, by name."""
    print(json.dumps([{name: outcome(call) for name, (call, _) in cases.items()} for cases in kinds], default=str))
