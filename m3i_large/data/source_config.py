"""One entry of `data.sources`: where the shards are, what a sample is, and which samples count."""

from fractions import Fraction
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Kind = Literal["image_text", "image_category", "image"]
JSON_FIELD = "json:"  # a field of the .json part rather than a part of its own


class Nominal(BaseModel):
    """Size of a source as published: what planning uses where the data is not there."""

    model_config = ConfigDict(extra="forbid")

    samples: int = Field(gt=0, description="how many it has")
    shards: int = Field(gt=0, description="how many tar files it has")
    mean_bytes: int = Field(gt=0, description="bytes of a sample")


class FilterConfig(BaseModel):
    """Which samples of a source count. Applied when it is indexed, so that counts stay exact."""

    model_config = ConfigDict(extra="forbid")

    min_size: int | None = Field(None, gt=0, description="pixels of the shorter side, without a letterbox's padding")
    max_aspect: float | None = Field(None, ge=1, description="longer over shorter side")
    nsfw: list[str | None] | None = Field(None, description="accepted values of NSFW in .json; null = none given")
    min_similarity: float | None = Field(None, description="of `similarity` in .json; samples without it do not count")
    min_caption: int | None = Field(None, gt=0, description="bytes of the first caption field that is a part")


class SourceConfig(BaseModel):
    """One entry of `data.sources`."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(
        min_length=1, pattern=r"^[\w.-]+$", description="of its metrics (loss/<term>/<name>) and its index"
    )
    kind: Kind = Field(description="what a sample has beside its image: a text, a class, nothing")
    shards: list[str] | str = Field(
        description="paths relative to data.root, or URLs; {000000..000003} expands, and * in local paths"
    )
    repeats: int | float | str = Field(
        1, description="weight: passes over this source per epoch; exact, '1/3' and 0.1 too"
    )
    quota: int | None = Field(None, gt=0, description="samples per lane and step, fixed; replaces the share by repeats")
    captions: list[str] = Field(
        ["txt"], min_length=1, description="where the text is, the first that is not empty: parts, or json:KEY"
    )
    caption_clean: bool = Field(False, description="undo URL quoting in captions and strip HTML (YFCC)")
    category_field: str = Field("cls", description="part that holds the class, or json:KEY")
    class_map: str | None = Field(None, description="JSON file {label: class index}, relative to data.root")
    letterbox: bool = Field(False, description="cut the padding of img2dataset's border mode (original_* in .json)")
    filters: FilterConfig = FilterConfig()
    licence: str = Field("", description="of the samples, as an exported model's card names it")
    nominal: Nominal | None = None

    @field_validator("repeats", mode="before")
    @classmethod
    def _check_repeats(cls, value: Any) -> Any:
        try:
            good = not isinstance(value, bool) and Fraction(str(value)) > 0
        except (ValueError, ZeroDivisionError):
            good = False
        if not good:
            raise ValueError("needed: a positive number or fraction such as 2, 0.5 or '1/3'")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.filters.min_caption and all(field.startswith(JSON_FIELD) for field in self.captions):
            raise ValueError(f"filters.min_caption: captions are {self.captions}; needed: one that is a part, as txt")
        return self

    @property
    def exact_repeats(self) -> Fraction:
        """`repeats` as written: 0.1 is 1/10."""
        return Fraction(str(self.repeats))

    @property
    def target_fields(self) -> list[str] | None:
        """Fields of which a sample must have one beside its image; None where the image is enough."""
        return {"image_text": self.captions, "image_category": [self.category_field], "image": None}[self.kind]
