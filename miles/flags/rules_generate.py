"""Rules: flags that our own generate functions add, where one of these functions is used."""

from __future__ import annotations

import difflib

from miles.flags.draft import Draft
from miles.flags.problems import listed

MULTI_TURN = "miles.rollout.generate_hub.multi_turn.generate"
AGENT = "miles.rollout.generate_hub.agentic_tool_call.generate"
_AGENT = "custom_agent_function_path"
_SPECS, _EXECUTE = "generate_tool_specs_path", "generate_execute_tool_function_path"
_PARSER = "generate_tool_call_parser"
GENERATE_HOOKS = (_SPECS, _EXECUTE, _AGENT)


def resolve_generate(draft: Draft) -> None:
    """What these functions need, and what belongs together in them."""
    used = draft["custom_generate_function_path"]
    if used not in (MULTI_TURN, AGENT) or not draft.generates:
        return
    for dest in GENERATE_HOOKS:
        if why := draft.facts.hook_errors.get(draft.values.get(dest) or ""):
            draft.problem(
                dest,
                why,
                allowed="module.name",
                advice="Correct it, or add the directory of the module to PYTHONPATH.",
            )
    if draft.values.get(_SPECS):
        missing = " and no ".join(draft.flag(dest) for dest in (_PARSER, _EXECUTE) if not draft.values.get(dest))
        if missing:
            draft.problem(_SPECS, f"there are tools, and no {missing}", advice="Give it, too.")
    if used == AGENT and not draft.values.get(_AGENT):
        draft.problem(
            _AGENT,
            "it is missing",
            allowed="module.function",
            advice="Give the agent: async run(base_url, prompt, ...).",
        )
    _check_parser(draft)
    for dest, bound in (("generate_max_turns", 1), ("generate_tool_timeout", 0.001), ("max_seq_len", 2)):
        if (draft.values.get(dest) or bound) < bound or draft.values.get(dest) == 0:
            draft.problem(dest, "is too small", allowed=f"{bound} or more", advice="Raise it, or leave it out.")


def _check_parser(draft: Draft) -> None:
    parser, known = draft.values.get(_PARSER), draft.facts.engines.tool_call_parsers
    if not parser or not known or parser in known:
        return
    near = difflib.get_close_matches(parser, known, 1)
    draft.problem(
        _PARSER,
        "the installed SGLang has no such parser",
        allowed=listed(known),
        advice=f"Did you mean {near[0]}?" if near else "Give one of these.",
    )
