"""Rules: how a model is spread over the trainer's ranks; sizes fit the ranks, the model, and each other."""

from __future__ import annotations

from math import prod

from miles.flags.draft import Draft

DENSE = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
EXPERT = ("expert_model_parallel_size", "expert_tensor_parallel_size", "pipeline_model_parallel_size")
_ENDS = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")


def resolve_parallel(draft: Draft) -> None:
    """What does not depend on the number of ranks. Runs that train nothing have no such sizes."""
    if not draft.trains:
        return
    if draft["train_backend"] == "fsdp":
        _refuse_for_fsdp(draft)
        return
    if draft["tensor_model_parallel_size"] == 1:
        draft["sequence_parallel"] = False  # there is nothing to share; recipes give it with any size
    _check_stages(draft)
    _check_experts(draft)
    _check_context(draft)


def data_parallel(draft: Draft, world: int) -> int:
    """Ranks that each have samples of their own, or share them with other ranks of the same copy of the model."""
    _check_divides(draft, DENSE, world)
    _check_divides(draft, EXPERT, world)
    return max(1, world // _product(draft, DENSE))


def _check_divides(draft: Draft, dests: tuple[str, ...], world: int) -> None:
    needed = _product(draft, dests)
    if world % needed == 0:
        return
    large = [dest for dest in dests if draft[dest] > 1]
    others = " and ".join(f"{draft.flag(dest)} {draft[dest]}" for dest in large[1:])
    draft.problem(
        large[0],
        f"{world} ranks cannot be divided into groups of {needed}" + (f", with {others}" if others else ""),
        allowed=f"a divisor of {world}" if not others else f"sizes whose product divides {world}",
        advice="Change it, or --actor-num-gpus-per-node.",
    )


def _product(draft: Draft, dests: tuple[str, ...]) -> int:
    sizes: list[int] = [draft[dest] for dest in dests]
    return prod(sizes)


def _refuse_for_fsdp(draft: Draft) -> None:
    for dest in dict.fromkeys((*DENSE, *EXPERT)):
        if draft[dest] != 1:
            draft.problem(
                dest,
                "the FSDP backend is data parallel only",
                allowed="1",
                advice="Leave it out, or use --train-backend megatron.",
            )
            draft[dest] = 1
    for dest in ("sequence_parallel", *_ENDS):
        if draft[dest]:
            draft.problem(dest, "only the Megatron backend has it", advice="Leave it out: FSDP is data parallel only.")


def _check_stages(draft: Draft) -> None:
    stages, layers = draft["pipeline_model_parallel_size"], draft["num_layers"]
    given = {dest: draft[dest] for dest in _ENDS if draft[dest] is not None}
    if given and stages == 1:
        for dest in given:
            draft.problem(
                dest, "there is one stage", advice="Leave it out, or give --pipeline-model-parallel-size above 1."
            )
        return
    if not layers:
        return
    left, middle = layers - sum(given.values()), stages - len(given)
    if given and (left < 0 or bool(left) != bool(middle) or (middle and left % middle)):
        draft.problem(
            next(iter(given)),
            f"{layers} layers leave {left} for the {middle} other stages",
            allowed="numbers that leave each other stage as many layers",
            advice="Change it, or --pipeline-model-parallel-size.",
        )
    elif not given and layers % stages:
        draft.problem(
            "pipeline_model_parallel_size",
            f"{layers} layers cannot be divided into {stages} stages",
            allowed=f"a divisor of {layers}",
            advice="Change it, or give --decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers.",
        )


def _check_experts(draft: Draft) -> None:
    if draft["hf_config"] is None:
        return
    for dest, whole, what in (
        ("expert_model_parallel_size", "num_experts", "experts"),
        ("expert_tensor_parallel_size", "moe_ffn_hidden_size", "columns of an expert"),
    ):
        size, parts = draft[dest], draft[whole]
        if size > 1 and not draft["num_experts"]:
            draft.problem(dest, "the model has no experts", allowed="1", advice="Leave it out.")
            draft[dest] = 1
        elif parts and parts % size:
            draft.problem(
                dest,
                f"{parts} {what} cannot be divided by {size}",
                allowed=f"a divisor of {parts}",
                advice="Change it.",
            )
    if draft["num_experts"] and draft["tensor_model_parallel_size"] > 1 and not draft["sequence_parallel"]:
        draft.problem(
            "tensor_model_parallel_size",
            "experts with tensor parallelism need sequence parallelism",
            allowed="1, or more with --sequence-parallel",
            advice="Give --sequence-parallel, too.",
        )
    cut, size = draft["expert_tensor_parallel_size"], draft["tensor_model_parallel_size"]
    fits = (draft["moe_ffn_hidden_size"] or cut) % cut == 0
    if draft["num_experts"] and fits and draft["expert_model_parallel_size"] == 1 and cut not in (1, size):
        draft.problem(
            "expert_tensor_parallel_size",
            f"with experts on each rank it is all or nothing of --tensor-model-parallel-size {size}",
            allowed=f"1 or {size}" if size > 1 else "1",
            advice="Choose one of these, or give --expert-model-parallel-size above 1.",
        )


def _check_context(draft: Draft) -> None:
    if draft["context_parallel_size"] > 1 and draft["loss_type"] == "custom_loss":
        draft.problem(
            "context_parallel_size",
            "a loss of your own (--loss-type custom_loss) would see a part of each sequence only",
            allowed="1",
            advice="Leave it out, or use one of the built-in losses.",
        )
    if draft["distribute_saved_activations"] and draft["sequence_parallel"]:
        draft.problem(
            "distribute_saved_activations",
            "with --sequence-parallel they are distributed as they are",
            advice="Leave it out.",
        )
