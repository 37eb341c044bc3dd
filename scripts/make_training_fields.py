"""Writes the table FIELDS in hf_clmul/recipe/training_fields.py from the installed transformers.TrainingArguments.

Run it after raising transformers in constraints.txt: `python scripts/make_training_fields.py`. A test fails
while the table and the installed class differ.
"""

import dataclasses
import re
import textwrap
import types
import typing
from enum import Enum
from pathlib import Path

import transformers

TARGET = Path(__file__).resolve().parents[1] / "hf_clmul" / "recipe" / "training_fields.py"
BEGIN, END = "# generated: begin\n", "# generated: end\n"
PLAIN = {
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
    types.NoneType: "None",
    dict: "dict",
    typing.Any: "Any",
}
# Where the class takes more than its annotation says.
WIDER = {"fsdp": "bool | str | None"}  # its help text: pass True; the annotation keeps an old command line working


def type_text(field: dataclasses.Field) -> str:
    """The type of a field as text: int, float, bool, str, dict, list[str], None, Literal[...], Any, joined by
    |."""
    if field.name in WIDER:
        return WIDER[field.name]
    members = _members(field.type)
    choices = [str(choice) for choice in field.metadata.get("choices", ())]
    enums = [choice.value for m in members if isinstance(m, type) and issubclass(m, Enum) for choice in m]
    if choices or enums:  # the class turns `str` into the enum, and refuses other text
        literal = f"Literal[{', '.join(map(repr, choices or enums))}]"
        return literal + (" | None" if types.NoneType in members else "")
    texts = list(dict.fromkeys(_member_text(member) for member in members))
    return "Any" if "Any" in texts else " | ".join(sorted(texts, key=lambda text: text == "None"))


def _members(annotation: object) -> tuple[object, ...]:
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if is_union else (annotation,)


def _member_text(member: object) -> str:
    origin = typing.get_origin(member)
    if origin is list:
        return "list[str]"  # of text, or of an enum whose values are text
    if origin is dict:
        return "dict"
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, typing.get_args(member)))}]"
    return PLAIN.get(member, "Any")


def table() -> dict[str, str]:
    """Name -> type text of every field that a caller may give."""
    fields = dataclasses.fields(transformers.TrainingArguments)
    return {field.name: type_text(field) for field in fields if field.init}


def _entry(name: str, text: str) -> str:
    line = f'    "{name}": "{text}",\n'
    if len(line) <= 110:
        return line
    parts = textwrap.wrap(text, 95, drop_whitespace=False, break_on_hyphens=False)
    return f'    "{name}": (\n' + "".join(f'        "{part}"\n' for part in parts) + "    ),\n"


def generated() -> str:
    entries = "".join(_entry(name, text) for name, text in table().items())
    return f'TRANSFORMERS_VERSION = "{transformers.__version__}"\nFIELDS: dict[str, str] = {{\n{entries}}}\n'


if __name__ == "__main__":
    block = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    TARGET.write_text(block.sub(lambda _: BEGIN + generated() + END, TARGET.read_text(), count=1))
    print(f"{TARGET}: {len(table())} fields of transformers {transformers.__version__}")
