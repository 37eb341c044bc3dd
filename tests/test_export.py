"""What is exported comes back through the public loaders as it was, or nothing is exported."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_run import save_base
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_clmul.errors import RunError
from hf_clmul.families.loaded import Loaded
from hf_clmul.models import adapters
from hf_clmul.run import export as exporting
from hf_clmul.run.export import Wanted, export, load_state, save_state
from hf_clmul.run.folder import RunFolder

PROBE = [[5, 6, 7, 8], [9, 10]]
PEOPLE = {"people": (adapters.TASK + "people",)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base")


def adapted(base: Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> tuple[Loaded, PeftModel]:
    """A base with an adapter `people` whose weights are no longer those it was made with."""
    options = {"revision": None, "trust_remote_code": False, "attn_implementation": attention}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **options)
    config = adapters.lora_config(model, 4, 16, 0.1, "all-linear", "last-1")
    model = adapters.attach(model, config, adapters.TASK + "people", 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return Loaded(model, AutoTokenizer.from_pretrained(base), str(base), options), model


def wanted(merge: bool = False) -> Wanted:
    """The one adapter there is."""
    return Wanted(PEOPLE["people"], PEOPLE, merge)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.eval()(input_ids=torch.tensor([ids])).logits[0] for ids in PROBE])


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_adapter_is_exported_to_the_bit(base, tmp_path, attention):
    loaded, model = adapted(base, attention=attention)
    found = export(loaded, model, RunFolder(tmp_path), wanted(), "# card", PROBE)
    assert found == {"kind": "adapter", "max_difference": 0.0, "tolerance": 0.0}
    again = AutoModelForCausalLM.from_pretrained(base, attn_implementation=attention)
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path / "model")), logits(model))
    assert not torch.equal(
        logits(model), logits(AutoModelForCausalLM.from_pretrained(base, attn_implementation=attention))
    )
    assert names(tmp_path) == {
        "model/README.md", "model/adapter_config.json", "model/adapter_model.safetensors", "model/chat_template.jinja",
        "model/tokenizer.json", "model/tokenizer_config.json", "adapters/people/adapter_config.json",
        "adapters/people/adapter_model.safetensors"}  # fmt: skip
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "adapters/people" / name).read_bytes()
    assert (tmp_path / "model/README.md").read_text() == "# card"


def test_the_config_of_an_adapter_is_sorted_and_names_its_base(base, tmp_path):
    loaded, model = adapted(base)
    export(loaded, model, RunFolder(tmp_path), wanted(), "", PROBE)
    text = (tmp_path / "model/adapter_config.json").read_text()
    config = json.loads(text)
    assert list(config) == sorted(config)
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["base_model_name_or_path"], config["lora_alpha"], config["inference_mode"]) == (str(base), 16, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_stays_within_the_tolerance_and_leaves_the_live_model_alone(base, tmp_path, dtype):
    loaded, model = adapted(base, dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = export(loaded, model, RunFolder(tmp_path), wanted(merge=True), "", PROBE)
    assert (found["kind"], found["tolerance"]) == ("merged", exporting.TOLERANCE[dtype])
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    difference = float((logits(whole).float() - logits(model).float()).abs().max())
    assert difference == found["max_difference"] <= found["tolerance"]
    assert difference < 0.1 * float(
        (logits(model) - logits(AutoModelForCausalLM.from_pretrained(base, dtype=dtype))).abs().max()
    )
    assert "model/adapter_config.json" not in names(tmp_path) and "adapters/people/adapter_config.json" in names(
        tmp_path
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_whole_model_is_exported_to_the_bit(base, tmp_path):
    model = tiny_llama(vocab=AutoTokenizer.from_pretrained(base).vocab_size, seed=5)
    loaded = Loaded(model, AutoTokenizer.from_pretrained(base), None)
    found = export(loaded, model.train(), RunFolder(tmp_path), Wanted(), "", PROBE)
    assert found == {"kind": "full", "max_difference": 0.0, "tolerance": 0.0}
    assert model.training
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits(model))
    assert names(tmp_path) == {f"model/{name}" for name in (
        "README.md", "config.json", "generation_config.json", "model.safetensors", "chat_template.jinja", "tokenizer.json",
        "tokenizer_config.json")}  # fmt: skip


@pytest.mark.parametrize("changed", [False, True])
def test_outputs_of_equal_weights_may_differ_by_a_rounding_and_of_others_may_not(base, tmp_path, monkeypatch, changed):
    """Weights that were read back lie elsewhere in memory, and matrix products then add in another order."""
    model = tiny_llama(vocab=AutoTokenizer.from_pretrained(base).vocab_size, seed=5)
    loaded, outputs, load_back = (
        Loaded(model, AutoTokenizer.from_pretrained(base), None),
        Loaded.outputs,
        Loaded.load_back,
    )

    def elsewhere(self: Loaded, one: torch.nn.Module, probe: list[list[int]]) -> torch.Tensor:
        return outputs(self, model, probe) + (0.0 if one is model else 1e-7)

    def read(self: Loaded, *arguments: object) -> torch.nn.Module:
        back = load_back(self, *arguments)
        with torch.no_grad():
            back.model.norm.weight[0] += 1e-6 if changed else 0.0
        return back

    monkeypatch.setattr(Loaded, "outputs", elsewhere)
    monkeypatch.setattr(Loaded, "load_back", read)
    if changed:
        with pytest.raises(RunError, match="differs from the trained one by .*allowed: 0"):
            export(loaded, model, RunFolder(tmp_path), Wanted(), "", PROBE)
    else:
        found = export(loaded, model, RunFolder(tmp_path), Wanted(), "", PROBE)
        assert 0 < found["max_difference"] < 1e-6 and found["tolerance"] == exporting.TOLERANCE[torch.float32]


def without_alpha(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(config))


def with_other_names(folder: Path) -> None:
    """PEFT loads none of it, and only warns."""
    state = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name.replace("lora_A", "lora_a"): value for name, value in state.items()}, folder / "adapter_model.safetensors"
    )


def with_one_bit_changed(folder: Path) -> None:
    state = load_file(folder / "adapter_model.safetensors")
    first = next(name for name in state if "lora_B" in name)
    state[first].view(torch.int32)[0, 0] ^= 1 << 20
    save_file(state, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("tamper", [without_alpha, with_other_names, with_one_bit_changed])
@pytest.mark.parametrize("merge", [False, True])
def test_what_comes_back_differently_is_not_exported(base, tmp_path, monkeypatch, tamper, merge):
    loaded, model = adapted(base)
    folder = RunFolder(tmp_path)
    export(loaded, model, folder, wanted(merge), "old", PROBE)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    save = adapters.save

    def tampered(model: PeftModel, name: str, place: Path, base: str | None = None) -> None:
        save(model, name, place, base)
        tamper(place)

    monkeypatch.setattr(adapters, "save", tampered)
    with pytest.raises(RunError, match=r"the exported model differs from the trained one by .* was not replaced"):
        export(loaded, model, folder, wanted(merge), "new", PROBE)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_logits_that_are_no_numbers_are_a_difference(base, tmp_path):
    model = tiny_llama(vocab=AutoTokenizer.from_pretrained(base).vocab_size)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(RunError, match="differs from the trained one by nan"):
        export(
            Loaded(model, AutoTokenizer.from_pretrained(base), None), model, RunFolder(tmp_path), Wanted(), "", PROBE
        )
    assert names(tmp_path) == set()


@pytest.mark.parametrize("whole", [False, True])
def test_a_state_comes_back_to_the_bit_with_what_was_noted(base, tmp_path, whole):
    loaded, model = adapted(base)
    fresh = adapted(base)[1]
    if whole:
        model, fresh = tiny_llama(seed=3), tiny_llama(seed=4)
    for parameter in fresh.parameters():
        if parameter.requires_grad:
            torch.nn.init.zeros_(parameter)
    flags = [p.requires_grad for p in fresh.parameters()]
    save_state(model, tmp_path / "state", {"steps": 3}, lambda folder: (folder / "more.txt").write_text("kept beside"))
    load_state(fresh, tmp_path / "state")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))
    assert [p.requires_grad for p in fresh.parameters()] == flags
    assert json.loads((tmp_path / "state/training.json").read_text()) == {"steps": 3}
    assert (tmp_path / "state/more.txt").read_text() == "kept beside"


# ---- of several adapters -------------------------------------------------------------------------------------


NAMES = ["task_people", "task_cities", "task_secretS0R0", "task_secretS0R1"]


def several(base: Path) -> tuple[Loaded, PeftModel]:
    """Two adapters of a stack and the two of a divided, isolated task, all of which do something."""
    options = {"revision": None, "trust_remote_code": False, "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    for i, name in enumerate(NAMES):
        config = adapters.lora_config(model, 2 + i, 8, 0.1, "all-linear", "all")
        model = adapters.attach(model, config, name, i)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    adapters.activate(model, NAMES[:2], NAMES[1])
    return Loaded(model, AutoTokenizer.from_pretrained(base), str(base), options), model


def alone(model: PeftModel, *names: str) -> torch.Tensor:
    with adapters.serving(model, names):
        return logits(model)


EACH = {"people": tuple(NAMES[:1]), "cities": tuple(NAMES[1:2]), "secret": tuple(NAMES[2:])}


def test_a_stack_is_exported_as_one_adapter_and_each_task_by_itself(base, tmp_path):
    loaded, model = several(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = export(loaded, model, RunFolder(tmp_path), Wanted(tuple(NAMES[:2]), EACH), "# card", PROBE)
    assert (found["kind"], found["tolerance"]) == ("combined", exporting.TOLERANCE[torch.float32])
    assert 0 <= found["max_difference"] <= 1e-4
    for folder, names, tolerance in (
        ("model", NAMES[:2], 1e-4), ("adapters/people", NAMES[:1], 0), ("adapters/cities", NAMES[1:2], 0),
        ("adapters/secret", NAMES[2:], 1e-4),
    ):  # fmt: skip
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / folder)
        assert list(plain.peft_config) == ["default"]
        expected = alone(model, *names)
        torch.testing.assert_close(logits(plain), expected, atol=tolerance, rtol=0)
        assert not torch.allclose(expected, alone(model), atol=1e-2), "it does something"
    ranks = {name: json.loads((tmp_path / name / "adapter_config.json").read_text())["r"]
             for name in ("model", "adapters/people", "adapters/cities", "adapters/secret")}  # fmt: skip
    assert ranks == {"model": 2 + 3, "adapters/people": 2, "adapters/cities": 3, "adapters/secret": 4 + 5}
    # The live model has no adapter more, none less, and trains what it trained.
    assert list(model.peft_config) == NAMES and adapters.active(model) == NAMES[:2]
    assert adapters.trained(model) == NAMES[1] and adapters.trains_alone(model, NAMES[1])
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_the_order_of_adapters_in_a_combination_is_no_chance(base, tmp_path):
    """Two processes write the same bytes."""
    for name in ("one", "two"):
        loaded, model = several(base)
        export(loaded, model, RunFolder(tmp_path / name), Wanted(tuple(NAMES[:2]), EACH), "", PROBE)
    assert names(tmp_path / "one") == names(tmp_path / "two")
    assert all(
        (tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in names(tmp_path / "one")
    )


def test_a_stack_is_merged_whole_and_leaves_its_parts_by_themselves(base, tmp_path):
    loaded, model = several(base)
    found = export(loaded, model, RunFolder(tmp_path), Wanted(tuple(NAMES[:2]), EACH, merge=True), "", PROBE)
    assert found["kind"] == "merged"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(plain), alone(model, *NAMES[:2]), atol=found["tolerance"], rtol=0)
    assert {name for name in names(tmp_path) if name.startswith("adapters/")} == {
        f"adapters/{task}/adapter_{file}" for task in EACH for file in ("config.json", "model.safetensors")
    }
    assert not [name for name in names(tmp_path / "model") if "adapter" in name]


def test_one_task_of_several_is_chosen(base, tmp_path):
    loaded, model = several(base)
    found = export(loaded, model, RunFolder(tmp_path), Wanted(EACH["secret"], EACH), "", PROBE)
    assert found["kind"] == "combined"
    found = export(loaded, model, RunFolder(tmp_path), Wanted(EACH["cities"], EACH), "", PROBE)
    assert found == {"kind": "adapter", "max_difference": 0.0, "tolerance": 0.0}
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "model")
    assert torch.equal(logits(plain), alone(model, *EACH["cities"]))
    for name in (adapters.WEIGHTS, adapters.CONFIG):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "adapters/cities" / name).read_bytes()


def test_an_adapter_that_is_gone_is_gone_from_the_folder(base, tmp_path):
    loaded, model = several(base)
    export(loaded, model, RunFolder(tmp_path), Wanted(tuple(NAMES[:2]), EACH), "", PROBE)
    model = adapters.drop(model, list(EACH["secret"]))
    left = {task: EACH[task] for task in ("people", "cities")}
    export(loaded, model, RunFolder(tmp_path), Wanted(tuple(NAMES[:2]), left), "", PROBE)
    assert {path.name for path in (tmp_path / "adapters").iterdir()} == {"people", "cities"}


def test_a_combination_that_comes_back_differently_is_not_exported(base, tmp_path, monkeypatch):
    loaded, model = several(base)
    together = adapters.together

    def without_the_first(model: PeftModel, parts: list[str], name: str) -> None:
        together(model, list(parts)[1:], name)

    monkeypatch.setattr(adapters, "together", without_the_first)
    with pytest.raises(RunError, match="the exported model differs from the trained one by .* was not replaced"):
        export(loaded, model, RunFolder(tmp_path), Wanted(tuple(NAMES[:2]), EACH), "", PROBE)
    assert names(tmp_path) == set() and list(model.peft_config) == NAMES


@pytest.mark.parametrize(
    ("parts", "merge", "kind"),
    [((), False, "full"), (("a",), False, "adapter"), (("a", "b"), False, "combined"), (("a", "b"), True, "merged")],
)
def test_the_kind_of_an_export(parts, merge, kind):
    assert Wanted(parts, {}, merge).kind == kind
