"""Rules: batches, prompts, lengths."""

from __future__ import annotations

from miles.flags.batch import BatchSizes, solve
from miles.flags.draft import Draft
from miles.flags.group_reward import LABELLED
from miles.flags.problems import listed
from miles.flags.prompt_facts import DataFacts

_KNOBS = ("rollout_batch_size", "n_samples_per_prompt", "global_batch_size", "num_steps_per_rollout")


def resolve_batch(draft: Draft) -> None:
    """The four-knob equation, then how a step's samples fall on ranks and micro-batches."""
    sizes = _solved(draft)
    if isinstance(sizes, str):
        typed = [dest for dest in _KNOBS if dest in draft.typed]
        draft.problem(
            typed[-1] if typed else "rollout_batch_size",
            sizes,
            allowed="rollout_batch_size x n_samples_per_prompt = global_batch_size x num_steps_per_rollout",
            advice="Change one of the four, or leave one out: it is computed."
            if typed
            else "Give --rollout-batch-size.",
        )
        return
    for dest in _KNOBS:
        draft[dest] = getattr(sizes, dest)
    if draft.trains:
        _check_step(draft)
    asked = draft["over_sampling_batch_size"]
    if asked is None:
        draft["over_sampling_batch_size"] = draft["rollout_batch_size"]
    elif asked < draft["rollout_batch_size"]:
        draft.problem(
            "over_sampling_batch_size",
            f"less than the {draft['rollout_batch_size']} prompts of a rollout",
            allowed=f"{draft['rollout_batch_size']} or more",
            advice="Raise it, or leave it out.",
        )
    if draft["n_samples_per_prompt"] == 1:
        draft["grpo_std_normalization"] = False


def _solved(draft: Draft) -> BatchSizes | str:
    """With ``--allow-partial-train-step`` the last step may be smaller; with ``--use-dynamic-global-batch-size`` there
    is one, as large as the rollout. Both need dynamic micro-batches, which is told elsewhere."""
    prompts, responses, samples, steps = (draft[dest] if dest in draft.typed else None for dest in _KNOBS)
    if not draft["use_dynamic_global_batch_size"] or prompts is None:
        return solve(prompts, responses, samples, steps, rounds_up=draft["allow_partial_train_step"])
    if steps not in (None, 1):
        return f"{steps} steps of a rollout, which is one with --use-dynamic-global-batch-size"
    sizes = solve(prompts, responses, None, 1)
    if samples is not None and not isinstance(sizes, str) and samples != sizes.global_batch_size:
        draft.notice(
            f"{draft.flag('global_batch_size')} {samples} is not used: with --use-dynamic-global-batch-size a step has "
            "all samples of its rollout"
        )
    return sizes


def _check_step(draft: Draft) -> None:
    samples, ranks = draft["global_batch_size"], draft["dp_size"]
    if samples % ranks:
        draft.problem(
            "global_batch_size",
            f"{samples} samples of a step cannot be divided among {ranks} data-parallel ranks",
            allowed=f"a multiple of {ranks}",
            advice="Change the batch, or the number of ranks.",
        )
    if draft["use_dynamic_batch_size"]:
        if draft["max_tokens_per_gpu"] is None:
            draft.problem("use_dynamic_batch_size", "it needs a token budget", advice="Give --max-tokens-per-gpu.")
    elif samples % ranks == 0 and (samples // ranks) % draft["micro_batch_size"]:
        draft.problem(
            "micro_batch_size",
            f"the {samples // ranks} samples of a step on each rank cannot be divided into micro-batches of "
            f"{draft['micro_batch_size']}",
            allowed=f"a divisor of {samples // ranks}",
            advice="Change it, or use --use-dynamic-batch-size.",
        )
    if draft["log_probs_max_tokens_per_gpu"] is None:
        draft["log_probs_max_tokens_per_gpu"] = draft["max_tokens_per_gpu"]


def resolve_data(draft: Draft) -> None:
    """Prompts, and from their number how many rollouts there are."""
    path = draft["prompt_data"]
    replays = bool(draft["load_debug_rollout_data"])
    uses_prompts = draft["rollout_global_dataset"] and not replays
    draft["num_rollout_derived"] = draft["num_rollout"] is None
    if not path:
        if uses_prompts:
            draft.problem("prompt_data", "it is missing", allowed="a JSONL file", advice="Give --prompt-data FILE.")
        elif draft["num_rollout"] is None:
            draft.problem("num_rollout", "without --prompt-data it cannot be derived", advice="Give --num-rollout N.")
        return
    facts = draft.facts.data.get(path, DataFacts())
    if check_file(draft, "prompt_data", path, facts):
        _check_columns(draft, facts)
        _derive_rollouts(draft, facts.rows)


def check_file(draft: Draft, dest: str, path: str, facts: DataFacts) -> bool:
    """Whether a file of prompts can be used; if not, that is told."""
    if facts.error:
        advice = facts.advice or "Correct the path."
        draft.problem(dest, facts.error, allowed="a JSONL or Parquet file", advice=advice, value=path)
    elif facts.broken:
        number, why = facts.broken
        is_text = facts.unit == "line"
        draft.problem(
            dest,
            f"{facts.unit} {number} is broken: {why}" if number else why,
            allowed="one JSON object per line, in UTF-8" if is_text else "a whole Parquet file",
            advice=f"Repair {facts.unit} {number}." if number else "Write the file again.",
            value=path,
        )
    elif not facts.rows:
        is_sliced = path.endswith("]")
        what = "no row of the file is in the slice" if is_sliced and facts.bytes else "it is empty"
        advice = "Correct the slice." if is_sliced and facts.bytes else "Correct the path."
        draft.problem(dest, what, allowed="at least one row", advice=advice, value=path)
    else:
        return True
    return False


def _check_columns(draft: Draft, facts: DataFacts) -> None:
    for dest in ("input_key", "label_key"):
        column = draft[dest]
        if not column or column not in facts.absent:
            continue
        if dest == "label_key" and dest not in draft.typed and not needs_label(draft):
            draft["eval_label_key"] = draft["eval_label_key"] or column  # evaluations may have it
            draft["label_key"] = None
            continue
        missing_column(draft, dest, column, draft["prompt_data"], facts)


def missing_column(draft: Draft, dest: str, column: str, path: str, facts: DataFacts) -> None:
    """Tell that some line lacks a column."""
    draft.problem(
        dest,
        f"line {facts.absent[column]} of {path} has no column {column!r}",
        allowed=listed(facts.columns),
        advice=f"Give {draft.flag(dest)} one of the columns that there are, or repair the file.",
        value=column,
    )


def needs_label(draft: Draft) -> bool:
    """Whether rewards of training are made of labels."""
    kind = (draft["rm_type"] or "").removeprefix("boxed_")
    return kind in LABELLED and not draft["custom_rm_path"] and draft.generates


def _derive_rollouts(draft: Draft, rows: int) -> None:
    if draft["num_rollout"] is not None:
        if draft["num_epoch"] is not None:
            draft.notice(f"--num-epoch is ignored: --num-rollout {draft['num_rollout']} is given")
        return
    prompts = draft["rollout_batch_size"]
    if not prompts:
        return
    if rows < prompts:
        draft.problem(
            "rollout_batch_size",
            f"{draft['prompt_data']} has {rows} prompts, less than one rollout takes, so that an epoch has no rollout",
            allowed=f"up to {rows}, or any with --num-rollout",
            advice="Lower it, or give --num-rollout.",
        )
        return
    epochs = draft["num_epoch"] or 1
    draft["num_rollout"] = epochs * (rows // prompts)
    draft.notice(
        f"--num-rollout is {draft['num_rollout']}: {epochs} epoch{'s' if epochs > 1 else ''} of {rows} prompts, "
        f"{prompts} per rollout"
    )


def context_limit(draft: Draft) -> int | None:
    """Tokens of the longest context that the model and its engines have."""
    model_context = draft["max_position_embeddings"] if draft["hf_config"] else None
    engine_context = draft.values.get("sglang_context_length")
    bounds: list[int] = [bound for bound in (model_context, engine_context) if bound]
    return min(bounds) if bounds else None


def resolve_lengths(draft: Draft) -> None:
    """Context, prompt and response fit into each other and into the model."""
    limit = context_limit(draft)
    context = draft["rollout_max_context_len"]
    if context is None:
        draft["rollout_max_context_len"] = context = limit
    elif limit and context > limit:
        draft.problem(
            "rollout_max_context_len",
            f"the model's context has {limit} tokens",
            allowed=f"up to {limit}",
            advice="Lower it, or use a model with a longer context.",
        )
    if draft["eval_max_context_len"] is None:
        draft["eval_max_context_len"] = context
    elif limit and draft["eval_max_context_len"] > limit:
        draft.problem(
            "eval_max_context_len",
            f"the model's context has {limit} tokens",
            allowed=f"up to {limit}",
            advice="Lower it, or use a model with a longer context.",
        )
    _check_response(draft, context)
    if context and draft["rollout_max_prompt_len"] is None:
        draft["rollout_max_prompt_len"] = max(1, context - 1)
    elif context and draft["rollout_max_prompt_len"] > context - 1:
        draft.problem(
            "rollout_max_prompt_len",
            f"a context of {context} tokens leaves no token for a response",
            allowed=f"up to {context - 1}",
            advice="Lower it, or leave it out.",
        )


def _check_response(draft: Draft, context: int | None) -> None:
    response = draft["rollout_max_response_len"]
    if response is None:
        if draft.generates and draft["loss_type"] != "sft_loss" and draft["rollout_function_path"] is None:
            draft.problem(
                "rollout_max_response_len",
                "it is missing: an engine would stop after a number of its own",
                allowed="a number of tokens",
                advice="Give --rollout-max-response-len.",
            )
    elif context and response >= context:
        draft.problem(
            "rollout_max_response_len",
            f"a context of {context} tokens leaves no token for a prompt",
            allowed=f"up to {context - 1}",
            advice="Lower it, or raise --rollout-max-context-len.",
        )
