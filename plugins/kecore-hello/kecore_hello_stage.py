"""A stage from outside: it puts a spread into any locate-then-edit method, as in ``memit + hello-stage``."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from kecore.api.config import StageSettings
from kecore.engine import ClosedForm
from kecore_hello_spread import ByPower


class HelloStage:
    """Let the later layers write more than the earlier ones."""

    class Settings(StageSettings):
        """What may be chosen: users give it as ``hello_stage_power``."""

        power: float = Field(
            default=2.0, ge=1, description="How much more the later layers write; 1 is MEMIT's spread."
        )

    name = "hello-stage"
    reference = "kecore, write your own stage (docs/write-a-stage.md)"
    api = (1, 1)

    def apply(self, form: ClosedForm, settings: HelloStage.Settings) -> ClosedForm:
        """Return the method's form with this stage's spread."""
        return replace(form, spread=ByPower(settings.power))
