"""The recipe's section `evaluation`: what is measured, of what, and how pictures are made and judged. It imports nothing heavy."""

from typing import Annotated, Literal

from pydantic import Field

from hf_clmul.gradients.options import Section

Name = Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
Count = Annotated[int, Field(ge=1)]


class Images(Section):
    """How pictures are made and judged, of diffusion models."""

    classifier: str | None = Field(
        None,
        description="builtin:coloured_digits, or a Hub id or folder of an image classifier; null: nothing is judged",
    )
    clip: str | None = Field(
        None, min_length=1, description="Hub id or folder of a CLIP that scores how well pictures go with their prompts"
    )
    axis: str | None = Field(
        None, description="the column of what is to be forgotten, such as digit: UA, IRA and CRA are by it"
    )
    near: list[str] | None = Field(
        None,
        description="values of that column which are near neighbours of what is to be forgotten; null: the two whose text "
        "is most like it to the model",
    )
    paraphrases: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(
        {}, description="{value of that column: other prompts for it}: UA under these, which nothing is trained on"
    )
    per_prompt: Count = Field(
        8, description="pictures of each prompt; picture i of all prompts begins with the same noise"
    )
    steps: Count = Field(25, description="steps of the pipeline's scheduler")
    guidance: Annotated[float, Field(ge=0)] = Field(3.0, description="guidance scale")
    batch_size: Count = Field(64, description="pictures that are made at once")
    shown: Annotated[int, Field(ge=0)] = Field(4, description="pictures of each prompt that are kept to be looked at")


class LmEval(Section):
    """The suite lm_eval: what lm-evaluation-harness is asked for."""

    tasks: list[str] = Field([], description="names of tasks or of groups of them, such as [mmlu, wmdp]")
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(None, description="shots; each task's own, if left out")
    limit: Count | None = Field(None, description="only the first examples of each task, for a quick look")
    batch_size: Count = 8
    apply_chat_template: bool = False


class Evaluation(Section):
    """What is measured before and after each request."""

    suites: list[str] = ["basic"]
    images: Images = Images()
    max_examples: Count = Field(16, description="fixed examples of each task, of held_out and of `groups`")
    max_forgotten: Count | None = Field(None, description="fixed examples of what is forgotten; all, if left out")
    held_out: str | None = Field(None, description="a name from the section `data`: never trained on")
    forget: str | None = Field(
        None, description="for a reference model, which never learns it: the data that others forget"
    )
    groups: dict[Name, str] = Field(
        {}, description="further groups, {group: a name from `data`}, never trained on: real_authors, world_facts, ..."
    )
    gradient_norms: bool = Field(
        False, description="measure what the attack grad_norm of suite mia reads: a backward pass for each example more"
    )
    lm_eval: LmEval = LmEval()
    max_new_tokens: Count = 64
    max_length: Count | None = Field(
        None, description="tokens of an example that are scored; null: as many as the request with the most trains on"
    )
    bf16: bool | None = Field(None, description="score under bf16 autocast; null: where every request trains so")
    batch_size: Count = 16
    reference: str | None = Field(
        None,
        description="JSON file with the figures of the retrained model, or its run folder; null or auto: the one in the cache",
    )
    score: Literal[
        "rouge_l_recall", "answer_probability", "exact_memorization", "extraction_strength", "prompt_accuracy"
    ] = Field("rouge_l_recall", description="the metric of the matrix of stages and tasks")
    samples: Annotated[int, Field(ge=0)] = Field(3, description="answers, or prompts, shown in the report, per group")
