"""What a recipe may say of tasks; no torch, no lm-eval."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

BUILTIN = "builtin:"


class TaskChoice(BaseModel):
    """One task, or a group of tasks that share these settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    task: str | None = Field(
        None,
        min_length=1,
        description="builtin:NAME, a task, group or tag of lm-eval (whose data sets come from the "
        "Hub), or one of those in `path`.",
    )
    path: str | None = Field(
        None,
        min_length=1,
        description="An lm-eval YAML file or a directory of them, relative to the recipe; all of "
        "its tasks where `task` is not given. YAML can name Python functions, which are run.",
    )
    axis: Literal["accuracy", "robustness", "safety"] | None = Field(
        None, description="Where the report counts it; a built-in task's own, else accuracy."
    )
    language: str | None = Field(
        None,
        pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]{2,8})*$",
        description="Code such as de: counted as the axis language:de instead.",
    )
    of: str | None = Field(None, description="The task that this one disturbs: same documents.")
    limit: int | None = Field(
        None, ge=1, description="Documents, drawn with the seed; evaluate.tasks_limit if not given."
    )
    num_fewshot: int | None = Field(
        None, ge=0, description="Solved examples in the prompt; the task's own number if not given."
    )
    apply_chat_template: bool | None = Field(
        None,
        description="Put prompts into the model's chat template. Not given: as a built-in task "
        "wants it, where the model has a template; else no.",
    )
    metric: str | None = Field(
        None,
        description="The one that comparisons are made with; acc_norm, or the task's first, if not "
        "given. More must be better.",
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"task": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if self.task is None and self.path is None:
            raise ValueError("give `task`, a name, or `path`, a YAML file or directory")
        if self.language is not None and self.axis not in (None, "accuracy"):
            raise ValueError("a task is counted by its language or by its axis: remove one")
        return self

    @property
    def is_builtin(self) -> bool:
        """Whether it comes with this package."""
        return self.path is None and self.task is not None and self.task.startswith(BUILTIN)
