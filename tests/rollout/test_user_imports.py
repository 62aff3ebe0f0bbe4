"""What user code imports from ``miles.rollout`` and ``miles.utils``: it is there, and takes what is written here.

A signature is as user code may call it: further parameters may follow if they have defaults.
"""

import dataclasses
import importlib
import inspect

import pytest
from support.rollout_cases import make_args

from miles.flags.table import table
from miles.rollout.base_types import (
    GenerateFnInput,
    GenerateFnOutput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
    call_rollout_fn,
)
from miles.rollout.inference_rollout.compatibility import call_rollout_function
from miles.utils.misc import NOT_BUILT, CannotLoad, load_function
from miles.utils.types import MultimodalTypes, Sample

R, U = "miles.rollout.", "miles.utils."
FUNCTIONS = {
    U + "misc.load_function": "path, *, sync_required=False",
    U + "misc.get_free_port": "start_port=10000, consecutive=1",
    U + "misc.should_run_periodic_action": "rollout_id, interval, num_rollout_per_epoch=None, num_rollout=None",
    U + "http_utils.post": "url, payload, max_retries=60, headers=None",
    U + "http_utils.get": "url",
    U + "http_utils.find_available_port": "base_port",
    U + "http_utils.init_http_client": "args",
    U + "async_utils.run": "coro",
    U + "processing_utils.load_tokenizer": "name_or_path, chat_template_path=None, **kwargs",
    U + "processing_utils.load_processor": "name_or_path, **kwargs",
    U + "processing_utils.extract_multimodal_train_inputs": "inputs",
    U + "arguments.parse_args": "add_custom_arguments=None",
    U + "metric_utils.compute_statistics": "values",
    U + "metric_utils.compute_pass_rate": "flat_rewards, group_size, num_groups=None",
    U + "metric_utils.compute_rollout_step": "args, rollout_id",
    U + "metric_utils.dict_add_prefix": "values, prefix",
    U + "metric_utils.has_repetition": "text",
    U + "dp_schedule.build_dp_schedule": "args, cfg, total_lengths, *, global_batch_size, rollout_indices",
    U + "seqlen_balancing.get_seqlen_balanced_partitions": "seqlen_list, k_partitions, equal_size",
    U + "data.Dataset": "path, tokenizer, processor, max_length, *, prompt_key='text', multimodal_keys=None, "
    "label_key=None, tool_key=None, metadata_key='metadata', seed=42, apply_chat_template=False, "
    "apply_chat_template_kwargs=None",
    U + "mask_utils.MultiTurnLossMaskGenerator": "tokenizer, tokenizer_type='qwen'",
    U + "mask_utils.MultiTurnLossMaskGenerator.get_loss_mask": "self, messages, tools=None",
    R + "base_types.RolloutFnConstructorInput": "args, data_source",
    R + "base_types.RolloutFnTrainInput": "rollout_id, weight_version=None",
    R + "base_types.RolloutFnEvalInput": "rollout_id, generate_state=None, weight_version=None, hf_dir=None",
    R + "base_types.RolloutFnTrainOutput": "samples, metrics=None",
    R + "base_types.RolloutFnEvalOutput": "data, metrics=None",
    R + "base_types.GenerateFnInput": "state, sample, sampling_params, evaluation",
    R + "base_types.GenerateFnOutput": "samples",
    R + "base_types.call_rollout_fn": "fn, *args, evaluation, **kwargs",
    R + "data_source.DataSource.get_samples": "self, num_samples",
    R + "data_source.DataSource.add_samples": "self, samples",
    R + "data_source.DataSource.save": "self, rollout_id",
    R + "data_source.DataSource.load": "self, rollout_id=None",
    R + "data_source.DataSource.get_buffer_length": "self",
    R + "data_source.RolloutDataSource": "args",
    R + "data_source.RolloutDataSourceWithBuffer": "args",
    R + "data_source.RolloutDataSourceWithBuffer.update_metadata": "self, metadata",
    R + "data_source.RolloutDataSourceWithBuffer.get_metadata": "self",
    R + "data_source.pop_first": "args, rollout_id, buffer, num_samples",
    R + "filter_hub.base_types.DynamicFilterOutput": "keep, reason=None",
    R + "filter_hub.base_types.call_dynamic_filter": "fn, *args, **kwargs",
    R + "filter_hub.dynamic_sampling_filters.check_reward_nonzero_std": "args, samples, **kwargs",
    R + "filter_hub.dynamic_sampling_filters.check_no_aborted": "args, samples, **kwargs",
    R + "on_policy_distillation.reward_func": "args, sample, **kwargs",
    R + "on_policy_distillation.post_process_rewards": "args, samples",
    R + "sglang_rollout.GenerateState": "args",
    R + "sglang_rollout.generate": "args, sample, sampling_params",
    R + "sglang_rollout.generate_and_rm": "args, sample, sampling_params, evaluation=False",
    R + "sglang_rollout.generate_and_rm_group": "args, group, sampling_params, evaluation=False",
    R + "sglang_rollout.generate_rollout": "args, rollout_id, data_source, evaluation=False",
    R + "sglang_rollout.eval_rollout": "args, rollout_id",
    R + "sglang_rollout.get_model_url": "args, model_name, endpoint='/generate'",
    R + "sft_rollout.generate_rollout": "args, rollout_id, data_source, evaluation=False",
    R + "sleep_rollout.sleep": "args, rollout_id, data_source, evaluation=False",
    R + "inference_rollout.inference_rollout_common.InferenceRolloutFn": "input",
    R + "inference_rollout.inference_rollout_common.GenerateState": "args",
    R
    + "inference_rollout.inference_rollout_common.generate_and_rm": "state, sample, sampling_params, evaluation=False",
    R + "inference_rollout.inference_rollout_common.generate_and_rm_group": "state, group, sampling_params, "
    "evaluation=False",
    R + "inference_rollout.inference_rollout_common.compute_sampling_params": "args, *, temperature, top_p, top_k, "
    "max_new_tokens",
    R + "inference_rollout.compatibility.load_rollout_function": "input, path",
    R + "inference_rollout.compatibility.load_generate_function": "path",
    R + "inference_rollout.compatibility.call_rollout_function": "fn, input",
    R + "inference_rollout.compatibility.LegacyRolloutFnAdapter": "input, fn",
    R + "inference_rollout.compatibility.LegacyGenerateFnAdapter": "fn",
    R + "generate_hub.single_turn.generate": "input",
    R + "fully_async_rollout.FullyAsyncRolloutFn": "input",
    R + "generate_utils.sample_utils.merge_samples": "samples, tokenizer",
    R + "rm_hub.async_rm": "args, sample, **kwargs",
    R + "rm_hub.batched_async_rm": "args, samples, inplace_set_reward_field=False, **kwargs",
    R + "rm_hub.remote_rm": "args, sample",
    U + "types.Sample.to_dict": "self",
    U + "types.Sample.from_dict": "data",
    U + "types.Sample.get_reward_value": "self, args",
    U + "types.Sample.validate": "self",
    U + "types.Sample.strip_last_output_tokens": "self, n, tokenizer",
    U + "types.Sample.reset_for_retry": "self",
    U + "types.Sample.update_from_meta_info": "self, args, meta_info",
    U + "types.ParamInfo": "name, dtype, shape, attrs, size, src_rank",
    U + "types.MultimodalType": "name, placeholder",
}
OTHERS = (
    U + "types.RolloutBatch", U + "types.MultimodalTypes", U + "misc.function_registry", U + "misc.SingletonMeta",
    U + "eval_config.EvalDatasetConfig", R + "rm_hub.math_utils",
)  # fmt: skip
FIELDS = {
    "group_index": None, "index": None, "rollout_id": None, "prompt": "", "tokens": [], "multimodal_inputs": None,
    "multimodal_train_inputs": None, "response": "", "response_length": 0, "label": None, "reward": None,
    "loss_mask": None, "weight_versions": [], "rollout_log_probs": None, "rollout_routed_experts": None,
    "rollout_indexer_topk": None, "remove_sample": False, "teacher_log_probs": None, "opd_reverse_kl": None,
    "status": Sample.Status.PENDING, "metadata": {}, "generate_function_path": None, "train_metadata": None,
    "adapter": None, "reward_spec": None, "routing_key": None, "non_generation_time": 0.0,
    "spec_info": Sample.SpecInfo(), "prefix_cache_info": Sample.PrefixCacheInfo(),
}  # fmt: skip
LATER = (
    R + "checkpoint_eval.CheckpointEvalFn", R + "checkpoint_eval.EvalSkip",
    R + "session.v2.picker_hub.drop_retries", "miles.router.router.MilesRouter", "miles_plugins.models.qwen3.spec",
    "miles.backends.training_utils.loss_hub.opd.top_k",  # a teacher's sampled tokens are in on_policy_distillation
)  # fmt: skip


def found(path):
    """The object of a path, which may name a method."""
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            value = getattr(value, name)
        return value
    raise ModuleNotFoundError(path)


def parameters(text):
    """Of a signature as text: name, kind, default."""
    scope = {}
    exec(f"def f({text}): pass", scope)
    return list(inspect.signature(scope["f"]).parameters.values())


def shape(parameter):
    return parameter.name, parameter.kind, parameter.default


@pytest.mark.parametrize("path", FUNCTIONS)
def test_user_code_can_call_what_it_knows(path):
    there = list(inspect.signature(found(path)).parameters.values())
    wanted = parameters(FUNCTIONS[path])
    names = {p.name: p for p in there}
    positional = [p for p in wanted if p.kind is p.POSITIONAL_OR_KEYWORD]
    # Positional ones stand in this order; a default may have been added, never taken away or changed.
    for place, want in enumerate(positional):
        have = there[place]
        assert have.name == want.name
        assert have.default == want.default or want.default is inspect.Parameter.empty
    for want in wanted[len(positional) :]:
        if want.kind in (want.VAR_KEYWORD, want.VAR_POSITIONAL):
            assert want.kind in {p.kind for p in there}
        else:
            assert shape(names[want.name])[2] == want.default
    known = {p.name for p in wanted}
    more = [p for p in there if p.name not in known and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    assert [p.name for p in more if p.default is inspect.Parameter.empty] == []


@pytest.mark.parametrize("path", OTHERS)
def test_other_names_are_there(path):
    assert found(path) is not None


def test_a_sample_has_these_fields_with_these_defaults():
    there = Sample()
    assert {f.name: getattr(there, f.name) for f in dataclasses.fields(Sample)} == FIELDS
    assert [status.value for status in Sample.Status] == ["pending", "completed", "truncated", "aborted", "failed"]
    assert MultimodalTypes.get("image") in MultimodalTypes.all()


@pytest.mark.parametrize("path", LATER)
def test_what_comes_later_says_so(path):
    with pytest.raises(CannotLoad, match="not built yet"):
        load_function(path)


def test_nothing_that_is_here_is_called_not_built():
    for module in NOT_BUILT:
        if module in ("miles.rollout.rm_hub", "miles.rollout.session"):
            continue  # packages that stand for what they lack
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(module)


async def test_bare_results_are_wrapped():
    train, evaluation = RolloutFnTrainInput(0), RolloutFnEvalInput(0)
    assert (train.evaluation, evaluation.evaluation) == (False, True)

    async def later(asked):
        return [[Sample()]]

    assert await call_rollout_function(later, train) == RolloutFnTrainOutput([[Sample()]])
    assert await call_rollout_function(lambda asked: {"a": {}}, evaluation) == RolloutFnEvalOutput({"a": {}})
    full = RolloutFnTrainOutput([], {"m": 1})
    assert await call_rollout_function(lambda asked: full, train) is full
    assert call_rollout_fn(lambda *args, evaluation: [args], 1, 2, evaluation=False) == RolloutFnTrainOutput([(1, 2)])
    assert call_rollout_fn(lambda evaluation: {}, evaluation=True) == RolloutFnEvalOutput({})


def test_a_generate_function_sees_the_arguments():
    class State:
        args = make_args()

    assert GenerateFnInput(State, Sample(), {}, False).args is State.args
    assert GenerateFnOutput(samples=[Sample()]).samples == [Sample()]


def test_every_flag_of_a_rollout_hook_is_honoured():
    flags = {flag.name: flag for flag in table().flags}
    for name in (
        "rollout-function-path", "eval-function-path", "custom-generate-function-path", "data-source-path",
        "custom-rm-path", "dynamic-sampling-filter-path", "buffer-filter-path", "rollout-sample-filter-path",
        "rollout-all-samples-process-path", "custom-reward-post-process-path",
        "custom-convert-samples-to-train-data-path", "custom-rollout-log-function-path",
        "custom-eval-rollout-log-function-path",
    ):  # fmt: skip
        assert flags["--" + name].status == "honoured"
