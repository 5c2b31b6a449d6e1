"""The base of every settings model: strict, frozen, documented by the docstring under each field."""

from typing import Annotated, Any, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError


class Settings(BaseModel):
    """A group of settings. Unknown keys are errors; values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would read `true` as 1, and YAML reads `on` and `yes` as true."""
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and bool not in kinds and {int, float} & kinds:
            raise ValueError("must be a number, not true or false")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation names, at any depth."""
    return {annotation}.union(*(_kinds(part) for part in get_args(annotation)))


def _without_secret(url: str) -> str:
    if "@" in urlsplit(url).netloc:
        # The settings are written to job.yaml and errors to logs.
        raise PydanticCustomError("secret", "the address holds a user name or password, which would be stored; leave them out")
    return url


Url = Annotated[str, AfterValidator(_without_secret)]
"""An address without credentials."""


TEMPLATE_OWN = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template")
"""What this package or transformers passes to a chat template itself."""


def _without_own(keys: dict[str, Any]) -> dict[str, Any]:
    if taken := [key for key in keys if key in TEMPLATE_OWN]:
        raise ValueError(f"{taken[0]} is passed to every chat template already; leave it out")
    return keys


TemplateKeys = Annotated[dict[str, Any], AfterValidator(_without_own)]
"""Variables of a chat template, such as `enable_thinking: false`."""


class FollowSettings(Settings):
    """How a teacher follows the student that it began as. Name one of the two."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """It takes the student's weights after every so many steps."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """After each step its weights are `ema` of what they were and the rest of the student's: .99 follows within some 100 steps."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "FollowSettings":
        if (self.every_steps is None) == (self.ema is None):
            raise ValueError("name one of every_steps and ema")
        return self
