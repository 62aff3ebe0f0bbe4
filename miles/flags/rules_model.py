"""Rules: the model directory, the model's shape, and checkpoints."""

from __future__ import annotations

import math
from pathlib import PurePosixPath

from miles.backends.checkpoint_layout import TRACKER
from miles.flags.architecture import FAMILIES, UnknownArchitecture, family, named_family, shape
from miles.flags.draft import Draft
from miles.flags.facts import CheckpointFacts, DirectoryFacts
from miles.flags.flag import TAKES_NO_VALUE, Plain
from miles.flags.layer_pattern import layer_pattern
from miles.flags.problems import listed
from miles.flags.rules_lora import check_kind
from miles.flags.table import table

DOWNLOAD = "Give a local directory: hf download NAME --local-dir DIR makes one."


def resolve_model(draft: Draft) -> None:
    """``hf_config``, and every shape flag from it; what was typed must agree."""
    draft["hf_config"] = None
    path = draft["hf_checkpoint"]
    if not path:
        draft.problem("hf_checkpoint", "it is missing", allowed="a model directory", advice=DOWNLOAD)
        return
    found = draft.directory("hf_checkpoint")
    if not found.exists:
        draft.problem("hf_checkpoint", "there is no such directory", allowed="a model directory", advice=DOWNLOAD)
        return
    if found.config is None:
        what = found.config_error or "it has no config.json"
        draft.problem("hf_checkpoint", what, allowed="a Hugging Face model directory", advice=DOWNLOAD)
    if not found.has_tokenizer:
        draft.problem(
            "hf_checkpoint",
            "it has no tokenizer (tokenizer.json, tokenizer.model, or vocab.json with merges.txt)",
            allowed="a model directory with its tokenizer",
            advice="Copy the tokenizer's files into it.",
        )
    if not found.has_weights:
        draft.problem(
            "hf_checkpoint",
            "it has no weights (*.safetensors), which engines load before the first update",
            allowed="a model directory with its weights",
            advice="Copy the weights into it, or save them as safetensors.",
        )
    if found.config is not None:
        draft["hf_config"] = found.config
        _resolve_name(draft)
        _resolve_shape(draft)


def _resolve_name(draft: Draft) -> None:
    """``--model-name``: the family by whose names weights go, where config.json has an architecture of its own."""
    name, config = draft["model_name"], draft["hf_config"]
    if not name:
        return
    kind = named_family(name)
    if kind is None:
        draft.problem(
            "model_name",
            "no family of this name is built",
            allowed=f"{listed(FAMILIES.values())}, or a model's name that begins so",
            advice="Leave it out: the family is read from config.json of --hf-checkpoint.",
        )
        return
    try:
        own = family(config)
    except UnknownArchitecture as unknown:
        architecture = next(known for known, its_kind in FAMILIES.items() if its_kind == kind)
        draft["hf_config"] = {**config, "model_type": kind, "architectures": [architecture]}
        draft.notice(
            f"{draft.flag('model_name')} {name}: {unknown} is taken for one of {kind}, with its names of weights"
        )
        return
    if own != kind:
        draft.problem(
            "model_name",
            f"config.json of --hf-checkpoint is of the family {own}",
            allowed=own,
            advice="Leave it out, or correct --hf-checkpoint.",
        )


def _resolve_shape(draft: Draft) -> None:
    try:
        derived = shape(draft["hf_config"])
    except UnknownArchitecture as unknown:
        draft.problem(
            "hf_checkpoint",
            f"{unknown} is not built yet",
            allowed=", ".join(FAMILIES),
            advice="Use a model of one of these architectures.",
        )
        return
    except (KeyError, TypeError, ValueError) as error:
        what = f"config.json has no {error.args[0]!r}" if isinstance(error, KeyError) else f"config.json: {error}"
        draft.problem("hf_checkpoint", what, allowed="the config.json of a model", advice="Repair config.json.")
        return
    for dest, value in derived.items():
        if dest in draft.typed and not _agree(dest, draft[dest], value, derived):
            given = draft[dest]
            is_switch = table().by_dest[dest].kind in TAKES_NO_VALUE
            draft.problem(
                dest,
                "the model of --hf-checkpoint has none"
                if value is None
                else f"config.json of --hf-checkpoint says otherwise: {value}",
                allowed="leave it out" if is_switch or value is None else str(value),
                advice="Leave it out: the shape is read from config.json. Or correct --hf-checkpoint.",
                value=given,
            )
        draft[dest] = value
    if (length := draft["seq_length"]) and length > derived["max_position_embeddings"]:
        draft.problem(
            "seq_length",
            f"the model's context has {derived['max_position_embeddings']} tokens",
            allowed=f"up to {derived['max_position_embeddings']}",
            advice="Leave it out: sequences have the length of their samples.",
        )
    _check_tensor_parallel(draft)
    if derived["num_experts"]:
        _check_experts(draft)


def _check_experts(draft: Draft) -> None:
    if draft.trains and draft["train_backend"] == "fsdp":
        draft.problem(
            "train_backend",
            "not built yet: models with experts on the FSDP backend",
            allowed="megatron",
            advice="Leave it out.",
        )
    if draft.generates and not draft["untie_embeddings_and_output_weights"]:
        draft.problem(
            "hf_checkpoint",
            "SGLang gives a Qwen3-MoE model an output layer of its own, and config.json says tie_word_embeddings: "
            "it would generate with random weights",
            allowed="a model whose output layer is no copy of the embedding",
            advice="Write the embedding to lm_head.weight, too, and tie_word_embeddings: false to config.json.",
        )


def _agree(dest: str, given: Plain, derived: Plain, shape_of_model: dict[str, Plain]) -> bool:
    if dest == "group_query_attention":  # one group per head is what the flag says of it, too
        return bool(
            bool(given) == derived or shape_of_model["num_query_groups"] == shape_of_model["num_attention_heads"]
        )
    if dest == "moe_layer_freq" and derived is not None:
        try:
            return bool(layer_pattern(given, shape_of_model["num_layers"]) == derived)
        except ValueError:
            return False
    if isinstance(derived, float) or isinstance(given, float):
        return derived is not None and math.isclose(given, derived, rel_tol=1e-9)
    return bool(given == derived)


def _check_tensor_parallel(draft: Draft) -> None:
    for dest, flag in (
        ("tensor_model_parallel_size", "tensor_model_parallel_size"),
        ("rollout_num_gpus_per_engine", "rollout_num_gpus_per_engine"),
    ):
        size = draft[dest]
        if draft["num_attention_heads"] % size:
            draft.problem(
                flag,
                f"{draft['num_attention_heads']} attention heads cannot be divided by {size}",
                allowed=f"a divisor of {draft['num_attention_heads']}",
                advice="Lower it.",
            )
    size, groups = draft["tensor_model_parallel_size"], draft["num_query_groups"]
    if groups % size and draft["num_attention_heads"] % size == 0:
        draft.problem(
            "tensor_model_parallel_size",
            f"{groups} key-value heads cannot be divided by {size}",
            allowed=f"a divisor of {groups}",
            advice="Lower it.",
        )


def resolve_checkpoints(draft: Draft) -> None:
    """Where weights come from, and where they go."""
    if draft["resume"] == "auto":
        _resume(draft)
    resumes = _resolve_load(draft)
    _resolve_reference(draft)
    _check_start(draft, resumes)
    _check_export(draft)
    if draft["save_interval"] is not None and not draft["save"]:
        draft.problem("save_interval", "there is no directory to save to", advice="Give --save DIR.")
    if draft["no_save_optim"] and not draft["save"] and "no_save_optim" in draft.typed:
        draft.problem("no_save_optim", "nothing is saved", advice="Give --save DIR, or leave it out.")
    for dest in ("no_save_optim", "no_save_rng"):
        if draft["use_fault_tolerance"] and draft[dest] and dest in draft.typed and draft.trains:
            draft.problem(
                dest,
                "with --use-fault-tolerance, ranks that die begin again from checkpoints, which must have everything",
                advice=f"Leave {draft.flag(dest)} or --use-fault-tolerance out.",
            )


def _check_start(draft: Draft, resumes: bool) -> None:
    start, last = draft["start_rollout_id"], draft["num_rollout"]
    if start is None:
        return
    if last is not None and start > last:
        draft.problem(
            "start_rollout_id",
            f"the run ends after {last} rollouts: there is none of that number",
            allowed=f"0 to {last}",
            advice="Lower it, or give a higher --num-rollout.",
        )
    if start and not resumes and not draft["load_debug_rollout_data"]:
        where = f"--load {draft['load']} has" if draft["load"] else "without a checkpoint in --load there is"
        draft.notice(f"--start-rollout-id {start}: {where} no state of the data, which begins anew")


def _check_export(draft: Draft) -> None:
    if not draft["save_hf"]:
        return
    if not draft["save"]:
        draft.problem("save_hf", "it exports at each save, and nothing is saved", advice="Give --save DIR.")
    if why := draft.facts.export_error:
        draft.problem(
            "save_hf",
            why,
            allowed="a new directory, such as DIR/{rollout_id}",
            advice="Choose another directory.",
        )


def _resume(draft: Draft) -> None:
    if not draft["save"]:
        draft.problem("resume", "it looks for checkpoints in --save, which is missing", advice="Give --save DIR.")
        return
    found = draft.directory("save")
    if found.newest is not None or found.checkpoint_error:
        draft["load"] = draft["save"]
        if found.newest is not None and found.newest.rollout_id is not None:
            draft.notice(f"resuming from {draft['save']}, iteration {found.newest.rollout_id}")
    else:
        draft.notice(f"{draft['save']} has no checkpoint yet: a new run")


def _resolve_load(draft: Draft) -> bool:
    """Whether ``--load`` holds a checkpoint of a run. Without one it is a fresh start, so that the same command starts
    and resumes."""
    found, load = draft.directory("load"), draft["load"]
    chosen = choose_checkpoint(draft, "load", "ckpt_step")
    if chosen is not None and chosen.rollout_id is not None:
        return True
    if chosen is not None:
        draft.notice(f"--load {load} holds weights alone: a fresh start with them")
    elif load and _is_model(found):
        draft.notice(f"--load {load} is a Hugging Face directory: a fresh start with its weights")
    elif load:
        _without_checkpoint(draft, found)
        draft["load"] = None
    draft["no_load_optim"] = draft["no_load_rng"] = draft["finetune"] = True
    return False


def _is_model(found: DirectoryFacts) -> bool:
    return found.config is not None and found.has_weights


def _without_checkpoint(draft: Draft, found: DirectoryFacts) -> None:
    if found.config_error:
        draft.problem("load", found.config_error, advice="Repair config.json, or leave --load out.")
    elif not found.checkpoint_error and found.newest is None:
        why = f"has no {TRACKER}" if found.exists else "does not exist"
        if draft["exit_on_missing_checkpoint"]:
            draft.problem(
                "load",
                f"it {why}, and --exit-on-missing-checkpoint is given",
                allowed="a directory of checkpoints",
                advice="Correct the path, or leave --exit-on-missing-checkpoint out to begin anew.",
            )
            return
        source = "--ref-load" if draft["ref_load"] else "--hf-checkpoint"
        draft.notice(f"--load {draft['load']} {why}: a fresh start, with the weights of {source}")


def choose_checkpoint(draft: Draft, dest: str, step_dest: str) -> CheckpointFacts | None:
    """The checkpoint that ``--load`` or ``--ref-load`` names, by itself or with its step; None: none, or a problem.

    That of a directory ``iter_0000012`` becomes step 12 of the directory above, where the state of the rollout side is.
    """
    path, step, flag = draft[dest], draft[step_dest], draft.flag(dest)
    found = draft.directory(dest)
    chosen = found.newest
    if found.is_checkpoint and chosen is not None:
        if step not in (None, chosen.rollout_id):
            _no_such_step(draft, step_dest, f"{flag} {path} is a checkpoint itself, and not that one")
        elif chosen.rollout_id is not None:
            draft[dest], draft[step_dest] = str(PurePosixPath(path).parent), chosen.rollout_id
    elif step is not None:
        chosen = CheckpointFacts(found.steps[step], step, step in found.adapters) if step in found.steps else None
        if not path:
            _no_such_step(draft, step_dest, f"it names a checkpoint of {flag}, which is missing")
        elif chosen is None:
            there = ", ".join(map(str, sorted(found.steps))) or "none"
            _no_such_step(draft, step_dest, f"{flag} {path} has no checkpoint of that rollout; there are: {there}")
    elif found.checkpoint_error:
        draft.problem(
            dest,
            found.checkpoint_error,
            allowed="a directory of complete checkpoints",
            advice=f"Repair it, or choose a checkpoint with {draft.flag(step_dest)}.",
            value=path,
        )
    if chosen is not None and draft.trains and chosen.backend != draft["train_backend"]:
        draft.problem(
            dest,
            f"it holds a checkpoint of --train-backend {chosen.backend}, which {draft['train_backend']} cannot read",
            allowed="a checkpoint of the same backend, or a Hugging Face directory",
            advice=f"Use --train-backend {chosen.backend}"
            + (", or make a Hugging Face directory of it: miles convert." if chosen.backend == "megatron" else "."),
            value=path,
        )
    if chosen is not None and draft.trains:
        check_kind(draft, dest, chosen, path)
    return chosen


def _no_such_step(draft: Draft, step_dest: str, what: str) -> None:
    draft.problem(step_dest, what, advice=f"Correct it, or leave {draft.flag(step_dest)} out.")


def _resolve_reference(draft: Draft) -> None:
    found = draft.directory("ref_load")
    chosen = choose_checkpoint(draft, "ref_load", "ref_ckpt_step")
    if draft["ref_load"]:
        if not found.exists:
            draft.problem(
                "ref_load",
                "there is no such directory",
                allowed="a torch_dist checkpoint or a Hugging Face directory",
                advice="Correct the path; miles convert makes a torch_dist checkpoint of a Hugging Face directory.",
            )
        elif chosen is None and not (found.newest or found.steps or found.checkpoint_error or _is_model(found)):
            draft.problem(
                "ref_load",
                f"it has neither {TRACKER} nor config.json with *.safetensors",
                allowed="a torch_dist checkpoint or a Hugging Face directory",
                advice="Correct the path.",
            )
    elif draft["use_kl_loss"] and draft["hf_checkpoint"]:
        draft["ref_load"] = draft["hf_checkpoint"]
        draft.notice("the reference model is --hf-checkpoint: --ref-load is not given")
