"""What can be said of an unlearn request, from proved to hidden, and what each word means. It knows words; whether
one is deserved is worked out elsewhere."""

from collections.abc import Mapping, Sequence
from typing import Any

EXACT_BY_DELETION, EXACT_BY_RETRAINING = "exact by deletion", "exact by partial retraining"
APPROXIMATE, FILTER = "approximate", "filter"
EXACT = (EXACT_BY_DELETION, EXACT_BY_RETRAINING)

# "Filter means that ...": a whole sentence with the name before it.
MEANINGS: dict[str, str] = {
    EXACT_BY_DELETION: "the adapter that held it was deleted, and nothing that is left was made from its data",
    EXACT_BY_RETRAINING: "everything that was made from its data was deleted, and trained again without that data",
    APPROXIMATE: "further training made the answers improbable; it is no proof that nothing of them is left",
    FILTER: "an adapter that can be switched off hides the answers; the weights below it still hold them",
}


def claim_of(how: str) -> str | None:
    """The claim that a stage's `how` begins with ("approximate, with audit": approximate); None for other stages."""
    return next((claim for claim in MEANINGS if how.startswith(claim)), None)


def claims(results: Mapping[str, Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """The stages of the unlearn requests by claim, in the order of MEANINGS; without claims that none makes."""
    stages = [stage for stage in results["stages"] if stage["kind"] == "unlearn"]
    found = {claim: [stage for stage in stages if claim_of(stage["how"]) == claim] for claim in MEANINGS}
    return {claim: of_claim for claim, of_claim in found.items() if of_claim}


def explained(claim: str) -> str:
    """Such as "Filter means that an adapter that can be switched off hides ..."."""
    return f"{claim.capitalize()} means that {MEANINGS[claim]}."
