"""Errors from afar: of the original type, with the first traceback, told in four parts."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_agents.errors import ConfigError, MilesError, PeerFault, UserCodeError
from miles_agents.rpc.errors import CallCancelled, DeadlineExceeded, NotAnEndpoint, WorkerDied
from miles_agents.timings import InvalidTimings, Timings
from miles_agents.wire.codec import decode, encode, register_type
from miles_agents.wire.remote_error import Origin, RemoteError, describe_exception, rebuild_exception

ORIGIN = Origin("trainer[2]", "host-a", 412, "train", 1.5, 7)
OTHER = Origin("manager[0]", "host-b", 9, "generate", 3.0, 8)


class NeedsArguments(ValueError):
    def __init__(self, rank, *, reason):
        super().__init__(f"rank {rank}: {reason}")
        self.rank = rank
        self.reason = reason


class Slotted(Exception):
    __slots__ = ("extra",)


class CustomNew(Exception):
    def __new__(cls, a, b):
        return super().__new__(cls, a, b)


class PropertyInTheWay(Exception):
    @property
    def what(self):
        return "mine"


class Meta(type):
    pass


class WithMeta(Exception, metaclass=Meta):
    pass


class Counting(Exception):
    made = 0

    def __init__(self, *args):
        type(self).made += 1
        super().__init__(*args)

    def __init_subclass__(cls, **kwargs):
        Counting.made += 100


def raised(error: BaseException) -> Any:
    try:
        raise error
    except BaseException as exc:
        return exc


def over_the_wire(error: BaseException, origin: Origin | None = ORIGIN, log: tuple[str, ...] = ()) -> Any:
    data = describe_exception(error, origin, list(log))
    body, buffers = encode(data)
    assert buffers == []
    return rebuild_exception(decode(body, buffers, libraries="opaque"))


def test_it_is_both_a_remote_error_and_the_original_type():
    got = over_the_wire(raised(ValueError("bad shape", 3)))
    for kind in (ValueError, RemoteError, UserCodeError, MilesError):
        with pytest.raises(kind):
            raise got
    assert got.args == ("bad shape", 3)
    assert got.origin == ORIGIN
    assert got.remote_type == "builtins.ValueError"
    assert type(got) is type(over_the_wire(raised(ValueError("another"))))


def test_the_text_has_four_parts_with_the_users_traceback_first():
    got = over_the_wire(raised(ValueError("bad shape")), log=("step 1", "step 2"))
    lines = str(got).splitlines()
    assert lines[0] == "ValueError in trainer[2].train on host-a, pid 412: bad shape"
    assert lines[1] == "  evidence: Traceback (most recent call last):"
    assert lines[-6:-2] == ["    ValueError: bad shape", "    last log lines:", "    step 1", "    step 2"]
    assert lines[-2] == "  what to do: Fix the code shown at the bottom of the traceback."
    assert lines[-1] == "  code: E-USER-001 (docs/errors.md)"
    assert "raise error" in str(got)
    assert got.log_tail == ["step 1", "step 2"]


def test_a_type_of_the_users_is_found_without_calling_its_init():
    got = over_the_wire(raised(NeedsArguments(3, reason="nan")))
    assert isinstance(got, NeedsArguments)
    assert (got.rank, got.reason, got.args) == (3, "nan", ("rank 3: nan",))
    Counting.made = 0
    got = over_the_wire(raised(Counting("x")))
    assert isinstance(got, Counting)
    assert Counting.made == 1


def test_a_type_with_its_own_new_is_made_without_it():
    got = over_the_wire(raised(CustomNew(1, 2)))
    assert isinstance(got, CustomNew)
    assert got.args == (1, 2)


@pytest.mark.parametrize(
    "error",
    [
        Slotted("s"),
        PropertyInTheWay("p"),
        WithMeta("m"),
        ExceptionGroup("g", [ValueError(1)]),
        type("Gone", (Exception,), {})(),
    ],
    ids=["slots", "property", "metaclass", "group", "not found"],
)
def test_types_that_cannot_be_made_arrive_as_plain_remote_errors(error):
    got = over_the_wire(raised(error))
    assert type(got) is RemoteError
    assert got.remote_type == f"{type(error).__module__}.{type(error).__qualname__}"
    assert type(error).__name__ in str(got)


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), GeneratorExit()], ids=repr
)
def test_types_that_are_no_exceptions_arrive_as_plain_remote_errors(error):
    assert type(over_the_wire(raised(error))) is RemoteError


def test_what_builtin_errors_keep_apart_arrives():
    got = over_the_wire(raised(OSError(2, "no such file", "a.txt")))
    assert isinstance(got, FileNotFoundError)
    assert (got.errno, got.strerror, got.filename, got.args) == (2, "no such file", "a.txt", (2, "no such file"))
    got = over_the_wire(raised(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid")))
    assert isinstance(got, UnicodeDecodeError)
    assert (got.encoding, got.object, got.start, got.end, got.reason) == ("utf-8", b"\xff", 0, 1, "invalid")
    got = over_the_wire(raised(ImportError("no", name="x", path="y")))
    assert (got.name, got.path, got.msg) == ("x", "y", "no")
    assert over_the_wire(StopIteration(5)).value == 5
    assert over_the_wire(KeyError("k")).args == ("k",)


def test_no_module_is_imported_for_a_type():
    sys.modules.pop("this", None)
    data = describe_exception(ValueError("x"), ORIGIN, [])
    got = rebuild_exception({**data, "module": "this", "qualname": "Error"})
    assert type(got) is RemoteError
    assert "this" not in sys.modules


def test_arguments_and_attributes_that_cannot_travel_are_left_out_or_told_as_text():
    error = ValueError("x", object, lambda: 0)
    error.kept = [1, (2,)]
    error.lost = lambda: 0
    error.huge = "x" * 100_000
    error.origin = "mine"
    got = over_the_wire(error)
    assert got.args[0] == "x"
    assert got.args[1] == "<class 'object'>"
    assert "lambda" in got.args[2]
    assert got.kept == [1, (2,)]
    assert not hasattr(got, "lost")
    assert not hasattr(got, "huge")
    assert got.origin == ORIGIN


def test_an_argument_of_a_type_unknown_at_the_receiver_is_told_as_text():
    import dataclasses

    from miles_agents.wire import codec_registry

    @dataclasses.dataclass
    class Here:
        a: int

    register_type(Here, name="test.remote.here")
    data = describe_exception(ValueError(Here(1)), ORIGIN, [])
    forged = [[data["args"][0][0].replace(b"test.remote.here", b"test.remote.gone"), data["args"][0][1]]]
    assert codec_registry.is_registered("test.remote.here")
    assert rebuild_exception({**data, "args": forged}).args[0].endswith("Here(a=1)")


def test_descriptions_stay_small():
    error = ValueError("m" * 1_000_000, *["a" * 30_000] * 50)
    for i in range(100):
        setattr(error, f"a{i}", "b" * 10_000)
    body, _ = encode(describe_exception(error, ORIGIN, ["l" * 100_000] * 1000))
    assert len(body) < 400_000


def test_chained_errors_and_notes_are_in_the_traceback():
    def inner():
        raise KeyError("deep")

    try:
        try:
            inner()
        except KeyError as exc:
            raise ValueError("outer") from exc
    except ValueError as exc:
        exc.add_note("look at the batch")
        error = exc
    got = over_the_wire(error)
    text = got.remote_traceback
    assert text.index("KeyError: 'deep'") < text.index("direct cause") < text.index("ValueError: outer")
    assert text.rstrip().endswith("look at the batch")
    assert got.__notes__ == ["look at the batch"]
    assert got.description["causes"] == [{"type": "builtins.KeyError", "message": "'deep'"}]


def test_the_runtimes_frames_above_user_code_are_left_out():
    def user_callback(_):
        raise RuntimeError("from user code")

    from miles_agents.wire import codec_walk

    with pytest.raises(RuntimeError) as caught:
        _through_the_runtime(codec_walk, user_callback)
    frames = caught.value.__traceback__.tb_next.tb_next
    assert frames.tb_frame.f_code.co_filename == codec_walk.__file__
    caught.value.__traceback__ = frames  # as a worker sees it: its own frames first
    text = over_the_wire(caught.value).remote_traceback
    assert "user_callback" in text
    assert "codec_walk.py" not in text


def _through_the_runtime(module: Any, callback: Any) -> None:
    call = compile("def call(f): f(1)", module.__file__, "exec")
    scope: dict[str, Any] = {}
    exec(call, scope)
    scope["call"](callback)


def test_an_error_of_the_runtime_alone_keeps_its_frames():
    with pytest.raises(InvalidTimings) as caught:
        Timings(beat_s=99)
    caught.value.__traceback__ = caught.value.__traceback__.tb_next.tb_next
    assert "timings.py" in over_the_wire(caught.value).remote_traceback


def test_errors_of_the_runtime_look_the_same_from_afar():
    with pytest.raises(InvalidTimings) as caught:
        Timings(beat_s=99)
    caught.value.fields["rank"] = (1, 2)
    got = over_the_wire(caught.value)
    assert type(got) is InvalidTimings
    assert str(got) == str(caught.value)
    assert got.fields == {"rank": (1, 2)}
    assert got.origin == ORIGIN
    again = over_the_wire(got, OTHER)
    assert again.origin == ORIGIN
    assert again.remote_traceback == got.remote_traceback


def test_an_error_of_the_runtime_whose_class_is_not_here_keeps_kind_and_code():
    class Elsewhere(PeerFault):
        code = "E-TEST-999"

    got = over_the_wire(raised(Elsewhere("gone", evidence="e", advice="a")))
    assert type(got) is PeerFault
    assert got.code == "E-TEST-999"
    assert str(got) == str(Elsewhere("gone", evidence="e", advice="a"))
    assert PeerFault.code == "E-PEER-000"


def test_two_hops_keep_the_first_origin_and_traceback():
    first = over_the_wire(raised(ValueError("deep")), ORIGIN, ("log a",))
    second = over_the_wire(raised(first), OTHER, ("log b",))
    assert isinstance(second, ValueError)
    assert second.origin == ORIGIN
    assert second.log_tail == ["log a"]
    assert str(second) == str(first)


def test_exceptions_travel_as_values_too():
    got = decode(*encode({"errors": [raised(ValueError("a", 1)), ConfigError("c", advice="d")]}), libraries="opaque")
    assert isinstance(got["errors"][0], ValueError)
    assert got["errors"][0].args == ("a", 1)
    assert got["errors"][0].what == "ValueError: ('a', 1)"
    assert got["errors"][0].origin is None
    assert type(got["errors"][1]) is ConfigError


def test_exceptions_that_hold_each_other_can_be_described():
    error = ValueError()
    error.args = (error, error)
    error.me = [error]
    error.__cause__ = error
    got = over_the_wire(error)
    assert isinstance(got.args[0], ValueError)


def test_errors_whose_str_and_repr_fail_can_be_described():
    class Broken(Exception):
        def __str__(self):
            raise RuntimeError("no")

        __repr__ = __str__

    got = over_the_wire(raised(Broken(1)))
    assert "Broken" in str(got)


def test_an_error_deep_in_a_recursion_can_be_described():
    def dive():
        return dive() + 1

    with pytest.raises(RecursionError) as caught:
        dive()
    assert isinstance(over_the_wire(caught.value), RecursionError)


anything = st.recursive(
    st.none()
    | st.integers()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.sampled_from(["builtins", "OSError", "errno"]),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("errno"), v, max_size=3),
    max_leaves=6,
)
FIELDS = list(describe_exception(MilesError("x"), ORIGIN, []))


@settings(deadline=None, max_examples=100)
@given(
    st.dictionaries(st.sampled_from(FIELDS), anything),
    st.sampled_from(["OSError", "KeyError", "type", "MilesError", "?"]),
)
def test_forged_descriptions_give_an_error_and_do_not_raise(data, name):
    for module in ("builtins", "miles_agents.errors"):
        got = rebuild_exception({"module": module, "qualname": name, **data})
        assert isinstance(got, MilesError)
        assert str(got)
        assert describe_exception(got, None, [])


def test_every_error_of_ours_arrives_as_itself():
    """Also those that are builtin errors too, such as a deadline that is a TimeoutError."""
    for cls in (DeadlineExceeded, NotAnEndpoint, WorkerDied, CallCancelled):
        error = cls("what", evidence="why", advice="do", may_have_run=True)
        rebuilt = rebuild_exception(describe_exception(error, None, []))
        assert type(rebuilt) is cls
        assert (str(rebuilt), rebuilt.fields) == (str(error), {"may_have_run": True})
    assert isinstance(rebuild_exception(describe_exception(DeadlineExceeded("late"), None, [])), TimeoutError)
