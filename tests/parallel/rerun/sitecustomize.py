"""For PYTHONPATH: ranks that a test starts record steps without a GPU."""

from tests.recorder import record_by_rerunning

record_by_rerunning(setattr)
