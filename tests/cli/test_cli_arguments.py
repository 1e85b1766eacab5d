"""Every option reaches the public function under its own name, and mistakes are explained."""

import argparse
import inspect
import re
import shlex
from importlib import import_module

import pytest

import posttrain
from posttrain.cli import main
from posttrain.cli.arguments import Parser
from posttrain.cli.main import VERBS
from posttrain.errors import UserError

# (command line, function, arguments that must arrive)
PLUMBING = [
    (
        "quantize m -o o",
        "quantize",
        {
            "model": "m",
            "out": "o",
            "recipe": "w6a8",
            "chat": None,
            "resume": True,
            "overwrite": False,
            "progress": True,
        },
    ),
    (
        """quantize m -o o --recipe r.yaml --solver gptq --calibration t.jsonl --samples 7
        --window 64 --chat --memory-budget 1.5 --seed 3 --no-resume --overwrite --quiet""",
        "quantize",
        {
            "recipe": "r.yaml",
            "solver": "gptq",
            "calibration": "t.jsonl",
            "samples": 7,
            "window": 64,
            "chat": True,
            "memory_budget": 1.5,
            "seed": 3,
            "resume": False,
            "overwrite": True,
            "progress": False,
        },
    ),
    (
        "quantize m -o o --bits 5.5 --scan exact --candidates 'mxfp4, w6g64'",
        "quantize",
        {"bits": 5.5, "max_bytes": None, "scan": "exact", "candidates": "mxfp4, w6g64"},
    ),
    ("quantize m -o o --max-bytes 9.5MB", "quantize", {"bits": None, "max_bytes": 9_500_000}),
    (
        "evaluate m",
        "evaluate",
        {
            "model": "m",
            "text": None,
            "window": 512,
            "stride": None,
            "max_tokens": None,
            "records": None,
        },
    ),
    (
        """evaluate m --text t.txt --window 32 --stride 16 --max-tokens 99 --dtype bfloat16
        --kv "int4 | fp16/g32" --records r.jsonl""",
        "evaluate",
        {
            "text": "t.txt",
            "window": 32,
            "stride": 16,
            "max_tokens": 99,
            "dtype": "bfloat16",
            "kv": "int4 | fp16/g32",
            "records": "r.jsonl",
        },
    ),
    (
        "compare a b c --kl topk --top-k 5 --sensitivity --no-generations --chat --seed 4 --kv fp8",
        "compare",
        {
            "models": ["a", "b", "c"],
            "chat": True,
            "seed": 4,
            "kv": "fp8",
            "kl": "topk",
            "top_k": 5,
            "sensitivity": True,
            "generations": False,
            "out": None,
        },
    ),
    ("compare a b --out r.html", "compare", {"models": ["a", "b"], "out": "r.html"}),
    (
        "chat m --prompt hello --system s --temperature 0.5 --top-p 0.9 --max-new-tokens 4 --seed 2 --kv int8",
        "chat",
        {
            "prompt": "hello",
            "system": "s",
            "temperature": 0.5,
            "top_p": 0.9,
            "max_new_tokens": 4,
            "seed": 2,
            "kv": "int8",
        },
    ),
    ("run demo -o o --overwrite", "run", {"recipe": "demo", "out": "o", "overwrite": True}),
]


@pytest.mark.parametrize(("line", "verb", "wanted"), PLUMBING)
def test_options_arrive(line, verb, wanted, fakes):
    assert main(shlex.split(line)) == 0
    [(name, given)] = fakes.calls
    assert name == verb
    assert {key: given[key] for key in wanted} == wanted


@pytest.mark.parametrize("name", ["quantize", "evaluate", "compare", "chat", "run"])
def test_every_argument_of_the_function_is_an_option_and_the_other_way_round(name):
    verb = import_module(f"posttrain.cli.{name}")
    parser = Parser(name, verb)
    verb.arguments(parser)
    options = {a.dest for a in parser._actions} - {"help", "json"}
    function = set(inspect.signature(getattr(posttrain, name)).parameters)
    assert options == function - {"stream", "tokenizer"}  # objects that no command line can name


@pytest.mark.parametrize("name", ["quantize", "evaluate", "compare", "chat", "run"])
def test_defaults_are_those_of_the_function(name):
    verb = import_module(f"posttrain.cli.{name}")
    parser = Parser(name, verb)
    verb.arguments(parser)
    parameters = inspect.signature(getattr(posttrain, name)).parameters
    for action in parser._actions:
        parameter = parameters.get(action.dest)
        if parameter is None or parameter.default is parameter.empty:
            continue
        if (name, action.dest) == ("chat", "prompt"):
            continue  # without one the command line starts a conversation
        assert action.default == parameter.default, action.dest


# (command line, what the message must contain)
MISTAKES = [
    ("quantise m -o o", "did you mean 'quantize'"),
    ("quantize m -o o --recpie w8", "did you mean '--recipe'"),
    ("quantize m --outt o", "'--outt'"),  # before "--out is required"
    ("quantize m", "-o/--out"),
    ("quantize m n -o o", "'n'"),
    ("quantize m -o o --samples 0", "'0' is not a whole number of at least 1"),
    ("quantize m -o o --seed -1", "'-1' is not a whole number of at least 0"),
    ("quantize m -o o --memory-budget lots", "'lots' is not a number"),
    ("quantize m -o o --memory-budget nan", "'nan' is not a number"),
    ("evaluate m --dtype bfloat61", "did you mean 'bfloat16'"),
    ("evaluate m --window 12.5", "'12.5' is not a whole number"),
    ("compare a b --kl fulll", "did you mean 'full'"),
    ("chat m --prompt p --top-p 0", "'0' is not a number above 0 and at most 1"),
    ("chat m --prompt p --top-p 1.5", "'1.5' is not a number above 0 and at most 1"),
    ("chat m --json", "--json needs --prompt"),
    ("evaluate m --max 5", "'--max'"),  # no abbreviations: they break when options are added
    ("recipes show w6a9", "did you mean 'w6a8'"),
    ("recipes show", "needs the name"),
    ("recipes shwo w6a8", "did you mean 'show'"),
    ("recipes list w6a8", "recipes show w6a8"),
]


@pytest.mark.parametrize(("line", "says"), MISTAKES)
def test_mistakes_are_explained_in_one_line(line, says, fakes, capsys):
    assert main(shlex.split(line)) == 2
    captured = capsys.readouterr()
    message = captured.err
    assert "?;" not in message
    assert message.startswith("posttrain: error: ") and message.count("\n") == 1
    assert says in message
    assert not fakes.calls


@pytest.mark.parametrize("name", VERBS)
def test_help_has_examples_that_parse(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    examples = [
        command.partition(">")[0].strip()
        for line in re.findall(r"^  (posttrain .*)$", text, re.MULTILINE)
        for command in line.split(";")
    ]
    assert examples, f"{name} --help shows no example"
    for example in examples:
        words = shlex.split(example)[1:]
        verb = import_module(f"posttrain.cli.{words[0]}")
        parser = Parser(words[0], verb)
        verb.arguments(parser)
        parser.read(words[1:])  # raises UserError where the example is wrong


def test_overview_lists_every_verb(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    for name in VERBS:
        assert re.search(rf"^  {name} +\w", out, re.MULTILINE), name


def test_compare_says_where_its_report_is(fakes, capsys):
    fakes.replace("compare", lambda **_: {"models": [], "pairs": [], "report": "r.html"})
    assert main(["compare", "m", "n", "-o", "r.html"]) == 0
    assert "report: r.html" in capsys.readouterr().out


def test_short_option_with_its_value_attached(fakes):
    assert main(["quantize", "m", "-oout"]) == 0
    assert fakes.calls[0][1]["out"] == "out"


def test_values_that_look_like_options_can_be_given(fakes):
    assert main(["chat", "m", "--prompt=--verbose means what?"]) == 0
    assert fakes.calls[0][1]["prompt"] == "--verbose means what?"


def test_parser_error_is_a_user_error():
    parser = Parser("quantize", import_module("posttrain.cli.quantize"))
    assert isinstance(parser, argparse.ArgumentParser)
    with pytest.raises(UserError, match="posttrain quantize --help"):
        parser.error("wrong")
