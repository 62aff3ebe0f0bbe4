"""Who starts agents: what is chosen if nothing is said, and how launchers and names of machines go together."""

from dataclasses import replace

import pytest
from support.flag_cases import FACTS, config, outcome, problems

from miles.flags.slurm_facts import SlurmFacts

JOB = replace(FACTS, slurm=SlurmFacts("7", ("n1", "n2"), cpus=(8, 8)))
TWO = "--rollout-num-gpus 2 --actor-num-nodes 2"


def names(found):
    return [machine["name"] for machine in found["machines"]]


def test_an_allocation_is_seen():
    resolved = outcome(TWO, facts=JOB)
    assert resolved.config["launcher"] == "slurm"
    assert names(resolved.config) == ["n1", "n2"]
    assert resolved.config["num_nodes"] == 2
    assert any("job 7, with 2 nodes" in notice for notice in resolved.notices)


def test_an_allocation_of_this_machine_alone_needs_no_srun():
    here = replace(FACTS, slurm=SlurmFacts("7", ("n1",), here="n1"))
    assert config("", facts=here)["launcher"] == "local"
    assert config("--launcher slurm", facts=here)["launcher"] == "slurm"
    elsewhere = replace(FACTS, slurm=SlurmFacts("7", ("n1",)))  # under salloc, on a login node
    assert config("", facts=elsewhere)["launcher"] == "slurm"


def test_what_is_typed_goes_over_the_allocation():
    assert config("--launcher local", facts=JOB)["launcher"] == "local"
    assert config("--hosts a,b", facts=JOB)["launcher"] == "ssh"


def test_gpus_of_an_allocation_are_known():
    found = config("", facts=replace(FACTS, slurm=SlurmFacts("7", ("n1", "n2"), gpus=4)))
    assert [machine["slots"] for machine in found["machines"]] == [4, 4]


def test_nodes_that_others_bring_have_names_or_a_number():
    found = config("--launcher external --nodes 3")
    assert names(found) == ["node-0", "node-1", "node-2"]
    assert found["num_nodes"] == 3
    assert names(config("--launcher external")) == ["node-0"]
    assert names(config("--launcher external --hosts a[1-2]")) == ["a1", "a2"]


def test_people_have_more_time_than_programs():
    assert config("--launcher external")["start_timeout"] == 3600.0
    assert config("--launcher external --start-timeout 5")["start_timeout"] == 5.0
    assert config("")["start_timeout"] == 120.0


@pytest.mark.parametrize(
    ("flags", "flag", "words"),
    [
        ("--launcher slurm", "--launcher", "no Slurm allocation"),
        ("--launcher slurm --hosts a", "--hosts", "machines of the allocation"),
        ("--launcher local --hosts a", "--hosts", "this machine alone"),
        ("--nodes 2", "--nodes", "--launcher external"),
        ("--nodes 2 --launcher external --hosts a", "--nodes", "without names"),
        ("--launcher external --nodes 0", "--nodes", ""),
    ],
)
def test_what_does_not_go_together_is_told(flags, flag, words):
    assert words in problems(flags)[flag]


def test_a_list_of_nodes_that_cannot_be_read_is_told():
    odd = replace(FACTS, slurm=SlurmFacts("7", error="SLURM_JOB_NODELIST=n[: a bracket is not closed"))
    assert "bracket" in problems("--launcher slurm", facts=odd)["--launcher"]
