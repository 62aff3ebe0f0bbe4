"""Machines as they are written: ranges of Slurm's kind, files of OpenMPI's and DeepSpeed's, what is wrong with them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.flag_cases import FACTS, GPUS, config, outcome, problems

from miles.flags.hosts import Host, expand, parse_hostfile, parse_hosts

APART = {"recipe": "--hf-checkpoint M --prompt-data D --rollout-batch-size 8 --n-samples-per-prompt 4 "
         "--rollout-max-response-len 64 --rm-type math --actor-num-gpus-per-node 2"}  # fmt: skip


def with_file(text):
    return replace(FACTS, hostfile=(text, ""))


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("node", ["node"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("n[08-10]", ["n08", "n09", "n10"]),
        ("n[1,3-4]x", ["n1x", "n3x", "n4x"]),
        ("r[1-2]n[1-2].local", ["r1n1.local", "r1n2.local", "r2n1.local", "r2n2.local"]),
    ],
)
def test_ranges_as_slurm_writes_them(word, names):
    assert expand(word) == names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node[1-", "not closed"),
        ("node1]", "was not opened"),
        ("node[a]", "neither a number nor a range"),
        ("node[4-1]", "ends before it begins"),
        ("node[1-99999999]", "more than 65536"),
        ("a b", "no host name"),
        ("-oProxyCommand=x", "no host name"),
        ("a;b", "no host name"),
        ("me@", "no host name"),
        ("-x@a", "no user name"),
        ("a:0", "no port"),
        ("a:x", "no port"),
        ("fe80::1%eth0", "[ADDRESS]:PORT"),
        ("[fd00::7]22", "[ADDRESS]:PORT"),
        ("a,b,a", "named twice"),
        (",", "names no host"),
        ("x" * 65, "cannot name a node"),
    ],
)
def test_what_names_no_hosts_is_told(text, words):
    hosts, found = parse_hosts(text)
    assert hosts == []
    assert words in str(found[0])


def test_user_and_port_are_of_all_hosts_of_their_range():
    hosts, found = parse_hosts("alice@gpu[1-2]:2222, 10.0.0.9,bob@fd00::7,[fd00::8]:23,[fd00::9]")
    assert found == []
    assert hosts == [
        Host("gpu1", "gpu1", user="alice", port=2222),
        Host("gpu2", "gpu2", user="alice", port=2222),
        Host("10.0.0.9", "10.0.0.9"),
        Host("ip6-fd00--7", "fd00::7", user="bob"),
        Host("ip6-fd00--8", "fd00::8", port=23),
        Host("ip6-fd00--9", "fd00::9"),
    ]


@given(st.lists(st.integers(0, 999), min_size=1, max_size=6, unique=True), st.integers(1, 4))
def test_every_list_of_numbers_comes_back_in_order(numbers, width):
    inside = ",".join(str(number).zfill(width) for number in numbers)
    assert expand(f"n[{inside}]") == [f"n{str(number).zfill(width)}" for number in numbers]


def test_a_file_in_the_formats_of_openmpi_and_deepspeed_with_more_of_ours():
    text = """
# the rack
node-1 slots=8 max_slots=8
node-2 slots=4   # half of it
al@gpu[3-4] port=2222 python=/opt/py env.NCCL_DEBUG=INFO env.NOTE="two words"
10.0.0.9 max-slots=2 user=bob
"""
    hosts, found = parse_hostfile(text)
    assert found == []
    env = {"NCCL_DEBUG": "INFO", "NOTE": "two words"}
    assert hosts == [
        Host("node-1", "node-1", slots=8),
        Host("node-2", "node-2", slots=4),
        Host("gpu3", "gpu3", user="al", port=2222, python="/opt/py", env=env),
        Host("gpu4", "gpu4", user="al", port=2222, python="/opt/py", env=env),
        Host("10.0.0.9", "10.0.0.9", slots=2, user="bob"),
    ]


def test_a_mark_of_byte_order_is_not_part_of_a_name_and_numbers_of_processes_are_no_ports():
    assert [host.name for host in parse_hostfile("\ufeffn1\nn2:2222\n")[0]] == ["n1", "n2"]
    hosts, found = parse_hostfile("n1:4\n")
    assert hosts == [] and "slots=4" in str(found[0]) and "port=4" in str(found[0])


def test_everything_wrong_in_a_file_is_told_by_line():
    text = 'a slots=0\nb slots=4 max_slots=2\nc color=red\nd env.1=x\n"e\nf\nf slots=2\ng 8\n'
    hosts, found = parse_hostfile(text)
    assert hosts == []
    assert [one.line for one in found] == [1, 2, 3, 4, 5, 8, 7]
    told = "; ".join(map(str, found))
    for words in (
        "a number from 1",
        "more than max_slots=2",
        "'color=red' is not",
        "first in line 6",
        "'8' is not KEY",
    ):
        assert words in told
    assert "names no host" in str(parse_hostfile("# nothing\n")[1][0])


def test_hosts_are_started_by_ssh_and_are_the_nodes_of_the_run():
    found = config("--hosts a[1-2],b:22")
    assert found["launcher"] == "ssh"
    assert [machine["name"] for machine in found["machines"]] == ["a1", "a2", "b"]
    assert found["machines"][2]["port"] == 22
    assert found["num_nodes"] == 3
    found = config("--hostfile F", facts=with_file("a slots=3\nb\n"))
    assert [machine["slots"] for machine in found["machines"]] == [3, None]


def test_what_contradicts_itself_is_told():
    assert "--hosts names machines, too" in problems("--hosts a --hostfile F")["--hostfile"]
    assert "this machine alone" in problems("--hosts a --launcher local")["--hosts"]
    assert "line 2: 'x'" in problems("--hostfile F", facts=with_file("a\nb x\n"))["--hostfile"]
    unread = replace(FACTS, hostfile=("", "it cannot be read: gone"))
    assert "cannot be read: gone" in problems("--hostfile F", facts=unread)["--hostfile"]


def test_nodes_of_the_trainer_are_among_the_hosts():
    found = config("--hosts a[1-2] --actor-num-nodes 2")
    assert found["world_size"] == 4
    assert "the run has 2 machines" in problems("--hosts a[1-2] --actor-num-nodes 3")["--actor-num-nodes"]


def test_gpus_of_hosts_are_those_that_flags_tell():
    flags = "--hosts a[1-2] --num-gpus-per-node 4"
    assert config(flags, facts=GPUS, **APART)["rollout_num_gpus"] == 6
    resolved = outcome("--hostfile F", facts=replace(GPUS, hostfile=("a slots=8\nb slots=2", "")), **APART)
    assert resolved.config["rollout_num_gpus"] == 8
    told = problems("--hosts a,b", facts=GPUS, **APART)["--rollout-num-gpus"]
    assert "not known before the nodes join" in told
    told = problems(f"{flags} --rollout-num-gpus 7", facts=GPUS, **APART)["--actor-num-gpus-per-node"]
    assert "need 9 GPUs, 2 machines offer 8" in told
    assert config("--hosts a --device cuda --num-gpus-per-node 4", facts=FACTS)["device"] == "cuda"


def test_slots_of_a_cpu_run_are_the_nodes_own_unless_given():
    assert config("--hosts a,b")["cpu_slots"] == 0
    assert config("--hosts a,b --num-gpus-per-node 1")["cpu_slots"] == 1
