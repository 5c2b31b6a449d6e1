"""What is raised for a user's mistake. It loads nothing, so that light processes may raise it."""


class JobError(ValueError):
    """A user's mistake in a job: one line, exit code 2."""
