"""The recipe's section `audit`: which attacks, with what options, and when. It imports nothing heavy."""

from typing import Any

from pydantic import Field

from hf_clmul.gradients.options import Section


class Audit(Section):
    """Attacks on the finished model: does what was forgotten come back?"""

    attacks: dict[str, dict[str, Any]] | None = Field(
        None, description="{attack: {option: value}}; all attacks on models of the family, if left out"
    )
    after_run: bool = Field(False, description="audit at the end of `hf-clmul run`")
