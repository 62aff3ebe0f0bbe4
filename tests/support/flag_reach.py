"""Where it is shown that an honoured flag reaches what it names: other tests, by flag. ``tests/flags/test_reach.py``
says how a flag gets its case."""

SHOWN = """\
job/test_async_runs.py::test_one_step_ahead_generates_while_it_trains
    --train-async --update-weights-interval
job/test_async_runs.py::test_fully_asynchronous_training_keeps_its_bound
    --fully-async --max-weight-staleness --async-max-concurrent-samples --async-unused-samples-handler
rollout/test_fully_async.py::test_the_capacity_is_rounded_down
    --async-data-buffer-capacity-factor
rollout/test_fully_async.py::test_a_buffer_of_the_users_takes_the_place_of_ours
    --custom-async-data-buffer-path
flags/test_hosts.py::test_nodes_of_the_trainer_are_among_the_hosts
    --actor-num-nodes
flags/test_hosts.py::test_hosts_are_started_by_ssh_and_are_the_nodes_of_the_run
    --hosts --hostfile
flags/test_launchers.py::test_what_is_typed_goes_over_the_allocation
    --launcher
flags/test_launchers.py::test_nodes_that_others_bring_have_names_or_a_number
    --nodes
launcher/test_doctor.py::test_a_run_looks_at_its_nodes_once_they_have_joined
    --skip-preflight
launcher/test_ssh_nodes.py::test_hosts_get_what_flags_say
    --ssh-config --sync-code --remote-python --hosts-at-once --start-timeout --interface
launcher/test_ssh_nodes.py::test_the_controller_listens_where_flags_say
    --controller-host
flags/test_resolve_run.py::test_engines_of_several_ranks
    --actor-num-gpus-per-node --rollout-num-gpus-per-engine
flags/test_resolve_run.py::test_a_recipe_resolves
    --rollout-num-gpus --colocate
flags/test_resolve_run.py::test_more_gpus_than_there_are
    --num-gpus-per-node
engines/test_arguments.py::test_an_engine_on_gpus_gets_the_memory_saver_and_nothing_that_is_for_cpus
    --offload-rollout
job/test_modes.py::test_a_trainer_that_sleeps_on_disk_gives_its_memory_back_and_trains_on
    --offload-train-target --train-backend
megatron/test_sleep.py::test_a_directory_that_cannot_be_written_leaves_all_as_it_was
    --offload-train-disk-dir
launcher/test_train_entry.py::test_a_dry_run_shows_how_environments_differ_from_the_agents
    --train-env-vars --env
job/test_supervised.py::test_supervised_training_then_conversion_then_a_reference_from_the_checkpoint
    --hf-checkpoint --ref-load --save-hf --input-key --label-key --loss-type --use-kl-loss --kl-loss-coef
job/test_resume.py::test_six_iterations_equal_three_and_three_bit_for_bit
    --load --save --save-interval --debug-exit-after-rollout --debug-train-only
megatron/test_checkpoint_choice.py::test_finetune_takes_weights_only
    --finetune
megatron/test_checkpoint_choice.py::test_ckpt_step_chooses
    --ckpt-step
megatron/test_checkpoint_choice.py::test_no_load_optim_begins_with_a_fresh_optimizer
    --no-load-optim
megatron/test_checkpoint_choice.py::test_a_checkpoint_without_optimizer_is_loaded_only_with_no_load_optim
    --no-save-optim
fsdp/test_checkpoints.py::test_what_is_not_saved_is_named_when_it_is_missing
    --no-save-rng
flags/test_resolve_files.py::test_a_checkpoint_or_a_model_directory
    --ref-ckpt-step
rollout/test_data.py::test_what_cannot_be_used_is_refused_with_where_it_is
    --metadata-key
rollout/test_data.py::test_chat_templates_with_tools_and_settings
    --apply-chat-template --apply-chat-template-kwargs --tool-key
job/test_resume.py::test_with_live_engines_data_buffer_ledger_and_counters_go_on
    --rollout-shuffle --partial-rollout --over-sampling-batch-size --dynamic-sampling-filter-path
rollout/test_manager.py::test_prompts_that_are_too_long_are_told_at_the_start
    --prompt-data --rollout-max-prompt-len
packing/test_dp_schedule.py::test_balancing_makes_ranks_even
    --balance-data --use-dynamic-batch-size --micro-batch-size
packing/test_dp_schedule.py::test_no_micro_batch_is_larger_than_allowed_unless_it_is_one_sample
    --max-tokens-per-gpu
packing/test_dp_schedule.py::test_a_smaller_last_step_is_made_on_request
    --allow-partial-train-step
packing/test_dp_schedule.py::test_no_schedule_changes_what_a_sample_weighs_in_the_gradient
    --balance-by-flops --log-probs-max-tokens-per-gpu
rollout/test_hooks.py::test_a_step_of_dynamic_size_counts_executions
    --use-dynamic-global-batch-size
training/test_parallelism.py::test_each_size_divides_what_it_names
    --pipeline-model-parallel-size --expert-model-parallel-size --expert-tensor-parallel-size --sequence-parallel
    --decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers
training/test_mtp.py::test_a_rollout_gives_the_numbers_of_the_formula
    --mtp-num-layers --enable-mtp-training --mtp-loss-scaling-factor
training/test_routing_replay.py::test_training_goes_through_the_experts_that_were_recorded
    --use-routing-replay --use-rollout-routing-replay
training/test_parallelism.py::test_a_rollout_gives_the_numbers_of_one_rank
    --context-parallel-size
flags/test_parallel_rules.py::test_kernels_that_are_not_there_are_told
    --moe-grouped-gemm --moe-permute-fusion
training/test_trainer.py::test_what_is_saved_goes_on_where_it_was
    --start-rollout-id
rollout/test_hooks.py::test_a_data_source_of_the_user_that_gives_no_numbers
    --data-source-path
flags/test_resolve_data.py::test_a_data_source_of_the_users_needs_none
    --disable-rollout-global-dataset
rollout/test_hooks.py::test_rollout_functions_of_all_forms
    --rollout-function-path
rollout/test_hooks.py::test_generate_functions_of_all_forms
    --custom-generate-function-path
rollout/test_data.py::test_conversations_that_cannot_be_learnt
    --loss-mask-type
engines/test_external.py::test_addresses_become_engines_and_take_no_gpu
    --rollout-external --rollout-external-engine-addrs
engines/test_fleet_update.py::test_an_engine_that_hangs_at_any_step_is_fenced_in_time
    --update-weight-timeout --update-weight-silence-timeout
engines/test_equal_weights.py::test_parameters_that_are_left_out_may_differ
    --check-weight-update-skip-list
engines/test_server_groups.py::test_groups_become_engines
    --sglang-config
engines/test_fleet_update.py::test_all_engines_get_every_version
    --update-weight-buffer-size
engines/test_fleet_update.py::test_in_place_pausing_leaves_the_cache_alone
    --pause-generation-mode
rollout/test_train_rollout.py::test_what_older_weights_made_can_be_left_out_of_the_loss
    --mask-offpolicy-in-partial-rollout
rollout/test_hooks.py::test_hooks_on_the_collected_samples
    --rollout-all-samples-process-path --rollout-sample-filter-path --custom-rollout-log-function-path
    --custom-reward-post-process-path
rollout/test_hook_isolation.py::test_code_that_wants_to_end_the_process_ends_the_rollout_and_is_named
    --custom-eval-rollout-log-function-path
flags/test_architecture.py::test_the_shape_of_qwen3
    --group-query-attention --use-rotary-position-embeddings --swiglu --disable-bias-linear
flags/test_resolve_files.py::test_resume_auto_looks_into_save
    --resume
flags/test_resolve_reward.py::test_clips_and_keys_follow
    --eval-reward-key
megatron/test_checkpoint_choice.py::test_generators_are_taken_over_unless_told
    --no-load-rng
faults/test_recovery.py::test_a_stopped_rank_is_found_by_its_heartbeats
    --trainer-heartbeat-checker-interval --trainer-heartbeat-checker-timeout --trainer-heartbeat-checker-first-wait
    --trainer-heartbeat-checker-failure-threshold
job/test_recovery.py::test_a_rank_that_is_killed_in_training_changes_nothing
    --use-fault-tolerance
faults/test_recovery.py::test_the_newest_checkpoint_is_where_it_begins
    --recovery-interval
job/test_parts.py::test_what_is_stopped_is_brought_back_only_with_fault_tolerance
    --recovery-stop-timeout
rollout/test_conversion.py::test_whole_groups_are_trimmed
    --disable-rollout-trim-samples
rollout/test_train_rollout.py::test_samples_that_are_finished_make_room_for_other_prompts
    --rollout-submission-granularity
rollout/test_train_rollout.py::test_a_prompt_that_fills_the_context_is_truncated_without_a_request
    --rollout-max-context-len
rollout/test_data.py::test_evaluations_by_flag
    --eval-prompt-data
rollout/test_data.py::test_settings_of_evaluations_come_from_the_nearest
    --eval-config
job/test_schedule.py::test_saves_and_evaluates_by_their_intervals_and_at_the_end
    --eval-interval
flags/test_resolve_data.py::test_its_files_are_looked_at
    --eval-input-key --eval-label-key
megatron/test_steps.py::test_gradients_equal_plain_pytorch
    --tensor-model-parallel-size
megatron/test_megatron_settings.py::test_flags_reach_the_fields_that_they_name
    --recompute-granularity --recompute-method --recompute-num-layers --recompute-modules --attention-dropout
    --hidden-dropout --no-bias-swiglu-fusion --disable-bf16-reduced-precision-matmul --deterministic-mode
    --overlap-grad-reduce --ddp-bucket-size --grad-reduce-in-bf16 --ddp-pad-buckets-for-high-nccl-busbw
    --ddp-reduce-scatter-with-fp32-accumulation --optimizer --lr --min-lr --clip-grad --weight-decay --adam-beta1
    --adam-beta2 --adam-eps --sgd-momentum --decoupled-lr --decoupled-min-lr --apply-wd-to-qk-layernorm
megatron/test_megatron_settings.py::test_what_changes_only_the_work_changes_no_number
    --distribute-saved-activations
megatron/test_megatron_settings.py::test_the_number_of_buckets_is_what_was_asked_for
    --ddp-num-buckets
flags/test_flags_reach_code.py::test_recomputation_runs_layers_twice_and_changes_no_number
    --gradient-checkpointing
flags/test_flags_reach_code.py::test_the_norm_of_the_parameters_is_told_on_request
    --log-params-norm
flags/test_flags_reach_code.py::test_entropy_is_measured_before_training_on_request
    --use-rollout-entropy
fsdp/test_refusals.py::test_defaults_become_what_a_cpu_can_do
    --fsdp-cpu-offload --attn-implementation
backends/test_backend_contract.py::test_a_step_without_finite_gradients_is_an_error_or_left_out
    --no-check-for-nan-in-loss-and-grad
rollout/test_train_rollout.py::test_on_policy_means_that_older_answers_are_generated_again
    --true-on-policy-mode
rollout/test_conversion.py::test_other_estimators
    --disable-grpo-std-normalization --disable-rewards-normalization
training/test_losses.py::test_normalised_advantages_are_the_same_on_two_ranks_as_on_one
    --normalize-advantages
training/test_losses.py::test_a_custom_loss_gets_what_the_reference_gives_it
    --custom-loss-function-path
training/test_losses.py::test_a_custom_reducer_replaces_the_mean_of_the_policy_loss_only
    --custom-pg-loss-reducer-function-path
training/test_losses.py::test_a_custom_correction_changes_numerators_only
    --custom-tis-function-path
training/test_losses.py::test_stock_corrections_bound_or_drop_what_is_far_off
    --tis-clip --tis-clip-low
flags/test_resolve_run.py::test_what_only_megatron_has
    --use-checkpoint-opt-param-scheduler
rollout/test_hooks.py::test_a_samples_own_reward_comes_first
    --rm-type
rewards/test_remote.py::test_what_is_sent
    --rm-url
rewards/test_remote.py::test_the_flags_give_the_budget
    --rm-max-retries --rm-timeout
rollout/test_hooks.py::test_groups_are_rewarded_together
    --group-rm
rollout/test_hooks.py::test_reward_functions_run_apart_from_the_endpoints
    --custom-rm-path
rollout/test_data.py::test_the_users_buffer_filter_chooses
    --buffer-filter-path
rollout/test_hooks.py::test_one_of_a_dict_of_rewards_is_chosen
    --reward-key
rollout/test_hooks.py::test_a_conversion_of_the_user
    --custom-convert-samples-to-train-data-path
rollout/test_conversion.py::test_metrics_of_a_rollout
    --log-passrate
job/test_modes.py::test_what_was_generated_alone_is_trained_on_alone_by_both_backends_with_the_same_numbers
    --debug-rollout-only --save-debug-rollout-data --load-debug-rollout-data
training/test_trainer.py::test_a_rollout_is_trained_and_told_in_numbers
    --save-debug-train-data
rollout/test_train_rollout.py::test_trajectories_are_text_by_role
    --save-debug-trajectory-data
flags/test_resolve_run.py::test_dumping_details_names_its_files
    --dump-details
backends/test_profiling.py::test_a_target_within_another_is_part_of_its_trace
    --use-pytorch-profiler --profile-target --profile-step-start --profile-step-end
backends/test_profiling.py::test_a_part_can_be_traced_alone_on_the_ranks_that_are_asked_for
    --profile-ranks
backends/test_profiling.py::test_a_memory_recording_says_who_allocates
    --memory-snapshot-dir --memory-snapshot-num-steps --memory-recorder --record-memory-history
backends/test_trainer_hooks.py::test_a_spec_of_the_users_builds_the_layers
    --spec
backends/test_trainer_hooks.py::test_a_model_of_the_users_is_trained
    --custom-model-provider-path
backends/test_trainer_flags.py::test_packed_batches_are_filled_up_to_a_multiple
    --data-pad-size-multiplier
backends/test_trainer_flags.py::test_padded_batches_train_as_packed_ones
    --qkv-format
backends/test_trainer_flags.py::test_a_loss_that_is_computed_twice_is_the_same
    --recompute-loss-function
backends/test_trainer_flags.py::test_masters_of_bfloat16_parameters_can_be_done_without
    --keep-fp32-master
backends/test_trainer_flags.py::test_replicas_of_shards_train_as_shards_over_all_ranks
    --dp-replicate-size
backends/test_trainer_flags.py::test_entropy_is_shown_where_it_is_asked_for
    --observe-training-entropy
backends/test_trainer_flags.py::test_an_optimizer_that_forgets_begins_anew_with_each_rollout
    --reset-optimizer-states
backends/test_trainer_flags.py::test_without_an_optimizer_gradients_are_computed_and_nothing_moves
    --debug-disable-optimizer
backends/test_trainer_flags.py::test_checksums_of_weights_tell_when_they_change
    --save-local-weight-checksum
backends/test_trainer_flags.py::test_speed_is_told_for_each_pass_and_as_a_share_of_the_peak
    --mfu-peak-tflops
backends/test_trainer_hooks.py::test_each_is_called_in_its_place_with_what_it_works_on
    --custom-megatron-init-path --custom-megatron-before-log-prob-hook-path
    --custom-megatron-before-train-step-hook-path
backends/test_trainer_hooks.py::test_rollout_data_can_be_changed_before_training
    --rollout-data-postprocess-path
tracking/test_wandb.py::test_a_run_is_written_with_its_axes_its_config_and_its_answers
    --wandb-key
rollout/test_conversion.py::test_numbers_made_of_samples
    --wandb-always-use-train-step
tracking/test_tensorboard.py::test_the_directory
    --tb-project-name --tb-experiment-name --tensorboard-dir
tracking/test_prometheus.py::test_a_port_that_is_taken_is_an_error_of_beginning
    --prometheus-port
tracking/test_prometheus.py::test_only_this_machine_is_listened_to_unless_said_otherwise
    --prometheus-run-name --prometheus-address
job/test_matrix.py::test_it_trains_and_the_reward_rises
    --check-weight-update-equal
flags/test_resolving_process.py::test_a_config_file_is_applied_before_anything_is_derived
    --custom-config-path
launcher/test_train_entry.py::test_a_dry_run_shows_everything_and_starts_nothing
    --dry-run
backends/test_profiling.py::test_a_memory_recording_until_the_end_has_the_name_that_was_asked_for
    --memory-snapshot-path
backends/test_profiling.py::test_nsys_is_told_of_the_steps_that_it_records
    --profile
flags/test_trainer_rules.py::test_loading_with_little_memory
    --low-memory-resume
job/test_trainer_flags.py::test_a_save_that_is_asked_for_ends_with_the_users_function
    --custom-megatron-post-save-hook-path --save-trigger-sentinel
job/test_trainer_flags.py::test_engines_can_keep_their_weights
    --debug-skip-weight-update
training/test_critic.py::test_the_critic_learns_alone_for_as_long_as_it_is_told
    --num-critic-only-steps
megatron/test_steps.py::test_adam_in_host_memory_makes_the_same_steps
    --optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d
backends/test_old_policy.py::test_old_log_probs_are_those_of_the_weights_that_generated
    --keep-old-actor
backends/test_old_policy.py::test_the_reference_moves_every_so_many_rollouts_and_is_in_checkpoints
    --ref-update-interval
backends/test_teacher.py::test_a_teacher_is_frozen_and_its_log_probs_count
    --opd-type --opd-teacher-load --opd-teacher-ckpt-step
rollout/test_distillation.py::test_each_sample_has_its_teacher
    --opd-teacher-urls --opd-teacher-key
lora/test_numbers.py::test_each_choice_of_layers
    --target-modules --exclude-modules --lora-type --lora-adapter-path
flags/test_resolve_run.py::test_gpus_are_used_if_torch_can
    --device --bf16
"""
"""A test below ``tests/``, then the flags that it shows to reach what they name."""


def shown() -> dict[str, str]:
    """Test by flag."""
    found: dict[str, str] = {}
    test = ""
    for line in SHOWN.splitlines():
        if line.startswith(" "):
            for name in line.split():
                assert name not in found, f"{name} stands here twice"
                found[name] = test
        else:
            test = line
    return found
