"""A whole run on hosts that ssh reaches: the trainer on two of them, the engine on a third, code copied to all."""

import os

import pytest
from support.ssh_cluster import processes_of
from support.sshd import ssh_hosts
from support.training_runs import assert_trains, train

pytestmark = [pytest.mark.full, pytest.mark.long, pytest.mark.needs("ssh")]


def test_training_over_three_hosts_leaves_nothing_on_them(tmp_path):
    with ssh_hosts(tmp_path / "hosts", ["h1", "h2", "h3"]) as hosts:
        done = train(
            tmp_path, hosts="h[1-3]", ssh_config=hosts.config, sync_code=True, num_gpus_per_node=1, actor_num_nodes=2,
            num_rollout=3, save=tmp_path / "save", save_interval=3, check_weight_update_equal=True,
        )  # fmt: skip
        assert_trains(done, 3)
        logs = {
            node: sorted({name.partition(".")[0] for name in os.listdir(done.run_dir / "logs" / node)})
            for node in hosts.hosts
        }
        assert logs["h1"] == ["rollout-0", "router", "trainer-0", "zygote-0"]
        assert logs["h2"] == ["trainer-1", "zygote-0"]
        assert "engine-0" in logs["h3"]
        assert processes_of(hosts.folder) == []
        for host in hosts.hosts.values():
            assert list((host.home / ".cache/miles/code").iterdir()) == []
