"""Rules: the model directory, checkpoints, what is written, hooks, environment."""

from dataclasses import replace

import pytest
from support.flag_cases import CHECKPOINT, FACTS, MODEL, RELEASED, config, outcome, problems, with_directory

from miles.flags.facts import CheckpointFacts, DirectoryFacts


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (DirectoryFacts(), "no such directory"),
        (replace(MODEL, config=None), "no config.json"),
        (replace(MODEL, config=None, config_error="config.json cannot be read: x"), "config.json cannot be read: x"),
        (replace(MODEL, has_tokenizer=False), "no tokenizer"),
        (replace(MODEL, has_weights=False), "no weights"),
    ],
)
def test_a_model_directory_that_cannot_be_used(found, told):
    assert told in problems(facts=with_directory("M", found))["--hf-checkpoint"]


class TestLoad:
    def test_a_checkpoint_is_resumed(self):
        found = config("--load C", facts=with_directory("C", CHECKPOINT))
        assert found["load"] == "/home/me/C"
        assert (found["finetune"], found["no_load_optim"], found["no_load_rng"]) == (False, False, False)
        assert found["start_rollout_id"] is None

    @pytest.mark.parametrize(
        ("found", "why"), [(DirectoryFacts(), "does not exist"), (DirectoryFacts(exists=True), "has no")]
    )
    def test_none_there_is_a_fresh_start(self, found, why):
        resolved = outcome("--load C", facts=with_directory("C", found))
        assert not resolved.problems
        assert resolved.config["load"] is None
        assert resolved.config["finetune"] is resolved.config["no_load_optim"] is True
        assert any(why in notice and "--hf-checkpoint" in notice for notice in resolved.notices)

    def test_a_step_of_no_checkpoint_is_told(self):
        assert "--load" in problems("--ckpt-step 3")["--ckpt-step"]
        assert "--ckpt-step" in problems("--load C --ckpt-step 3", facts=with_directory("C", DirectoryFacts()))

    def test_one_that_is_there_is_taken(self):
        found = config("--load C --ckpt-step 3", facts=with_directory("C", CHECKPOINT))
        assert (found["load"], found["ckpt_step"], found["finetune"]) == ("/home/me/C", 3, False)
        told = problems("--load C --ckpt-step 4", facts=with_directory("C", CHECKPOINT))
        assert "there are: 3, 7" in told["--ckpt-step"]

    @pytest.mark.parametrize("backend", ["megatron", "fsdp"])
    def test_the_directory_of_a_checkpoint_is_a_step_of_the_one_above(self, backend):
        itself = DirectoryFacts(exists=True, newest=CheckpointFacts(backend, 3), is_checkpoint=True)
        facts = with_directory("C/iter_0000003", itself)
        found = config(f"--load C/iter_0000003 --train-backend {backend}", facts=facts)
        assert (found["load"], found["ckpt_step"], found["finetune"]) == ("/home/me/C", 3, False)
        found = config(
            f"--ref-load C/iter_0000003/ --train-backend {backend}", facts=with_directory("C/iter_0000003/", itself)
        )
        assert (found["ref_load"], found["ref_ckpt_step"]) == ("/home/me/C", 3)
        assert "--ckpt-step" in problems(f"--load C/iter_0000003 --ckpt-step 4 --train-backend {backend}", facts=facts)

    @pytest.mark.parametrize(("found", "why"), [(RELEASED, "weights alone"), (MODEL, "Hugging Face directory")])
    def test_weights_are_a_fresh_start_with_them(self, found, why):
        resolved = outcome("--load C", facts=with_directory("C", found))
        assert not resolved.problems
        assert resolved.config["load"] == "/home/me/C"
        assert resolved.config["finetune"] is resolved.config["no_load_optim"] is resolved.config["no_load_rng"] is True
        assert [notice for notice in resolved.notices if "--load" in notice and why in notice]
        assert not any("--hf-checkpoint" in notice for notice in resolved.notices)

    def test_one_that_cannot_be_read_is_told_and_not_passed_over(self):
        damaged = DirectoryFacts(exists=True, checkpoint_error="it says 'x'")
        for flags in ("--load C", "--ref-load C", "--save C --resume auto"):
            told = problems(flags, facts=with_directory("C", damaged))
            assert any("it says 'x'" in text for text in told.values()), flags
        broken = with_directory("C", DirectoryFacts(exists=True, config_error="config.json cannot be read: x"))
        assert "config.json" in problems("--load C", facts=broken)["--load"]
        told = problems("--load C --train-backend fsdp", facts=with_directory("C", CHECKPOINT))["--load"]
        assert "--train-backend megatron" in told and "miles convert" in told

    def test_resume_auto_looks_into_save(self):
        found = config("--save S --resume auto", facts=with_directory("S", CHECKPOINT))
        assert found["load"] == found["save"] == "/home/me/S"
        assert found["finetune"] is False
        assert config("--save S --resume auto", facts=with_directory("S", DirectoryFacts()))["load"] is None
        assert "--save" in problems("--resume auto")["--resume"]


class TestStart:
    def test_behind_the_end_there_is_nothing(self):
        assert "0 to 5" in problems("--num-rollout 5 --start-rollout-id 6")["--start-rollout-id"]
        assert "--start-rollout-id" in problems("--num-rollout 5 --start-rollout-id -1")

    @pytest.mark.parametrize(
        ("flags", "begins_anew"),
        [
            ("--start-rollout-id 3", True),
            ("--start-rollout-id 0", False),
            ("--start-rollout-id 3 --load C", False),
            ("--start-rollout-id 3 --load C --finetune", False),
            ("--start-rollout-id 3 --load R", True),
        ],
    )
    def test_it_is_told_that_data_begins_anew(self, flags, begins_anew):
        facts = with_directory("R", RELEASED, facts=with_directory("C", CHECKPOINT))
        resolved = outcome(f"--num-rollout 5 {flags}", facts=facts)
        assert not resolved.problems
        assert any("begins anew" in notice for notice in resolved.notices) is begins_anew


class TestReference:
    def test_it_is_the_model_unless_told(self):
        resolved = outcome("--use-kl-loss")
        assert resolved.config["ref_load"] == "/home/me/M"
        assert any("reference model" in notice for notice in resolved.notices)
        assert config()["ref_load"] is None

    def test_a_checkpoint_or_a_model_directory(self):
        config("--use-kl-loss --ref-load R", facts=with_directory("R", CHECKPOINT))
        config("--use-kl-loss --ref-load R --ref-ckpt-step 3", facts=with_directory("R", CHECKPOINT))
        config("--use-kl-loss --ref-load M")
        config("--use-kl-loss --ref-load R", facts=with_directory("R", RELEASED))
        trained = DirectoryFacts(exists=True, newest=CheckpointFacts("fsdp", 3), steps={3: "fsdp"})
        config("--use-kl-loss --ref-load R --train-backend fsdp", facts=with_directory("R", trained))

    def test_what_cannot_be_one(self):
        assert (
            "no such directory" in problems("--ref-load R", facts=with_directory("R", DirectoryFacts()))["--ref-load"]
        )
        empty = with_directory("R", DirectoryFacts(exists=True))
        assert "neither" in problems("--ref-load R", facts=empty)["--ref-load"]
        torch_dist = with_directory("R", CHECKPOINT)
        assert "Hugging Face" in problems("--ref-load R --train-backend fsdp", facts=torch_dist)["--ref-load"]
        assert "no checkpoint of" in problems("--ref-load M --ref-ckpt-step 3")["--ref-ckpt-step"]


class TestWriting:
    def test_an_interval_needs_a_directory(self):
        assert "--save DIR" in problems("--save-interval 2")["--save-interval"]
        assert config("--save S --save-interval 2")["save"] == "/home/me/S"

    @pytest.mark.parametrize("flag", ["--save", "--run-dir", "--dump-details"])
    def test_directories_that_cannot_be_written(self, flag):
        locked = replace(FACTS, unwritable={"X": "X is a file"})
        assert "X is a file" in problems(f"{flag} X", facts=locked)[flag]

    def test_an_export_needs_saves_and_a_place(self):
        assert "--save DIR" in problems("--save-hf h")["--save-hf"]
        taken = replace(FACTS, export_error="there is something already")
        assert "something already" in problems("--save s --save-hf h", facts=taken)["--save-hf"]

    def test_the_default_run_directory_is_checked_too(self):
        assert "--run-dir" in problems(facts=replace(FACTS, unwritable={"/runs/new": "no"}))

    def test_paths_become_absolute(self):
        found = config("--run-dir r --save s --save-hf h/{rollout_id} --dump-details d")
        assert found["run_dir"] == "/home/me/r"
        assert found["save_hf"] == "/home/me/h/{rollout_id}"
        assert found["prompt_data"] == "/home/me/D"
        assert found["save_debug_rollout_data"] == "/home/me/d/rollout_data/{rollout_id}.pt"
        assert found["offload_train_disk_dir"] == "/home/me/r/offload"


def test_hooks_that_cannot_be_found_are_told():
    facts = replace(FACTS, hook_errors={"nowhere.rm": "there is no module 'nowhere' on the import path"})
    assert "no module 'nowhere'" in problems("--custom-rm-path nowhere.rm", facts=facts)["--custom-rm-path"]


def test_what_is_not_built_is_not_called_misspelt():
    path = "miles.rollout.fully_async_rollout.FullyAsyncRolloutFn"
    facts = replace(FACTS, hook_errors={path: "not built yet: fully asynchronous rollouts"})
    told = problems(f"--rollout-function-path {path}", facts=facts)["--rollout-function-path"]
    assert "not built yet" in told and "PYTHONPATH" not in told


def test_environment_becomes_a_dict():
    found = config(["--env", "A=1", "--env", "B=x=y", "--train-env-vars", '{"N": 1, "S": "s"}'])
    assert found["env"] == {"A": "1", "B": "x=y"}
    assert found["train_env_vars"] == {"N": "1", "S": "s"}
    assert "--train-env-vars" in problems(["--train-env-vars", "[1]"])
    assert "--apply-chat-template-kwargs" in problems(["--apply-chat-template-kwargs", "[1]"])
