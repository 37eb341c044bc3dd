"""What is shown of a complete run: receipts, the report, the card of the model, and the model on the Hub if the recipe wants it
there. It knows files of a run folder; nothing of models."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_clmul.ledger import chain as ledger
from hf_clmul.ledger.receipt import receipt
from hf_clmul.paths import atomic_write
from hf_clmul.plan.steps import Step, plan_steps
from hf_clmul.recipe.load import load_recipe
from hf_clmul.report.page import write_report
from hf_clmul.run.card import write_card
from hf_clmul.run.folder import RunFolder
from hf_clmul.run.hub import push

if TYPE_CHECKING:
    from hf_clmul.recipe.schema import Recipe

PUBLISHED = ("exported", "audited", "referenced")
"""Events after which what is on the Hub is no longer what is here: the model or its card."""


def close(recipe: "Recipe", folder: RunFolder, steps: Sequence[Step]) -> None:
    """The receipts and the report where they are not those of the run as it is now, then the upload."""
    show(folder, steps)
    repo_id, done = recipe.export.push_to_hub, [event["event"] for event in ledger.verify(folder.ledger)]
    last = max((i for i, event in enumerate(done) if event in PUBLISHED), default=0)
    if repo_id is not None and "pushed" not in done[last:]:
        url = push(folder, recipe)
        ledger.append(folder.ledger, "pushed", url=url)


def show(folder: RunFolder, steps: Sequence[Step]) -> None:
    """A report that was deleted says that something changed since."""
    if not folder.report.is_file():
        for step in steps:
            if step.kind == "unlearn":
                atomic_write(folder.receipts / f"{step.what}.md", receipt(folder.root, step.name))
        write_card(folder)
        write_report(folder.root)


def show_anew(folder: RunFolder) -> None:
    """`show` of a finished run that something was measured of since. Raises RunError for a folder that is in use."""
    with folder.locked():
        folder.outdate_report()
        show(folder, plan_steps(load_recipe(folder.recipe)))
