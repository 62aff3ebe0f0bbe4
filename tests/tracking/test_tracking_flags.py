"""Flags of trackers: what they need is there before anything starts, and what they name reaches the trackers."""

import socket
from dataclasses import replace

import pytest
from support.flag_cases import FACTS, config, outcome, problems

from miles.flags.parse import parse
from miles.flags.table import table
from miles.flags.tracking_facts import TrackingFacts, look_at_tracking
from miles.tracking.trackers import KINDS, chosen, is_installed, missing_packages, settings_of


def with_tracking(**found):
    return replace(FACTS, tracking=TrackingFacts(**found))


def notices(flags, **found):
    return outcome(flags, facts=with_tracking(**found)).notices


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_package_is_told_with_the_command_that_installs_it(name):
    flag = KINDS[name].flag
    text = problems(flag, facts=with_tracking(missing={name: ("a", "b")}))[flag]
    assert "a and b are not installed" in text
    assert f"pip install 'miles[{name}]'" in text
    assert flag not in problems(flag)


def test_a_directory_turns_tensorboard_on():
    assert chosen(config("--tensorboard-dir t")) == ["tensorboard"]
    assert config("--tensorboard-dir t")["tensorboard_dir"] == "/home/me/t"
    missing = with_tracking(missing={"tensorboard": ("tensorboard",)})
    assert "not installed" in problems("--tensorboard-dir t", facts=missing)["--tensorboard-dir"]
    # The profiler's traces need no TensorBoard.
    assert not config("--tensorboard-dir t --use-pytorch-profiler", facts=missing)["use_tensorboard"]


def test_online_needs_a_key_and_offline_does_not():
    keyless = {"has_wandb_key": False}
    assert "no API key is known" in problems("--use-wandb", facts=with_tracking(**keyless))["--use-wandb"]
    assert problems("--use-wandb --wandb-mode offline", facts=with_tracking(**keyless)) == {}
    assert problems("--use-wandb", facts=with_tracking(**keyless, variables={"WANDB_MODE": "offline"})) == {}
    assert chosen(config("--use-wandb --wandb-mode disabled")) == []
    assert any("--wandb-key: the key is kept out" in notice for notice in notices("--use-wandb --wandb-key k"))


@pytest.mark.parametrize("uri", ["mlruns", "/a/mlruns", "file:///a/mlruns"])
def test_mlflow_takes_no_directory_of_files(uri):
    assert "eval/x and eval/x/y" in problems(f"--use-mlflow --mlflow-tracking-uri {uri}")["--mlflow-tracking-uri"]
    by_variable = with_tracking(variables={"MLFLOW_TRACKING_URI": uri})
    assert "--use-mlflow" in problems("--use-mlflow", facts=by_variable)
    assert problems("--use-mlflow --mlflow-tracking-uri sqlite:////a.db", facts=by_variable) == {}


def test_the_port_of_prometheus():
    variable = {"variables": {"PROMETHEUS_PORT": "9999"}}
    assert config("--use-prometheus")["prometheus_port"] == 9090
    assert config("--use-prometheus", facts=with_tracking(**variable))["prometheus_port"] == 9999
    typed = config("--use-prometheus --prometheus-port 1234", facts=with_tracking(**variable))
    assert typed["prometheus_port"] == 1234
    wrong = with_tracking(variables={"PROMETHEUS_PORT": "http"})
    assert "no number" in problems("--use-prometheus", facts=wrong)["--prometheus-port"]
    assert "no such port" in problems("--use-prometheus --prometheus-port 70000")["--prometheus-port"]
    busy = with_tracking(port_error="127.0.0.1 port 9090: Address already in use")
    assert "cannot be listened on" in problems("--use-prometheus", facts=busy)["--prometheus-port"]
    elsewhere = with_tracking(port_error="1.2.3.4 port 9090: Cannot assign requested address")
    assert "--prometheus-address" in problems("--use-prometheus --prometheus-address 1.2.3.4", facts=elsewhere)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "10.0.0.1"])
def test_a_door_to_others_is_told(address):
    assert any("whoever reaches it" in n for n in notices(f"--use-prometheus --prometheus-address {address}"))
    assert not any("whoever reaches it" in notice for notice in notices("--use-prometheus"))


def test_a_threshold_needs_its_metric_and_evaluations():
    assert "--ci-metric-checker-key" in problems("--ci-metric-checker-key eval/a")
    assert "--ci-metric-checker-threshold" in problems("--ci-metric-checker-threshold 0.5")
    both = "--ci-metric-checker-key eval/a --ci-metric-checker-threshold 0.5"
    assert "nothing is evaluated" in problems(both)["--ci-metric-checker-key"]


def test_older_spellings():
    typed = parse(["--wandb-exp-name", "n", "--wandb-save-dir", "d", "--wandb-entity", "t"], table()).typed
    assert typed == {"wandb_run_name": "n", "wandb_dir": "d", "wandb_team": "t"}


def test_every_flag_of_a_tracker_reaches_it():
    words = (
        "--use-wandb --wandb-project p --wandb-group g --wandb-mode offline --wandb-dir d --wandb-host h "
        "--wandb-team t "
        "--wandb-run-id i --wandb-run-name n --disable-wandb-random-suffix --use-mlflow --mlflow-tracking-uri http://u "
        "--mlflow-experiment-name e --mlflow-run-name m --mlflow-run-id j --use-tensorboard --tensorboard-dir b "
        "--tb-project-name q --tb-experiment-name x --use-prometheus --prometheus-port 1 --prometheus-address ::1 "
        "--prometheus-run-name r"
    )
    assert settings_of(config(words)) == {
        "wandb_project": "p", "wandb_group": "g", "wandb_mode": "offline", "wandb_dir": "/home/me/d", "wandb_host": "h",
        "wandb_team": "t", "wandb_run_id": "i", "wandb_run_name": "n", "wandb_random_suffix": False,
        "mlflow_tracking_uri": "http://u", "mlflow_experiment_name": "e", "mlflow_run_name": "m", "mlflow_run_id": "j",
        "tensorboard_dir": "/home/me/b", "tb_project_name": "q", "tb_experiment_name": "x", "prometheus_port": 1,
        "prometheus_address": "::1", "prometheus_run_name": "r",
    }  # fmt: skip


# -- the machine ---------------------------------------------------------------------------------------------------


def test_packages_are_looked_for_without_importing_them(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_a_package").mkdir()
    assert not is_installed("half_a_package")  # as the directory that wandb writes to
    assert not is_installed("no_such_package")
    assert missing_packages("prometheus", {}, {}) == []
    assert missing_packages("mlflow", {}, {}) == []


def test_databases_need_more(monkeypatch):
    import miles.tracking.trackers as trackers

    monkeypatch.setitem(trackers.DATABASE_PACKAGES, "no_such_package", "sqlalchemy")
    assert missing_packages("mlflow", {}, {}) == ["sqlalchemy"]
    assert missing_packages("mlflow", {"mlflow_tracking_uri": "https://h"}, {}) == []
    assert missing_packages("mlflow", {}, {"MLFLOW_TRACKING_URI": "https://h"}) == []


def test_keys_are_looked_for_where_the_library_does(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    values = {"use_wandb": True}
    assert not look_at_tracking(values).has_wandb_key
    assert look_at_tracking({**values, "wandb_key": "k"}).has_wandb_key
    assert look_at_tracking({**values, "env": ["WANDB_API_KEY=k"]}).has_wandb_key
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k\n")
    assert look_at_tracking(values).has_wandb_key
    assert not look_at_tracking({**values, "wandb_host": "https://mine:8080"}).has_wandb_key
    (tmp_path / "netrc").write_text("machine\n")
    assert not look_at_tracking(values).has_wandb_key


def test_ports_are_tried(monkeypatch):
    monkeypatch.delenv("PROMETHEUS_PORT", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        values = {"use_prometheus": True, "prometheus_address": "127.0.0.1", "prometheus_port": taken.getsockname()[1]}
        assert "in use" in look_at_tracking(values).port_error
        assert look_at_tracking({**values, "prometheus_port": 0}).port_error == ""
        assert look_at_tracking({**values, "use_prometheus": False}).port_error == ""
        monkeypatch.setenv("PROMETHEUS_PORT", str(taken.getsockname()[1]))
        assert "in use" in look_at_tracking({**values, "prometheus_port": 9090}).port_error
    assert look_at_tracking({**values, "prometheus_address": "no.such.host.invalid"}).port_error
