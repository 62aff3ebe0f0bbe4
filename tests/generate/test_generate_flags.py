"""Flags of the multi-turn function: they exist where it is used, reach it, and are checked before the run."""

import subprocess
import sys
from dataclasses import replace

import pytest
from support.flag_cases import FACTS, config, problems

from miles.flags.engine_facts import EngineFacts
from miles.flags.entry import resolve_argv
from miles.flags.flag import Flag
from miles.flags.parse import parse
from miles.flags.resolve import resolve
from miles.flags.table import table
from miles.rollout.base_types import GenerateFnInput
from miles.rollout.generate_hub import multi_turn
from miles.utils.arguments import namespace
from miles.utils.types import Sample

FUNCTION = "miles.rollout.generate_hub.multi_turn.generate"
RECIPE = (
    "--hf-checkpoint M --prompt-data D --rollout-batch-size 8 --n-samples-per-prompt 4 --rollout-max-response-len 64 "
    f"--rm-type math --actor-num-gpus-per-node 2 --custom-generate-function-path {FUNCTION}"
)
TOOLS = (
    "--generate-tool-specs-path support.tool_cases.TOOLS --generate-tool-call-parser qwen25 "
    "--generate-execute-tool-function-path support.tool_cases.execute"
)
PARSER = Flag(("--sglang-tool-call-parser",), "sglang_tool_call_parser", "str", choices=("qwen25", "llama3"))
KNOWS = replace(FACTS, engines=EngineFacts(arguments={"tool_call_parser": PARSER}))


def resolved(flags, facts=KNOWS):
    parsed = parse(f"{RECIPE} {flags}".split(), table(), [multi_turn.generate.add_arguments])
    return resolve(parsed, table(), facts)


def told(flags, facts=KNOWS):
    return {problem.flag: " ".join(problem.lines()) for problem in resolved(flags, facts).problems}


def test_values_reach_the_function():
    flags = f"{TOOLS} --generate-max-turns 3 --generate-tool-timeout 2.5"
    args = namespace(resolved(flags).config)
    tools = multi_turn._tools_of(GenerateFnInput(type("State", (), {"args": args}), Sample(), {}))
    assert (tools.max_turns, tools.timeout_s, tools.parser.name) == (3, 2.5, "qwen25")
    assert tools.names == ["add", "search"] and tools.execute.path == "support.tool_cases.execute"


def test_the_context_is_that_of_the_model_so_that_turns_end():
    assert resolved(TOOLS).config["rollout_max_context_len"] == 40960


@pytest.mark.parametrize(
    ("flags", "flag", "why"),
    [
        ("--generate-max-turns 0", "--generate-max-turns", "is too small"),
        (f"{TOOLS} --generate-tool-timeout 0", "--generate-tool-timeout", "is too small"),
        (
            "--generate-tool-specs-path a.b",
            "--generate-tool-specs-path",
            "no --generate-tool-call-parser and no --generate-e",
        ),
        (f"{TOOLS} --generate-tool-call-parser qwen52", "--generate-tool-call-parser", "Did you mean qwen25?"),
        (f"{TOOLS} --generate-tool-call-parser x", "--generate-tool-call-parser", "qwen25 or llama3"),
    ],
)
def test_what_cannot_work_is_told(flags, flag, why):
    assert why in told(flags)[flag]


def test_a_function_that_is_not_found_is_told():
    facts = replace(KNOWS, hook_errors={"support.tool_cases.execute": "there is no module 'support'"})
    assert "there is no module" in told(TOOLS, facts)["--generate-execute-tool-function-path"]


def test_where_sglang_cannot_be_asked_the_parser_is_not_checked():
    assert told(f"{TOOLS} --generate-tool-call-parser x", FACTS) == {}


def test_other_functions_have_no_such_flags():
    assert "multi_turn.generate" in problems("--generate-max-turns 3")["--generate-max-turns"]
    assert "generate_max_turns" not in config()


def test_a_command_line_finds_them_by_itself(tmp_path):
    found = resolve_argv(["--custom-generate-function-path", FUNCTION, "--generate-max-turns", "7"])
    assert found.config["generate_max_turns"] == 7 and found.config["generate_tool_timeout"] == 60.0


def test_the_module_needs_neither_torch_nor_sglang():
    code = f"import sys, {FUNCTION.rpartition('.')[0]}; print({{'torch', 'sglang', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
