"""The shipped configurations of `accelerate launch` are understood by it, and name our layers."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

import m6rec.train
from m6rec.layers_m6rec import M6RecLayer

FILES = sorted((Path(m6rec.train.__file__).parent / "accelerate").glob("*.yaml"))
KINDS = {"multi_gpu": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_configuration_is_understood(path):
    config = load_config_from_file(str(path))  # refuses what it does not know
    assert config.distributed_type == KINDS[path.stem]
    options = {action.dest for action in launch_command_parser()._actions}
    assert {*config.fsdp_config, *config.deepspeed_config} <= options
    text = path.read_text(encoding="utf-8")
    assert f"accelerate launch --config_file {path.name}" in text
    assert "-m m6rec.train.cli finetune" in text


def test_there_is_one_for_each_way_and_they_say_what_is_shared():
    assert {path.stem for path in FILES} == set(KINDS)
    configs = {path.stem: load_config_from_file(str(path)) for path in FILES}
    assert configs["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert configs["fsdp2"].fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == M6RecLayer.__name__
    assert configs["fsdp2"].fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    assert [configs[f"deepspeed_zero{stage}"].deepspeed_config["zero_stage"] for stage in (2, 3)] == [2, 3]
    assert configs["deepspeed_zero3"].deepspeed_config["zero3_save_16bit_model"] is True
