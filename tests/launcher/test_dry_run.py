"""--dry-run of clusters: nodes, placement and how each agent is started, without asking any machine."""

import io
import json
import os
from dataclasses import replace

import pytest
from rich.console import Console
from support.flag_cases import FACTS, GPUS, config
from support.procs import no_descriptors

from miles.flags.slurm_facts import SlurmFacts
from miles_launcher.dry_run import nodes_of, show_plan

SPREAD = "--actor-num-nodes 2 --actor-num-gpus-per-node 2 --rollout-num-gpus 2 --train-backend fsdp"


def shown(found):
    out = io.StringIO()
    code = show_plan(found, Console(file=out, width=400, soft_wrap=True))
    return code, out.getvalue()


def line_of(text, *words):
    return next(line for line in text.splitlines() if all(word in line for word in words))


def test_ranks_and_engines_are_placed_on_hosts_that_are_not_asked():
    code, text = shown(config(f"--hosts alice@h[1-3]:2222 --num-gpus-per-node 4 --device cpu {SPREAD}"))
    assert code == 0, text
    assert "nodes, by --launcher ssh" in text
    assert "2 of trainer, 2 of engines (head: rollout manager, router)" in line_of(text, "h1", "trainer", "head")
    assert "2 of trainer" in line_of(text, "h2", "2 of")
    assert "nothing" in line_of(text, "h3", "nothing")
    assert "h2" in line_of(text, "trainer rank 2")
    assert "-l alice -p 2222 -- h3" in text
    assert "--node h3" in text
    assert "launch_engine ADDRESS PORTS" in text  # other nodes reach it, so not at loopback


def test_nodes_of_others_show_the_commands_that_join():
    code, text = shown(config(f"--launcher external --nodes 2 --num-gpus-per-node 4 --device cpu {SPREAD}"))
    assert code == 0, text
    assert "miles agent --controller tcp://ADDRESS:PORT --key-file" in text
    assert "/join/node-1.key" in text


def test_an_allocation_shows_its_srun(tmp_path):
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    facts = replace(FACTS, slurm=SlurmFacts("7", ("n1", "n2")))
    before = dict(os.environ)
    os.environ.update(SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n[1-2]", PATH=f"{tmp_path}:{before['PATH']}")
    try:
        code, text = shown(config(f"--num-gpus-per-node 4 --device cpu {SPREAD}", facts=facts))
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert code == 0, text
    assert "srun --jobid=7 --nodelist=n2 --nodes=1 --ntasks=1" in text


def test_gpus_that_nobody_named_are_assumed_and_that_is_said():
    flags = f"--hosts a,b --device cuda {SPREAD}"
    code, text = shown(config(flags, facts=GPUS))
    assert code == 0, text
    assert "how many GPUs a, b have is not known before they join; 8 are assumed" in text
    assert "is not known" not in shown(config(f"{flags} --num-gpus-per-node 4", facts=GPUS))[1]
    slots = replace(GPUS, hostfile=("a slots=2\nb slots=6\n", ""))
    nodes = nodes_of(config(f"--hostfile F --device cuda {SPREAD}", facts=slots))
    assert [len(node.gpus) for node in nodes.values()] == [2, 6]


def test_what_does_not_fit_is_told_with_exit_code_2():
    crowded = config(f"--hosts a,b --num-gpus-per-node 4 --device cuda {SPREAD}", facts=GPUS)
    crowded["machines"] = crowded["machines"][:1]
    code, text = shown(crowded)
    assert code == 2
    assert "E-PLACE-001" in text


@pytest.mark.parametrize("launcher", ["ssh", "external"])
def test_nothing_is_started_and_no_machine_is_asked(launcher):
    names = config(f"--launcher {launcher} --hosts a,b --num-gpus-per-node 4 --device cpu {SPREAD}")
    assert json.dumps(names["machines"])
    shown(names)  # what it imports, it has imported
    with no_descriptors():  # no process and no connection is possible
        assert shown(names)[0] == 0
