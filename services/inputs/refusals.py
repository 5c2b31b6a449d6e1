"""What rows, tokenizers, templates and model folders raise, as one line: the place, their own words, the remedy.

with theirs(f"{path}:{line}", "the chat template", "mend the row or set data.prompts.template"):
    tokenizer.apply_chat_template(...)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opd_governor.services.job.errors import JobError

LONGEST_WORDS = 300
"""Characters of somebody else's message that are repeated."""
NAMED = 3
"""Refused rows named by line; the others are counted."""


class DataError(JobError):
    """A mistake in a data file: one line that names file, line and remedy; exit code 2."""


class RowError(ValueError):
    """A row that is no prompt: what is wrong with it and what to do. Its place is added by the code that knows it."""


def is_theirs(error: BaseException) -> bool:
    """Whether it is an error of the called code, not an interrupt. A panic of the Rust tokenizers is no Exception in Python."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def words(error: BaseException) -> str:
    """Its own words on one line, its type where it has none."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError):
        text = f"no key {text}"
    if not text:
        return type(error).__name__
    return text if len(text) <= LONGEST_WORDS else f"{text[:LONGEST_WORDS]}..."


@contextmanager
def theirs(place: str, who: str, remedy: str, kind: type[ValueError] = DataError) -> Iterator[None]:
    """Whatever the code inside raises becomes one line of `kind`. A JobError or RowError passes: it is one line already."""
    try:
        yield
    except (JobError, RowError):
        raise
    except BaseException as error:
        if not is_theirs(error):
            raise
        before = f"{place}: " if place else ""
        raise kind(f"{before}{who} says: {words(error)}; {remedy}") from error


def some_of(lines: Sequence[str], total: int | None = None) -> str:
    """The first few lines, the others counted. `total`: where `lines` holds only some of them."""
    total = len(lines) if total is None else total
    named = "; ".join(lines[:NAMED])
    return f"{named}; and {total - NAMED} more" if total > NAMED else named
