"""How answers are drawn. Imported by every `--help`: nothing here imports more than pydantic."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """How answers are drawn."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, defer_build=True
    )

    temperature: Annotated[float, Field(ge=0, le=10)] = 0.7
    """0 takes the likeliest token every time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw among the likeliest tokens that make up this share."""
    max_tokens: Annotated[int, Field(gt=0)] = 512
    """Longest answer, in tokens."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """The same seed gives the same answer to the same conversation."""
