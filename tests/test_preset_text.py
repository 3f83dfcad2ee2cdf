"""SPEC on the command line (clause P3): every preset, every form of value, and what is said about mistakes."""

import inspect
from pathlib import Path

import pytest

from translution.spec import Clip, LogBuckets, Operator, SpecError, operator_to_json, parse_spec, presets
from translution.spec.preset_text import preset_functions

PRESETS = {
    "translution": "dim=8,num_heads=2",
    "alpha_translution": "dim=8,num_heads=2,rank=3",
    "convolution": "in_channels=2,out_channels=4,kernel_size=3",
    "transposed_convolution": "in_channels=2,out_channels=4,kernel_size=3",
    "average_pooling": "channels=2,kernel_size=2",
    "self_attention": "dim=8,num_heads=2",
    "neighborhood_attention": "dim=8,num_heads=2,kernel_size=3",
    "rope_attention": "dim=8,num_heads=2,head_dim=12",
    "shaw_attention": "dim=8,num_heads=2",
    "swin_attention": "dim=8,num_heads=2",
    "t5_attention": "dim=8,num_heads=2",
    "alibi_attention": "dim=8,num_heads=2",
    "convit_attention": "dim=8,num_heads=2",
}


def test_every_preset_can_be_written() -> None:
    public = [name for name, f in vars(presets).items() if inspect.isfunction(f) and f.__module__ == presets.__name__]
    assert [name for name in public if not name.startswith("_")] == list(preset_functions()) == list(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_the_four_ways_to_write_a_grid(name: str) -> None:
    fields = PRESETS[name]
    assert parse_spec(f"{name}1d:length=5,{fields}") == parse_spec(f"{name}:grid=5,{fields}")
    assert parse_spec(f"{name}2d:height=5,width=6,{fields}") == parse_spec(f"{name}:grid=5x6,{fields}")
    assert parse_spec(f"{name}2d:{fields},width=6,height=5") == parse_spec(f"{name}2d:grid=5x6,{fields}")
    volume = parse_spec(f"{name}3d:depth=5,height=6,width=7,{fields}")
    assert volume == parse_spec(f"{name}:grid=5x6x7,{fields}")


@pytest.mark.parametrize(
    ("text", "operator"),
    [
        (
            "translution2d:height=7,width=7,dim=192,num_heads=3",
            presets.translution((7, 7), 192, 3),
        ),
        (
            "translution2d:height=7,width=7,dim=8,num_heads=2,roles=qv,registers=1,qkv_bias=true,output_bias=false",
            presets.translution((7, 7), 8, 2, roles="qv", registers=1, qkv_bias=True, output_bias=False),
        ),
        (
            "translution1d:length=7,dim=8,num_heads=2,causal=true,far=clip3,head_dim=none",
            presets.translution((7,), 8, 2, causal=True, far=Clip(3)),
        ),
        (
            "translution2d:height=7,width=7,dim=8,num_heads=2,causal=truexfalse,far=log4x20",
            presets.translution((7, 7), 8, 2, causal=(True, False), far=LogBuckets(4, 20)),
        ),
        (
            "convolution2d:height=8,width=9,in_channels=2,out_channels=4,kernel_size=3x2,padding=1x0,padding_mode=circular",
            presets.convolution((8, 9), 2, 4, (3, 2), padding=(1, 0), padding_mode="circular"),
        ),
        (
            "self_attention1d:length=4,dim=8,num_heads=2,key_grid=6,scale=-1.5e-3,key_dim=3",
            presets.self_attention((4,), 8, 2, key_grid=(6,), scale=-1.5e-3, key_dim=3),
        ),
        (
            "alibi_attention1d:length=4,dim=8,num_heads=2,slopes=0.5x.25",
            presets.alibi_attention((4,), 8, 2, slopes=(0.5, 0.25)),
        ),
        (
            "rope_attention1d:length=4,dim=8,num_heads=2,base=500000,pairing=interleaved",
            presets.rope_attention((4,), 8, 2, base=500000.0, pairing="interleaved"),
        ),
    ],
)
def test_values_have_the_types_of_the_signature(text: str, operator: Operator) -> None:
    assert parse_spec(text) == operator


def test_a_file_need_not_end_in_json(tmp_path: Path) -> None:
    path = tmp_path / "operator"
    path.write_text(operator_to_json(presets.translution((3,), 4, 2)))
    assert parse_spec(str(path)) == presets.translution((3,), 4, 2)


GOOD = "translution2d:height=7,width=7,dim=8,num_heads=2"


@pytest.mark.parametrize(
    ("text", "clause", "given", "rule", "remedy"),
    [
        ("", "P3", "unknown preset ''", "known are translution, alpha_translution", "Choose one"),
        ("trnslution2d:height=7", "P3", "unknown preset 'trnslution2d'", "known are", "Did you mean 'translution'"),
        ("translution4d:length=7", "P3", "unknown preset 'translution4d'", "add 1d, 2d or 3d", "mean 'translution'"),
        ("_width:grid=7", "P3", "unknown preset '_width'", "known are", "Choose one"),
        (f"{GOOD},num_head=2", "P3", "unknown field 'num_head'", "known are height, width, dim", "mean 'num_heads'"),
        (f"{GOOD},length=2", "P3", "unknown field 'length'", "known are height, width, dim", "Choose one"),
        (
            "translution2d:height=7,dim=8",
            "P3",
            "without width, num_heads",
            "required fields",
            "Write e.g. translution2d:h",
        ),
        (
            "translution2d",
            "P3",
            "without height, width",
            "required fields are height",
            "Write e.g. translution2d:height=7",
        ),
        (f"{GOOD},dim=9", "P3", "field 'dim' twice", "given once", "Keep one"),
        (f"{GOOD},roles", "P3", "'roles' in a preset", "name=value", "Correct it"),
        (f"{GOOD},", "P3", "'' in a preset", "name=value", "Correct it"),
        (f"{GOOD},roles=", "P3", "'roles=' in a preset", "name=value", "Correct it"),
        (f"{GOOD},roles=vq", "P3", "roles=vq", "qkv or qk or qv", "Correct the value"),
        (f"{GOOD},registers=1.0", "P3", "registers=1.0", "a whole number", "Correct the value"),
        (f"{GOOD},registers={'9' * 40}", "P3", "registers=999", "a whole number", "Correct the value"),
        (f"{GOOD},causal=True", "P3", "causal=True", "true or false", "Correct the value"),
        (f"{GOOD},head_dim=null", "P3", "head_dim=null", "a whole number or none", "Correct the value"),
        (f"{GOOD},far=clip", "P3", "far=clip", "clip8 or log16x128 or none", "Correct the value"),
        (f"{GOOD},far=log9", "P3", "far=log9", "clip8 or log16x128 or none", "Correct the value"),
        (f"{GOOD},kernel_size=3x", "P3", "kernel_size=3x", "whole number for each axis", "Correct the value"),
        ("translution2d:height=7x7,width=7,dim=8,num_heads=2", "P3", "height=7x7", "a whole number", "Correct"),
        ("translution2d:grid=7x7x7,dim=8,num_heads=2", "P3", "grid=7x7x7", "has 2 axes", "Give one extent for each"),
        ("rope_attention1d:length=4,dim=8,num_heads=2,base=nan", "P3", "base=nan", "a number", "Correct the value"),
        ("rope_attention1d:length=4,dim=8,num_heads=2,base=1e999", "E10", "base=inf", "finite", "base=10000.0"),
        ("missing.json", "P3", "no file 'missing.json'", "is a file", "Check the path"),
        ("x" * 5000, "P3", "unknown preset 'xxx", "known are", "Choose one"),
        ("a\0b", "P3", r"unknown preset 'a\x00b'", "known are", "Choose one"),
        (f"{GOOD},far=log8x2", "L7", "max_distance=2", "must exceed", "Give max_distance"),
        (f"{GOOD},kernel_size=-3", "L1", "kernel_size=-3", "at least 1", "Give 1 or more"),
        ("translution2d:height=7,width=7,dim=8,num_heads=3", "O1", "num_heads=3", "divisible", "a divisor of dim"),
    ],
)
def test_mistakes(text: str, clause: str, given: str, rule: str, remedy: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(text)
    assert caught.value.clause == clause
    assert given in caught.value.given
    assert rule in caught.value.rule
    assert remedy in caught.value.remedy


def test_the_example_in_a_message_works() -> None:
    for name in preset_functions():
        with pytest.raises(SpecError) as caught:
            parse_spec(f"{name}2d")
        assert isinstance(parse_spec(caught.value.remedy.removeprefix("Write e.g. ")), Operator)
