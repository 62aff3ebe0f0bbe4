"""Rules: batches, prompts, lengths, evaluation."""

from dataclasses import replace

import pytest
from support.flag_cases import DATA, FACTS, RECIPE, config, outcome, problems, with_data, with_model

from miles.flags.facts import EvalSet
from miles.flags.prompt_facts import DataFacts


class TestBatch:
    def test_the_step_has_all_samples_unless_told(self):
        found = config()
        assert (found["global_batch_size"], found["num_steps_per_rollout"]) == (32, 1)
        assert found["over_sampling_batch_size"] == 8

    def test_steps_follow_from_the_batch_that_was_typed(self):
        assert config("--global-batch-size 16")["num_steps_per_rollout"] == 2
        assert config("--num-steps-per-rollout 4")["global_batch_size"] == 8

    def test_knobs_that_disagree_are_told_with_the_equation(self):
        found = problems("--global-batch-size 16 --num-steps-per-rollout 3")["--num-steps-per-rollout"]
        assert "8 prompts x 4 responses = 32 samples" in found
        assert "rollout_batch_size x n_samples_per_prompt" in found

    def test_neither_side_is_told(self):
        assert "--rollout-batch-size" in problems(without=["--rollout-batch-size", "--n-samples-per-prompt"])

    def test_prompts_follow_from_the_other_three(self):
        found = config("--global-batch-size 16 --num-steps-per-rollout 2", without=["--rollout-batch-size"])
        assert found["rollout_batch_size"] == 8

    def test_ranks_share_a_step_evenly(self):
        found = problems("--actor-num-gpus-per-node 3")
        assert "32 samples of a step cannot be divided among 3" in found["--global-batch-size"]

    def test_micro_batches_divide_a_ranks_samples(self):
        assert config("--micro-batch-size 8")["micro_batch_size"] == 8
        assert "micro-batches of 3" in problems("--micro-batch-size 3")["--micro-batch-size"]
        assert config("--micro-batch-size 3 --use-dynamic-batch-size --max-tokens-per-gpu 512")

    def test_dynamic_batches_need_a_budget(self):
        assert "--max-tokens-per-gpu" in problems("--use-dynamic-batch-size")["--use-dynamic-batch-size"]
        found = config("--use-dynamic-batch-size --max-tokens-per-gpu 512")
        assert found["log_probs_max_tokens_per_gpu"] == 512

    def test_what_does_not_fill_a_step_is_one_nevertheless(self):
        dynamic = "--use-dynamic-batch-size --max-tokens-per-gpu 512 --global-batch-size 12"
        assert "no multiple" in problems(dynamic)["--global-batch-size"]
        found = config(f"{dynamic} --allow-partial-train-step")
        assert (found["global_batch_size"], found["num_steps_per_rollout"]) == (12, 3)

    def test_a_batch_as_large_as_the_rollout(self):
        dynamic = "--use-dynamic-batch-size --max-tokens-per-gpu 512 --use-dynamic-global-batch-size"
        resolved = outcome(f"{dynamic} --global-batch-size 12")
        assert not resolved.problems
        assert (resolved.config["global_batch_size"], resolved.config["num_steps_per_rollout"]) == (32, 1)
        assert any("--global-batch-size 12 is not used" in notice for notice in resolved.notices)
        assert "one with --use-dynamic" in problems(f"{dynamic} --num-steps-per-rollout 2")["--num-steps-per-rollout"]

    def test_over_sampling_asks_for_no_less(self):
        assert config("--over-sampling-batch-size 16")["over_sampling_batch_size"] == 16
        assert "8 prompts of a rollout" in problems("--over-sampling-batch-size 4")["--over-sampling-batch-size"]

    def test_one_response_has_no_deviation_to_divide_by(self):
        assert config("--n-samples-per-prompt 1")["grpo_std_normalization"] is False
        assert config()["grpo_std_normalization"] is True


class TestPrompts:
    def test_rollouts_are_derived(self):
        resolved = outcome()
        assert (resolved.config["num_rollout"], resolved.config["num_rollout_derived"]) == (8, True)
        assert any("1 epoch of 64 prompts" in notice for notice in resolved.notices)
        assert config("--num-epoch 3")["num_rollout"] == 24

    def test_rollouts_that_were_typed_stay(self):
        resolved = outcome("--num-rollout 5 --num-epoch 3")
        assert (resolved.config["num_rollout"], resolved.config["num_rollout_derived"]) == (5, False)
        assert any("--num-epoch is ignored" in notice for notice in resolved.notices)
        assert config("--num-rollout 0")["num_rollout"] == 0

    def test_a_data_set_smaller_than_a_rollout_has_no_epoch(self):
        few = with_data("D", replace(DATA, rows=5))
        assert "5 prompts" in problems(facts=few)["--rollout-batch-size"]
        assert config("--num-rollout 2", facts=few)["num_rollout"] == 2

    @pytest.mark.parametrize(
        ("found", "told"),
        [
            (DataFacts(error="does not exist"), "does not exist"),
            (DataFacts(), "it is empty"),
            (DataFacts(bytes=9), "it is empty"),  # without a slice
            (DataFacts(rows=3, broken=(4, "Expecting value")), "line 4 is broken: Expecting value"),
        ],
    )
    def test_a_file_that_cannot_be_used(self, found, told):
        assert told in problems(facts=with_data("D", found))["--prompt-data"]

    def test_a_slice_beyond_the_rows_is_told_as_that(self):
        sliced = RECIPE.replace("data D", "data D@[100:]")
        found = problems(recipe=sliced, facts=with_data("D@[100:]", DataFacts(bytes=9)))["--prompt-data"]
        assert "no row of the file is in the slice" in found
        assert "it is empty" in problems(recipe=sliced, facts=with_data("D@[100:]", DataFacts()))["--prompt-data"]

    def test_none_is_told(self):
        assert "it is missing" in problems(without=["--prompt-data"])["--prompt-data"]

    def test_a_data_source_of_the_users_needs_none(self):
        flags = "--disable-rollout-global-dataset --data-source-path my.Source"
        assert "--num-rollout" in problems(flags, without=["--prompt-data"])
        assert config(f"{flags} --num-rollout 3", without=["--prompt-data"])["rollout_global_dataset"] is False

    def test_recorded_rollouts_need_no_prompts(self):
        assert config("--load-debug-rollout-data x --num-rollout 2", without=["--prompt-data"])["num_rollout"] == 2

    def test_a_missing_column_names_those_there_are(self):
        other = with_data("D", DataFacts(rows=64, columns=("question", "answer"), absent={"prompt": 1, "label": 1}))
        found = problems(facts=other)
        assert "no column 'prompt'" in found["--input-key"]
        assert "question or answer" in found["--input-key"]
        assert "no column 'label'" in found["--label-key"]

    def test_a_label_that_nobody_reads_may_be_missing(self):
        bare = with_data("D", replace(DATA, columns=("prompt",), absent={"label": 1, "metadata": 1}))
        assert config("--rm-type random", facts=bare)["label_key"] is None
        assert config("--custom-rm-path my.reward", facts=bare)["label_key"] is None
        assert "--label-key" in problems("--rm-type random --label-key label", facts=bare)
        assert "--label-key" in problems(facts=bare)


class TestLengths:
    def test_the_context_is_the_models_unless_told(self):
        found = config()
        assert found["rollout_max_context_len"] == found["eval_max_context_len"] == 40960
        assert found["rollout_max_prompt_len"] == 40959
        assert config("--rollout-max-context-len 512")["rollout_max_prompt_len"] == 511

    def test_lengths_that_do_not_fit(self):
        assert "40960 tokens" in problems("--rollout-max-context-len 50000")["--rollout-max-context-len"]
        assert "no token for a prompt" in problems("--rollout-max-context-len 64")["--rollout-max-response-len"]
        found = problems("--rollout-max-context-len 128 --rollout-max-prompt-len 128")
        assert "no token for a response" in found["--rollout-max-prompt-len"]
        assert "40960 tokens" in problems("--eval-max-context-len 50000")["--eval-max-context-len"]
        small = with_model(max_position_embeddings=64)
        assert "no token for a prompt" in problems(facts=small)["--rollout-max-response-len"]

    def test_a_length_is_needed_where_engines_generate(self):
        assert "--rollout-max-response-len" in problems(without=["--rollout-max-response-len"])
        config("--debug-train-only", without=["--rollout-max-response-len"])


class TestEvaluation:
    flags = "--eval-interval 2 --eval-prompt-data test D"

    def test_what_it_does_not_say_is_as_in_rollouts(self):
        found = config(f"{self.flags} --rollout-temperature 0.7 --eval-top-p 0.9")
        assert found["eval_temperature"] == 0.7
        assert found["eval_top_p"] == 0.9
        assert found["eval_max_response_len"] == 64
        assert (found["eval_input_key"], found["eval_label_key"]) == ("prompt", "label")
        assert found["eval_prompt_data"] == ["test", "/home/me/D"]

    def test_it_needs_data(self):
        assert "no evaluation data" in problems("--eval-interval 2")["--eval-interval"]
        config("--eval-interval 2 --eval-config e.yaml")

    def test_a_template_that_is_named_is_there(self):
        missing = replace(FACTS, missing_files=frozenset({"t.jinja"}))
        assert "no such file" in problems("--chat-template-path t.jinja", facts=missing)["--chat-template-path"]

    def test_a_description_that_cannot_be_used_is_told(self):
        odd = replace(FACTS, eval_error="takes pairs")
        assert "takes pairs" in problems("--eval-prompt-data a b c", facts=odd)["--eval-prompt-data"]
        assert "takes pairs" in problems("--eval-config e.yaml", facts=odd)["--eval-config"]

    def test_a_path_without_a_name_has_one(self):
        assert config("--eval-prompt-data D")["eval_prompt_data"] == ["aime", "/home/me/D"]

    def test_its_files_are_looked_at(self):
        def facts(found, key="label"):
            return replace(with_data("E", found), eval_sets=(EvalSet("E", "prompt", key),))

        gone = facts(DataFacts(error="does not exist"))
        assert "does not exist" in problems("--eval-prompt-data t E", facts=gone)["--eval-prompt-data"]
        assert "does not exist" in problems("--eval-config e.yaml", facts=gone)["--eval-config"]
        other = facts(DataFacts(rows=1, columns=("q",), absent={"prompt": 1, "label": 1}))
        found = problems("--eval-prompt-data t E", facts=other)
        assert "no column 'prompt'" in found["--eval-input-key"]
        assert "no column 'label'" in found["--eval-label-key"]

    @pytest.mark.parametrize(
        ("setting", "value", "told"),
        [
            ("n_samples_per_eval_prompt", -3, "1 or more"),
            ("temperature", -1, "0 or more"),
            ("top_p", 7, "above 0, up to 1"),
            ("top_k", 0, "1 or more, or -1"),
            ("max_response_len", 0, "1 or more"),
            ("min_new_tokens", -1, "0 or more"),
            ("max_prompt_len", 0, "1 or more"),
            ("max_context_len", 50000, "up to 40960"),
            ("custom_generate_function_path", "nowhere.at.all", "gone"),
        ],
    )
    def test_what_a_file_says_is_in_the_ranges_of_the_flags(self, setting, value, told):
        def facts(defaults, entry):
            entries = (defaults, [{"name": "one", "path": "E", **entry}])
            odd = with_data("E", replace(DATA, absent={}))
            return replace(odd, eval_file=entries, hook_errors={"nowhere.at.all": "gone"})

        for found in (facts({setting: value}, {}), facts({}, {setting: value})):
            text = problems("--eval-config e.yaml", facts=found)["--eval-config"]
            assert f"evaluation data one: {setting} {value}" in text
            assert told in text
        assert config("--eval-config e.yaml", facts=facts({}, {"top_p": 0.5, "top_k": -1}))

    def test_labels_that_nobody_reads_may_be_missing(self):
        bare = with_data("E", DataFacts(rows=1, columns=("prompt",), absent={"label": 1}))
        facts = replace(bare, eval_sets=(EvalSet("E", "prompt", "label"),))
        found = config("--eval-prompt-data t E --rm-type random", facts=facts)
        assert found["label_key"] == "label"
        [one] = found["eval_datasets"]
        assert (one["name"], one["path"], one["label_key"]) == ("t", "/home/me/E", None)

    def test_evaluations_keep_labels_that_training_lacks(self):
        bare = with_data("D", replace(DATA, columns=("prompt",), absent={"label": 1, "metadata": 1}))
        found = config("--rm-type random", facts=bare)
        assert (found["label_key"], found["eval_label_key"]) == (None, "label")

    def test_it_needs_engines_and_a_reward_for_each_sample(self):
        assert "--eval-interval" in problems(f"{self.flags} --debug-train-only")
        assert "--group-rm" in problems(f"{self.flags} --group-rm")
        config("--group-rm")
