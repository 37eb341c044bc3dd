"""The recipe as frozen types: one class per section, in the order in which data flows. Shapes and bounds of
single values only; what must fit together is in `checks.py` and `streams.py`. It knows nothing of files and imports
nothing heavy."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Discriminator, Field, PrivateAttr, Tag, ValidationError, model_validator
from pydantic_core import PydanticCustomError, core_schema

from hf_clmul.evaluation.audit.options import Audit
from hf_clmul.evaluation.options import Count, Evaluation, Images, LmEval, Name
from hf_clmul.families.options import Diffusion
from hf_clmul.gradients.conflict import DEFAULT_RULE
from hf_clmul.gradients.options import Lookahead, Protect, Saliency, Section, Sharpness
from hf_clmul.models import TEXT_ENCODER
from hf_clmul.objectives.active import DEFAULT_TERMS
from hf_clmul.recipe.problems import Key, Problems, explained, nearest, one_of, suggestion
from hf_clmul.recipe.training_fields import ADDED, FIELDS
from hf_clmul.recipe.tree import Tree

Weight = Annotated[float, Field(ge=0)]
Scalar = str | int | float | bool


@dataclass(frozen=True)
class Expected:
    """Annotates a union with one sentence on what fits, instead of one error for each of its members."""

    words: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._check, handler(source))

    def _check(self, value: Any, inner: Any) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise PydanticCustomError("expected", "{words}", {"words": self.words}) from None


Where = dict[str, Annotated[Scalar | list[Scalar], Expected("a value or a list of values")]]
TrainingFields = Annotated[dict[str, Any], Field(description="fields of transformers.TrainingArguments")]
Terms = dict[str, Annotated[dict[str, Any], Expected("the term's parameters, such as {weight: 1.0}")]]

Prompts = Annotated[
    Annotated[str | dict[str, Scalar], Expected("a prompt, or {caption: PROMPT, COLUMN: VALUE}")]
    | Annotated[list[str | dict[str, Scalar]], Field(min_length=1)],
    Expected("a prompt, or a list of prompts, each a text or {caption: PROMPT, COLUMN: VALUE}"),
]
Rule = Annotated[
    str | dict[str, dict[str, Any]],
    Expected("a conflict rule, or {rule: {parameter: value}}, such as {agem: {margin: 0.1}}"),
]


Named = Annotated[
    str | dict[str, dict[str, Any]],
    Expected("a teacher, or {teacher: {parameter: value}}, such as {ema: {probability: 0.2}}"),
]


class Scratch(Section):
    """A small Llama with random weights, and a byte-level BPE trained on the recipe's data."""

    vocab_size: int = Field(ge=260, description="entries of the tokenizer; 256 of them are the bytes")
    layers: Count = Field(description="number of layers")
    hidden: Count = Field(description="width of the model")
    heads: Count = Field(description="number of attention heads")


class Model(Section):
    """What learns and forgets: exactly one of `path` and `scratch`."""

    path: str | None = Field(None, min_length=1, description="Hub id, folder, .gguf file, or package:NAME/FILE")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    attn_implementation: str | None = Field(None, description="eager, sdpa, flash_attention_2, ...")
    scratch: Scratch | None = None


class Adapter(Section):
    """A LoRA adapter for each task."""

    r: Count = 16
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Annotated[
        Literal["all-linear", "attention"] | list[str], Expected("all-linear, attention or a list of module names")
    ] = Field("all-linear", description="`attention`: what LoRA of a diffusion model usually acts on")
    layers: Annotated[
        Literal["all"] | Annotated[str, Field(pattern=r"^last-[0-9]+$")] | list[Annotated[int, Field(ge=0)]],
        Expected("all, last-N (such as last-10) or a list of layer numbers"),
    ] = "all"
    strategy: Literal["stacked", "single", "slao"] = Field(
        "stacked",
        description="one adapter a task on the frozen older ones; one trained on and on; or one merged over time",
    )


class Memory(Section):
    """A fixed number of learned examples that later requests see again; never of isolated tasks, never pushed."""

    size: Annotated[int, Field(ge=0)] = Field(description="examples kept in all; tasks share them evenly")
    top_k: Count | None = Field(None, description="keep the model's likeliest tokens with each example (term `der`)")


class Data(Section):
    """A data set and which of its rows count."""

    path: str = Field(
        min_length=1, description="builtin:invented_people, a local file or folder, a Hub id; or generated"
    )
    name: str | None = Field(None, description="configuration of a Hub data set")
    split: str | None = Field(None, description="split, such as train")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    persons: Count | None = Field(None, description="the first N persons (built-in set only)")
    where: Where | None = Field(None, description="keep rows whose column has one of these values")
    exclude: Where | None = Field(None, description="drop rows whose column has one of these values")
    columns: dict[str, str] | None = Field(None, description="our column name: its name in this data set")
    caption: str | None = Field(None, description="of all pictures; {column} stands for what is in a row's column")
    prompts: Prompts | None = Field(None, description="of `path: generated`, what the model draws; texts or rows")
    images_per_prompt: Count | None = Field(None, description="pictures of each of `prompts`; 8, if left out")
    guidance: Weight | None = Field(None, description="guidance scale of `path: generated`; 3.0, if left out")
    steps: Count | None = Field(None, description="steps of the scheduler, of `path: generated`; 25, if left out")
    seed: Annotated[int, Field(ge=0)] | None = Field(None, description="of the noise, of `path: generated`")


class Learn(Section):
    """Learn a task from data."""

    task: Name = Field(description="a name for what is learned (a-z, 0-9, - and _)")
    data: str = Field(description="a name from the section `data`")
    where: Where | None = Field(None, description="only rows whose column has one of these values")
    isolated: bool = Field(False, description="its adapter meets no other task's data, so that unlearning it is exact")
    shards: Count = Field(1, description="of an isolated task: parts that never meet, so that a deletion retrains one")
    slices: Count = Field(1, description="of each shard: adapters in a row, so that a deletion keeps those before it")
    lifts: list[str] = Field([], description="unlearn requests whose rows may be learned again")
    memory: Terms | None = Field(None, description="in place of `learning.memory`; {} for no replay")
    training: TrainingFields = {}


class Unlearn(Section):
    """Unlearn a task learned before, a part of it, or what the base model knew from the start."""

    name: Name = Field(description="a name for this request (a-z, 0-9, - and _)")
    from_task: str = Field(alias="from", description="the task to unlearn from, learned before; or `base`")
    where: Where | None = Field(None, description="the rows to forget; the whole task if left out")
    ids: Annotated[list[str], Field(min_length=1)] | None = Field(None, description="in place of `where`: ids of rows")
    data: str | None = Field(None, description="in place of `where`: the rows to forget, as a name from `data`")
    retain: str | None = Field(None, description="a name from `data`, in place of what was learned and not forgotten")
    filter: bool = Field(False, description="from `base`: leave an adapter that can be switched off; not an erasure")
    training: TrainingFields = {}


Trainable = Annotated[
    str | None,
    Field(
        description="regular expression; only parameters whose whole name matches are trained (of those that would be)"
    ),
]


class Learning(Section):
    """How learn requests train."""

    learn: Terms = {"nll": {}}
    memory: Terms = {}
    penalties: Terms = {}
    conflict: Rule = Field("sum", description="how the gradients of `learn` and `memory` become one update")
    trainable: Trainable = None
    training: TrainingFields = {}


class Unlearning(Section):
    """How unlearn requests train."""

    forget: Terms = {"npo": {}}
    retain: Terms = {"kl": {}}
    memory: Terms = {}
    penalties: Terms = {}
    gamma: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="weight of what is kept; that of what is forgotten is 1 - gamma"
    )
    conflict: Rule = Field(DEFAULT_RULE, description="how the roles' gradients become one update")
    lookahead: Lookahead | None = Field(None, description="LUR: take one role's gradient where a step on another leads")
    sharpness: Sharpness | None = Field(
        None, description="SAM: take the forget gradient where the forget loss is highest nearby"
    )
    saliency: Saliency | None = Field(
        None, description="train or redraw only the weights that matter for the forget data"
    )
    protect: Protect | None = Field(
        None, description="diffusion: keep what keys and values of cross-attention put out for other prompts"
    )
    trainable: Trainable = None
    training: TrainingFields = {}


class Export(Section):
    """What becomes of the finished model."""

    merge: bool = Field(False, description="merge the adapter into the model")
    tasks: Annotated[list[Name], Field(min_length=1)] | None = Field(
        None, description="whose adapters `model/` has; all that share a stack, if left out"
    )
    push_to_hub: str | None = Field(None, description="repository id on the Hub")
    private: bool = True


def _kind(entry: Any) -> str | None:
    if isinstance(entry, Learn | Unlearn):
        return type(entry).__name__.lower()
    return next(iter(entry)) if isinstance(entry, dict) and len(entry) == 1 else None


@dataclass(frozen=True)
class _Entry:
    """Gives a request its YAML form, `{kind: {...}}`, for reading, writing and in the JSON schema."""

    kind: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        wrapped = core_schema.wrap_serializer_function_ser_schema(lambda value, inner: {self.kind: inner(value)})
        return core_schema.no_info_before_validator_function(
            lambda entry: entry[self.kind] if isinstance(entry, dict) else entry,
            handler(source),
            serialization=wrapped,
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        properties = {self.kind: handler(schema["schema"])}
        return {
            "type": "object",
            "properties": properties,
            "required": [self.kind],
            "additionalProperties": False,
        }


Request = Annotated[
    Annotated[Learn, _Entry("learn"), Tag("learn")] | Annotated[Unlearn, _Entry("unlearn"), Tag("unlearn")],
    Discriminator(_kind),
]


FOR_DIFFUSION: dict[str, Any] = {
    "adapter": {"target_modules": "attention"},
    "evaluation": {"suites": ["concepts"], "score": "prompt_accuracy"},
}
"""Defaults of diffusion models where they differ. Terms are in `DEFAULT_TERMS`."""


def _filled(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    found = dict(given)
    for key, value in defaults.items():
        if key == "adapter" and not isinstance(given.get(key), dict):  # null: all weights train
            continue
        own = given.get(key, {})
        found[key] = {**value, **own} if isinstance(own, dict) else own
    return found


class Recipe(Section):
    """A whole recipe. Equal recipes have equal keys and values, wherever they came from."""

    recipe_version: Literal[1] = Field(description="1, the version of the recipe format")
    name: Name = Field(description="a name for the recipe (a-z, 0-9, - and _)")
    seed: Annotated[int, Field(ge=0)] = 0
    family: str = "causal_lm"
    model: Model = Field(description="a section with `path` or `scratch`")
    diffusion: Diffusion = Diffusion()
    adapter: Adapter | None = Field(None, description="null: train all weights")
    memory: Memory | None = Field(None, description="null: nothing is kept for later requests")
    data: dict[str, Data] = Field(description="named data sets, such as {people: {path: builtin:invented_people}}")
    requests: list[Request] = Field(min_length=1, description="a list of `- learn: {...}` and `- unlearn: {...}`")
    learning: Learning = Learning()
    unlearning: Unlearning = Unlearning()
    teacher: Named = "before_request"
    training: TrainingFields = {}
    evaluation: Evaluation = Evaluation()
    audit: Audit = Audit()
    export: Export = Export()

    _source: str | None = PrivateAttr(None)
    _written: dict[Key, str] = PrivateAttr(default_factory=dict)
    _source_revision: str | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _default_terms(cls, given: Any) -> Any:
        """What a recipe leaves out is what its family has by default; those of language models stand in the sections."""
        family = given.get("family") if isinstance(given, dict) else None
        if not isinstance(family, str) or family not in DEFAULT_TERMS:
            return given
        filled = _filled(given, FOR_DIFFUSION) if family == "diffusion" else dict(given)
        for section, roles in (("learning", ("learn",)), ("unlearning", ("forget", "retain"))):
            own = given.get(section, {})
            if isinstance(own, dict):
                filled[section] = {role: {DEFAULT_TERMS[family][role]: {}} for role in roles} | own
        return filled

    @property
    def source(self) -> str | None:
        """What `load_recipe` was given; not one of the recipe's keys."""
        return self._source

    @property
    def written(self) -> dict[Key, str]:
        """The local paths as the author wrote them, by key."""
        return self._written

    @property
    def source_revision(self) -> str | None:
        """The commit that an hf:// recipe was read from."""
        return self._source_revision

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.__dict__ == other.__dict__

    def request_training(self, i: int) -> dict[str, Any]:
        """TrainingArguments fields of request `i`: `training`, then its kind's, then its own, key by key."""
        request = self.requests[i]
        kind = self.learning if isinstance(request, Learn) else self.unlearning
        return {**self.training, **kind.training, **request.training}

    @property
    def trained_part(self) -> str | None:
        """What trains in the place of a diffusion model's denoiser, where requests ask for that."""
        kinds = {type(request) for request in self.requests}
        sections = [section for kind, section in ((Learn, self.learning), (Unlearn, self.unlearning)) if kind in kinds]
        return TEXT_ENCODER if any(section.trainable == TEXT_ENCODER for section in sections) else None


def validated(tree: Tree, problems: Problems) -> Recipe | None:
    """The typed recipe, or None after adding every problem of its shape."""
    try:
        return Recipe.model_validate(tree.value)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    # A misspelled key would be reported twice: as unknown, and as the missing key that was meant.
    unknown = {e["loc"]: _valid_keys(e["loc"][:-1]) for e in errors if e["type"] == "extra_forbidden"}
    meant = {(loc[:-1], valid) for loc, names in unknown.items() for valid in names if nearest(loc[-1], names) == valid}
    for entry in errors:
        key: Key = entry["loc"]
        if entry["type"] == "extra_forbidden":
            hint = suggestion(key[-1], unknown[key]) or _home_of(str(key[-1]), unknown[key], key[:-1])
            problems.at(tree, key, "unknown key", one_of(unknown[key]), f"'{key[-1]}'", hint)
        elif entry["type"] != "missing":
            problems.at(tree, key, **explained(entry))
        elif (key[:-1], key[-1]) not in meant:
            problems.at(tree, key, "missing", _field_of(key).description or "")
    return None


def _section_at(key: Key) -> type[BaseModel]:
    """The class of the section at a key path."""
    match key:
        case ():
            return Recipe
        case ("data", _):
            return Data
        case ("requests", _, kind):
            return Learn if kind == "learn" else Unlearn
        case ("model", "scratch"):
            return Scratch
        case ("evaluation", "images"):
            return Images
        case ("evaluation", "lm_eval"):
            return LmEval
        case ("unlearning", "lookahead"):
            return Lookahead
        case ("unlearning", "sharpness"):
            return Sharpness
        case ("unlearning", "saliency"):
            return Saliency
        case ("unlearning", "protect"):
            return Protect
        case _:
            return next(_sections_in(Recipe.model_fields[str(key[0])].annotation))


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)


def _fields(section: type[BaseModel]) -> dict[str, Any]:
    return {info.alias or name: info for name, info in section.model_fields.items()}


def _field_of(key: Key) -> Any:
    return _fields(_section_at(key[:-1]))[str(key[-1])]


def _valid_keys(key: Key) -> list[str]:
    return list(_fields(_section_at(key)))


def _home_of(name: str, valid: list[str], key: Key) -> str:
    """Where a known name belongs that was written in the wrong section."""
    if name in FIELDS | ADDED and "training" in valid:
        return f"it belongs under `{'.'.join([*map(str, key), 'training'])}`"
    sections = (part for part in Recipe.model_fields if part not in ("data", "requests"))
    homes = [
        part for part in sections for c in _sections_in(Recipe.model_fields[part].annotation) if name in _fields(c)
    ]
    return f"it belongs under {' or '.join(f'`{home}`' for home in homes)}" if len(homes) in (1, 2) else ""
