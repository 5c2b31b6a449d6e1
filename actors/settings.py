"""The base of every settings model: strict, frozen, documented by the docstring under each field."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Settings(BaseModel):
    """A group of settings. Unknown keys are errors; values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)


def _without_secret(url: str) -> str:
    if "@" in urlsplit(url).netloc:
        # The settings are written to job.yaml and errors to logs.
        raise PydanticCustomError("secret", "the address holds a user name or password, which would be stored; leave them out")
    return url


Url = Annotated[str, AfterValidator(_without_secret)]
"""An address without credentials."""
