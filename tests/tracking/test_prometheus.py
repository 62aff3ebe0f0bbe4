"""Prometheus, scraped over HTTP."""

import socket
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.fake_trackers import point, run_info

from miles.tracking import prometheus_tracker
from miles.tracking.prometheus_tracker import PrometheusTracker, plain_name
from miles.tracking.tracker import Outcome

SETTINGS = {"prometheus_address": "127.0.0.1", "prometheus_port": 0, "prometheus_run_name": None}


@pytest.fixture
def served():
    trackers = []

    def start(**settings):
        tracker = PrometheusTracker()
        told = tracker.begin(run_info(settings={**SETTINGS, **settings}), {}).told
        trackers.append(tracker)
        return tracker, told.removeprefix("Prometheus: ")

    yield start
    for tracker in trackers:
        tracker.finish(Outcome("finished"))


def scraped(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    return {
        sample.name: (sample.value, sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_newest_values_with_the_run_as_label(served):
    tracker, url = served()
    tracker.log(point(0, rollout__response_len__mean=8.0))
    tracker.log(point(1, **{"rollout__response_len__mean": 9.0, "passrate__pass@4": 0.5}))
    found = scraped(url)
    assert found["miles_rollout_response_len_mean"] == (9.0, {"run": "my-run"})
    assert found["miles_passrate_pass_at_4"][0] == 0.5
    assert found["miles_rollout_step"][0] == 1
    assert found["miles_run_info"] == (1.0, {"run": "my-run", "run_id": "run-1"})
    assert found["miles_last_record_timestamp_seconds"][0] == 1e9 + 1


def test_only_this_machine_is_listened_to_unless_said_otherwise(served):
    tracker, url = served(prometheus_run_name="named")
    assert url.startswith("http://127.0.0.1:")
    assert tracker._server.server_address[0] == "127.0.0.1"
    assert scraped(url)["miles_run_info"][1]["run"] == "named"
    wide, _ = served(prometheus_address="0.0.0.0")
    assert wide._server.server_address[0] == "0.0.0.0"


def test_names_that_would_be_the_same_stay_apart_and_there_is_an_end_to_them(served, monkeypatch):
    tracker, url = served()
    tracker.log(point(0, **{"eval/a-b": 1.0, "eval/a/b": 2.0}))
    values = [value for name, (value, _) in scraped(url).items() if name.startswith("miles_eval_a_b")]
    assert sorted(values) == [1.0, 2.0]
    tracker.log(point(1, **{f"user/{n}": 1.0 for n in range(prometheus_tracker.MAX_SERIES + 50)}))
    assert len(scraped(url)) <= prometheus_tracker.MAX_SERIES + 1


def test_a_port_that_is_taken_is_an_error_of_beginning(served):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        served(prometheus_port=taken.getsockname()[1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rollout/zero_std/count_0.0", "miles_rollout_zero_std_count_0_0"),
        ("eval/größe-x", "miles_eval_gr_e_x"),
        ("train/lr-pg_0", "miles_train_lr_pg_0"),
    ],
)
def test_names(name, expected):
    assert plain_name(name) == expected
