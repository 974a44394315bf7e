"""What the package takes from its libraries by name, each with what to do when a release renames it; and its range.

A name that a new release changes fails here, at the sentence that says which code uses it.
"""

import importlib
import inspect
import re
from configparser import ConfigParser
from functools import reduce
from inspect import Parameter

import pytest
import torch
from transformers.generation import GenerationMixin
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from m6rec.network_m6rec import CACHE_NAMES, LIBRARY_NAME
from tests.conftest import REPOSITORY
from tests.modeling_m6rec.test_generation import prompts
from tests.modeling_m6rec.tiny import SMALL, build
from tests.test_repository import MODULES

OURS = {"continuation", "return_scores", "return_vectors"}
"""What our `generate` adds to the calls of `forward`."""
FORWARD = {
    "input_ids",
    "attention_mask",
    "layout_ids",
    "use_cache",
    "logits_to_keep",
    "return_dict",
    *CACHE_NAMES,
    *OURS,
}
"""What `generate` hands to `forward`: it must mean there what `generate` means by it."""
PREPARE = {
    "continuation",
    "attention_mask",
    "use_cache",
    "logits_to_keep",
    "next_sequence_length",
    "is_first_iteration",
}
"""What `generate` hands to `prepare_inputs_for_generation`, beside the cache."""
OLDER = {"position_ids", "cache_position"}
"""What releases before 5.24 hand over as well; the layout decides in their place."""
WAYS = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 2},
    "sampling": {"do_sample": True},
    "lookup": {"prompt_lookup_num_tokens": 2},
}
NAMES = {
    "transformers.modeling_utils:PreTrainedModel": {
        "_init_weights": "network_m6rec sets new memories to zero there",
        "_no_split_modules": "network_m6rec names the layers that stay on one device",
        "_skip_keys_device_placement": "network_m6rec names the caches that accelerate must not move",
        "_supports_sdpa": "network_m6rec allows fused attention",
        "_supports_flex_attn": "network_m6rec forbids flex attention",
        "_supports_attention_backend": "network_m6rec takes attention functions by name",
        "_can_record_outputs": "network_m6rec says which modules give hidden states and attentions",
        "_tied_weights_keys": "modeling_m6rec ties the writing head",
        "_keys_to_ignore_on_load_unexpected": "modeling_m6rec ignores a score head that options replaced",
        "load_adapter": "modeling_m6rec loads adapters by it",
        "resize_token_embeddings": "network_m6rec resizes word memory with it",
    },
    "transformers.generation:GenerationMixin": {
        "prepare_inputs_for_generation": "modeling_m6rec adds layout_ids there",
        "generate": "modeling_m6rec suppresses structure there",
    },
    "transformers.generation.utils": {
        "create_masks_for_generate": "modeling_m6rec has a method of this name, which hands the 2-D mask on",
    },
    "transformers.cache_utils:Cache": {
        "update": "layers_m6rec fills the cache",
        "get_seq_length": "network_m6rec counts what was read",
        "get_mask_sizes": "network_m6rec makes masks as wide as the cache",
        "is_compileable": "network_m6rec refuses prefixes in static caches",
    },
    "transformers:Trainer": {
        "_prepare_for_training": "train/runs/trainer.py resumes there",
        "_run_epoch": "train/runs/trainer.py draws each epoch there",
        "_get_dataloader": "train/runs/trainer.py keeps the order of rows there",
        "_get_train_sampler": "train/runs/trainer.py groups rows there",
        "_get_num_items_in_batch": "train/runs/trainer.py weighs an optimizer step there",
        "_get_output_dir": "train/runs/trainer.py writes checkpoints there",
        "_save_checkpoint": "train/runs/trainer.py writes checkpoints whole there",
    },
    "transformers.pipelines.base:Pipeline": {
        "_sanitize_parameters": "pipeline_m6rec sorts its parameters there",
        "_forward": "pipeline_m6rec reads requests there",
    },
    "transformers.utils.output_capturing": {"capture_outputs": "network_m6rec records layers by it"},
    "transformers.dynamic_module_utils": {"custom_object_save": "modeling_m6rec saves its code by it"},
    "transformers.utils": {
        "can_return_tuple": "modeling_m6rec returns tuples by it",
        "find_adapter_config_file": "modeling_m6rec finds adapters by it",
    },
    "transformers.modeling_rope_utils": {
        "ROPE_INIT_FUNCTIONS": "layers_m6rec scales positions by it",
        "dynamic_rope_update": "layers_m6rec scales positions by it",
    },
    "transformers.trainer_pt_utils": {"get_length_grouped_indices": "train/runs/trainer.py groups rows by it"},
    "transformers.trainer_utils": {"rotate_checkpoints": "train/runs/checkpoints.py removes old checkpoints by it"},
    "peft.utils.constants": {"DUMMY_TARGET_MODULES": "tuning/adapter.py injects nothing by it"},
    "peft.utils": {"register_peft_method": "tuning makes its method known by it"},
    "peft.tuners.tuners_utils:BaseTuner": {
        "_prepare_model": "tuning/adapter.py reads scores by options there",
        "_create_and_replace": "tuning/adapter.py puts its layers in there",
        "_check_merge_allowed": "tuning/adapter.py refuses to merge there",
    },
    "peft:PeftType": {
        "_member_map_": "tuning/peft_types.py adds a type there",
        "_member_names_": "tuning/peft_types.py adds a type there",
        "_value2member_map_": "tuning/peft_types.py adds a type there",
    },
}
"""Where -> name -> the code that relies on it."""


def test_the_cache_has_a_known_name():
    told = "rename it in CACHE_NAMES of network_m6rec, in both outputs and in both forwards"
    known = {field for field in BaseModelOutputWithPast.__dataclass_fields__ if "cache" in field or "past" in field}
    assert known == {LIBRARY_NAME}, f"ModelOutput calls the cache {known}: {told}"
    assert ALL_CACHE_NAMES[0] == LIBRARY_NAME, f"generate calls the cache {ALL_CACHE_NAMES[0]}: {told}"
    prepared = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    assert LIBRARY_NAME in prepared, f"prepare_inputs_for_generation takes {list(prepared)}: {told}"


@pytest.mark.parametrize("way", WAYS)
def test_generate_hands_over_what_is_known(way, monkeypatch):
    model, seen = build(SMALL[0], initializer_range=0.25), {"forward": set(), "prepare": set()}
    forward, prepare = type(model).forward, type(model).prepare_inputs_for_generation

    def watched_forward(self, *args, **kwargs):
        assert len(args) == 0, "generate gives forward arguments by place: name them in FORWARD by their place"
        seen["forward"] |= {name for name, value in kwargs.items() if value is not None}
        return forward(self, *args, **kwargs)

    def watched_prepare(self, input_ids, *args, **kwargs):
        assert len(args) == 0, "generate gives prepare_inputs_for_generation arguments by place: see PREPARE"
        seen["prepare"] |= {name for name, value in kwargs.items() if value is not None}
        return prepare(self, input_ids, *args, **kwargs)

    watched_forward.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(type(model), "forward", watched_forward)
    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", watched_prepare)
    model.generate(**{key: value[:1] for key, value in prompts().items()}, max_new_tokens=4, **WAYS[way])
    told = "say in M6RecForRecommendation.{} what it means, then add it to this test"
    new = seen["forward"] - FORWARD - OLDER
    assert not new, f"generate hands {sorted(new)} to forward: {told.format('forward')}"
    new = seen["prepare"] - PREPARE - OLDER - {LIBRARY_NAME}
    assert not new, f"generate hands {sorted(new)} on: {told.format('prepare_inputs_for_generation')}"
    assert {"input_ids", "attention_mask", "layout_ids"} <= seen["forward"]
    assert way == "no cache" or {*CACHE_NAMES} <= seen["forward"]


@pytest.mark.parametrize("place", NAMES)
def test_names_of_the_libraries_are_there(place):
    module, _, owner = place.partition(":")
    found = reduce(getattr, [owner] if owner else [], importlib.import_module(module))
    for name, use in NAMES[place].items():
        assert hasattr(found, name), f"{place} has no {name} any more, but {use}: find its new name, keep the old one"


def test_layers_are_checkpointed_with_their_arguments():
    """The library leaves caches out of checkpointed layers by their names; our name for it must not be one."""
    source = inspect.getsource(GradientCheckpointingLayer)
    assert "key_cache" not in source, "the library drops the argument key_cache of layers: rename it in layers_m6rec"


def parameters_of(function):
    function = getattr(function, "__func__", function)
    return list(inspect.signature(function).parameters.values())


def overrides():
    """Every method of ours that stands in for one of a library's class: (where, ours, the library's)."""
    for name in MODULES:
        module = importlib.import_module(name)
        for own in vars(module).values():
            if not inspect.isclass(own) or own.__module__ != name:
                continue
            for method, function in vars(own).items():
                bases = [base for base in own.__mro__[1:] if method in vars(base)]
                base = next((base for base in bases if not base.__module__.startswith("m6rec")), None)
                public = not method.startswith("_") or method == "__call__"
                known = base is not None and base.__module__.split(".")[0] in ("transformers", "peft", "datasets")
                if public and known and inspect.isfunction(getattr(function, "__func__", function)):
                    yield f"{own.__name__}.{method}", function, vars(base)[method]


OWN_FORM = {"M6RecProcessor.__call__"}
"""Takes requests, not text, images and sounds."""


def test_no_method_takes_less_than_the_librarys():
    checked = 0
    for where, function, library in overrides():
        if where in OWN_FORM:
            continue
        own, theirs = parameters_of(function), parameters_of(library)
        kinds = {each.kind for each in own}
        several, named = Parameter.VAR_POSITIONAL in kinds, Parameter.VAR_KEYWORD in kinds
        places = [each.name for each in own if each.kind == Parameter.POSITIONAL_OR_KEYWORD]
        places = ["self", *places] if isinstance(function, staticmethod) else places
        for place, each in enumerate(theirs[1:], 1):
            if each.kind == Parameter.POSITIONAL_OR_KEYWORD and place < len(places):
                assert places[place] == each.name, f"{where} calls {each.name} {places[place]}: take the library's name"
            elif each.kind == Parameter.POSITIONAL_OR_KEYWORD:
                assert several, f"{where} does not take {each.name} by its place: add *args and hand them on"
            if each.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY):
                assert named or each.name in places, f"{where} does not take {each.name}=: add **kwargs, hand them on"
        checked += 1
    assert checked >= 10


def test_a_model_is_made_of_a_state_dict_and_by_keywords(tmp_path):
    model = build(SMALL[0])
    model.save_pretrained(tmp_path, True, None)  # is_main_process, state_dict by place, as the library's
    given = {"config": model.config, "state_dict": model.state_dict()}
    for made in (
        type(model).from_pretrained(None, **given),
        type(model).from_pretrained(pretrained_model_name_or_path=None, **given),
        type(model).from_pretrained(pretrained_model_name_or_path=str(tmp_path)),
        type(model).from_pretrained(tmp_path, config=model.config),
    ):
        assert all(torch.equal(value, made.state_dict()[key]) for key, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------------- the range


def requirements(text):
    """Read the packages of a section, each with what it says of versions."""
    found = re.findall(r"^\s*([\w.-]+)(?:\[\w+\])?([<>=!~][^\s#]*)?\s*$", text, re.M)
    return {name.lower().replace("_", "-"): rule for name, rule in found}


def pins(file):
    return {name: rule.removeprefix("==") for name, rule in requirements((REPOSITORY / file).read_text()).items()}


def numbers(version):
    return [int(part) for part in re.findall(r"\d+", version)]


def test_the_range_is_what_is_run():
    setup = ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    parts = setup["options"]["install_requires"], setup["options.extras_require"]["test"]
    required = {name: rule for part in parts for name, rule in requirements(part).items()}
    oldest, newest = pins("constraints-oldest.txt"), pins("constraints.txt")
    for name, rule in required.items():
        floor = re.match(r">=([\w.]+)", rule).group(1)
        assert oldest[name] == floor, f"{name}: setup.cfg allows {floor}, `make test-oldest` runs {oldest[name]}"
        assert numbers(newest[name]) >= numbers(floor), f"{name}: constraints.txt is below setup.cfg's {floor}"
    minor = numbers(newest["transformers"])[1]
    assert required["transformers"].endswith(f",<5.{minor + 1}"), "a next minor release is allowed once it was run"
