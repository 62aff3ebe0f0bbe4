"""Flags of the installed SGLang and sglang-router: read once per version, then from the cache."""

import argparse
import importlib.metadata
import json

import pytest

from miles.flags.entry import resolve_argv, table_for
from miles.flags.parse import parse
from miles.flags.passthrough import cache_directory, router_flags, sglang_flags
from miles.flags.read_parser import row
from miles.flags.retired import with_todays_names
from miles.flags.table import table

ROWS = [
    {"names": ["--context-length"], "dest": "context_length", "kind": "count"},
    {"names": ["--tp-size", "--tensor-parallel-size"], "dest": "tp_size", "kind": "int", "default": 1},
    {"names": ["--ep-size", "--ep"], "dest": "ep_size", "kind": "int", "default": 1},
    {"names": ["--mem-fraction-static"], "dest": "mem_fraction_static", "kind": "float"},
    {"names": ["--enable-metrics"], "dest": "enable_metrics", "kind": "switch", "default": False},
    {"names": ["--moe-a2a-backend"], "dest": "moe_a2a_backend", "kind": "str", "choices": ["none", "deepep"]},
    {"names": ["--cuda-graph-backend-prefill"], "dest": "cuda_graph_backend_prefill", "kind": "str"},
    {"names": ["--model-path", "--model"], "dest": "model_path", "kind": "str"},
    {"names": ["--api-key"], "dest": "api_key", "kind": "str"},
    {"names": ["--admin-api-key"], "dest": "admin_api_key", "kind": "str"},
    {"names": ["--port"], "dest": "port", "kind": "int", "default": 30000},
    {"names": ["--router-policy"], "dest": "router_policy", "kind": "str"},
]


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache in which SGLang has these flags."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cache_directory() / f"sglang-{importlib.metadata.version('sglang')}-1.json"
    path.parent.mkdir(parents=True)
    empty = {"default": None, "choices": [], "nargs": None, "help": "h"}
    path.write_text(json.dumps([{**empty, **row_} for row_ in ROWS]))
    return path


def typed(*words):
    parsed = parse(words, table().extended(sglang_flags()))
    return parsed.typed, {problem.flag: problem.what for problem in parsed.problems}


def test_values_have_the_kinds_of_the_packages_parser(cached):
    words = ["--sglang-context-length", "32Ki", "--sglang-mem-fraction-static", "0.8", "--sglang-enable-metrics"]
    assert typed(*words) == (
        {"sglang_context_length": 32768, "sglang_mem_fraction_static": 0.8, "sglang_enable_metrics": True},
        {},
    )


def test_long_aliases_have_one_dest(cached):
    assert typed("--sglang-tensor-parallel-size", "2")[0] == {"sglang_tp_size": 2}


def test_what_the_run_decides_is_refused(cached):
    values, told = typed("--sglang-model-path", "x", "--sglang-port", "1")
    assert values == {}
    assert "--hf-checkpoint" in told["--sglang-model-path"]
    assert "leased" in told["--sglang-port"]


def test_keys_on_a_command_line_are_refused(cached):
    keys = ("--sglang-api-key", "--sglang-admin-api-key")
    values, told = typed(*(word for key in keys for word in (key, "secret")))
    assert values == {}
    assert all("a key of its own" in told[key] for key in keys)
    parsed = parse(["--router-api-key", "secret"], table().extended(router_flags()))
    assert parsed.typed == {}
    assert "a key of its own" in parsed.problems[0].what


def test_an_unknown_one_names_the_nearest(cached):
    parsed = parse(["--sglang-context-lenght", "1"], table().extended(sglang_flags()))
    assert parsed.problems[0].allowed == "--sglang-context-length"


def test_flags_of_ours_keep_their_names(cached):
    assert table().extended(sglang_flags()).by_name["--sglang-router-policy"].source == "reference"


def test_defaults_of_packages_are_theirs(cached):
    assert not [dest for dest in table().extended(sglang_flags()).defaults() if dest == "sglang_tp_size"]


def test_packages_are_asked_only_for_flags_that_are_not_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert table_for(["--sglang-router-ip", "h", "--sglang-server-concurrency", "4"]) is table()
    assert list(tmp_path.iterdir()) == []


def test_a_command_line_with_them_resolves_to_what_was_typed_only(cached):
    resolved = resolve_argv(["--sglang-context-length", "512", "--sglang-enable-overlap-schedule"])
    found = {key: value for key, value in resolved.config.items() if key.startswith("sglang_")}
    assert found == {
        "sglang_context_length": 512,
        "sglang_tp_size": 1,
        "sglang_router_ip": None,
        "sglang_router_port": None,
        "sglang_server_concurrency": 512,
        "sglang_router_policy": None,
        "sglang_router_request_timeout_secs": 14400,
        "sglang_config": None,
        "sglang_lora_use_virtual_experts": True,
    }
    assert "--sglang-enable-overlap-schedule is the default today: left out" in resolved.notices


@pytest.mark.parametrize(
    ("words", "today"),
    [
        (["--sglang-enable-deepep"], ["--sglang-moe-a2a-backend", "deepep"]),
        (["--sglang-enable-overlap-schedule", "--colocate"], ["--colocate"]),
        (["--sglang-disable-piecewise-cuda-graph"], ["--sglang-cuda-graph-backend-prefill", "disabled"]),
        (
            ["--rollout-num-gpus-per-engine", "4", "--sglang-enable-ep-moe"],
            ["--rollout-num-gpus-per-engine", "4", "--sglang-ep-size", "4"],
        ),
        (
            ["--rollout-num-gpus-per-engine=2", "--sglang-enable-ep-moe"],
            ["--rollout-num-gpus-per-engine=2", "--sglang-ep-size", "2"],
        ),
        (["--sglang-enable-ep-moe"], ["--sglang-ep-size", "1"]),
        (["--lr", "1"], ["--lr", "1"]),
    ],
)
def test_retired_spellings(words, today):
    found, notices = with_todays_names(words, [])
    assert found == today
    assert len(notices) == (words != today)


def test_a_spelling_that_the_installed_version_knows_stays():
    assert with_todays_names(["--sglang-enable-deepep"], ["--sglang-enable-deepep"]) == (["--sglang-enable-deepep"], [])


def test_an_engines_size_has_one_source(cached):
    resolved = resolve_argv(["--sglang-tp-size", "2", "--rollout-num-gpus-per-engine", "1"])
    assert "--sglang-tp-size" in [problem.flag for problem in resolved.problems]


def test_rows_of_every_kind_of_action():
    parser = argparse.ArgumentParser(add_help=False)
    actions = [
        parser.add_argument("--a", type=int, default=3, choices=[3, 4], help="x\n  y"),
        parser.add_argument("--b", action=argparse.BooleanOptionalAction),
        parser.add_argument("--c", action="store_true"),
        parser.add_argument("--d", action="store_false"),
        parser.add_argument("--e", type=json.loads, nargs="+", default=object),
    ]
    rows = [row(action) for action in actions]
    assert [found["kind"] for found in rows] == ["int", "tri", "switch", "off", "json"]
    assert rows[0]["choices"] == [3, 4]
    assert rows[0]["help"] == "x y"
    assert rows[1]["names"] == ["--b"]
    assert rows[4]["nargs"] == "+"
    json.dumps(rows)


def test_the_routers_own_flags_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = {flag.name: flag for flag in router_flags()}
    assert {"round_robin", "cache_aware"} <= set(flags["--router-policy"].choices)
    assert flags["--router-cache-threshold"].kind == "float"
    assert "--router-host" not in flags
    kept = next(cache_directory().iterdir())
    kept.write_text(json.dumps([]))
    assert router_flags() == ()


def test_a_damaged_cache_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache_directory().mkdir(parents=True)
    version = importlib.metadata.version("sglang-router")
    (cache_directory() / f"router-{version}-1.json").write_text("{")
    assert len(router_flags()) > 50


@pytest.mark.full
def test_sglangs_own_flags_are_read(tmp_path, monkeypatch):
    """The installed version, in the process and with the stand-ins that an engine on this machine has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = {flag.name: flag for flag in sglang_flags()}
    assert len(flags) > 450
    assert flags["--sglang-mem-fraction-static"].kind == "float"
    assert flags["--sglang-context-length"].kind == "count"
    assert flags["--sglang-model-path"].status == "refused"
    assert {"--sglang-log-level", "--sglang-enable-dp-attention"} <= set(flags)
    todays = [*with_todays_names(["--sglang-enable-deepep", "--sglang-enforce-piecewise-cuda-graph"], [])[0]]
    parsed = parse(todays, table().extended(flags.values()))
    assert parsed.problems == []
    assert sglang_flags() == tuple(flags.values())
