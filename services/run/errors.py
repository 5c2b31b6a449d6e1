"""Why a run gives up. The command line turns each into an exit code."""


class GuardRailError(RuntimeError):
    """The governor stopped the run: exit code 4."""


class SyncError(RuntimeError):
    """Engine and learner disagree after a weight sync: the engine does not sample from the student, so the run must stop."""


class LearnerError(RuntimeError):
    """The learner cannot go on: too many skipped steps in a row, or it died too often before the same step."""


class TerminatedError(RuntimeError):
    """SIGTERM came before the last step; the work so far is in a checkpoint. Exit code 143, so that a supervisor starts the run again."""
