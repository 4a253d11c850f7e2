"""What a recipe can say of publishing. Nothing here loads torch or the Hub's library."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Layout = Literal["repos", "folders", "branches"]
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_ID = re.compile(rf"{_PART}/{_PART}")


def check_repo_id(name: str) -> str:
    """``org/name`` as the Hub accepts it; ValueError otherwise.

    Rules: huggingface_hub/utils/_validators.py, validate_repo_id.
    """
    bare = name.replace("{variant}", "v").replace("{format}", "f")
    if not _ID.fullmatch(bare) or ".." in bare or "--" in bare or bare.endswith(".git"):
        raise ValueError(
            "give org/name: letters, digits, '-', '_' and '.', no '--' or '..', at most 96 long; "
            "{variant} and {format} may stand in it"
        )
    return name


RepoId = Annotated[str, AfterValidator(check_repo_id)]


class Publish(BaseModel):
    """Upload to the Hugging Face Hub when the run is done. The token comes from the environment
    (HF_TOKEN) or from `hf auth login`, never from here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    repo: RepoId = Field(
        description="org/name. {variant} and {format} may stand in it; of several artifacts in "
        "repositories of their own, each gets its variant's name behind it otherwise."
    )
    private: bool = Field(True, description="New repositories are private.")
    layout: Layout = Field(
        "repos",
        description="One repository for each artifact (repos), one folder for each (folders), or "
        "one branch for each, beside a main branch that holds the report (branches).",
    )
    variants: list[str] | None = Field(
        None, description="Which variants; all that passed when not given."
    )
    base_model: RepoId | None = Field(
        None,
        description="The base model's id on the Hub, where the source does not tell: it stands in "
        "the model cards.",
    )
