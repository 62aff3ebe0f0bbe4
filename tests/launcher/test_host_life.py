"""One remote host: whatever its ssh, its reaper and the controller do, in whatever order."""

from hypothesis import given, settings
from hypothesis import strategies as st

from miles_launcher import host_life as life
from miles_launcher.host_life import HostLife, Phase, step

EVENTS = st.sampled_from(
    [
        life.StartAsked(), life.WantsCode("/d"), life.CodeCopied(), life.CodeCopied(well=False), life.SaidReady(7),
        life.SaidFailed(), life.NodeJoined(), life.SaidClean(), life.SshEnded(), life.GivenUp(),
    ]
)  # fmt: skip


def run(*events, host=None):
    """The state after these, and all effects."""
    host, effects = host or HostLife(), []
    for event in events:
        host, more = step(host, event)
        effects += more
    return host, effects


INTO_RUN = (life.StartAsked(), life.SaidReady(7), life.NodeJoined())


def test_the_way_into_the_run_and_out_of_it():
    host, effects = run(*INTO_RUN)
    assert (host.phase, effects) == (Phase.JOINED, [life.Spawn(), life.SendKey(), life.TellJoined()])
    host, effects = run(life.SaidClean(), life.SshEnded(), host=host)
    assert (host.phase, effects) == (Phase.GONE, [life.ReportClean(7)])


def test_the_key_is_sent_after_the_code_only():
    host, effects = run(life.StartAsked(), life.WantsCode("/d"), life.SaidReady(7))
    assert host.phase is Phase.COPYING
    assert effects == [life.Spawn(), life.CopyCode("/d")]
    host, effects = run(life.CodeCopied(), life.SaidReady(7), host=host)
    assert effects == [life.SayGo(), life.SendKey()]


def test_code_that_cannot_be_copied_is_the_end():
    host, effects = run(life.StartAsked(), life.WantsCode("/d"), life.CodeCopied(well=False), life.SaidReady(7))
    assert host.phase is Phase.FAILED
    assert effects[-1] == life.Failed("copy")


def test_the_end_of_ssh_ends_no_host_that_is_in_the_run():
    host, effects = run(*INTO_RUN, life.SshEnded())
    assert host.phase is Phase.LINK_LOST
    assert effects[-1] == life.TellLinkLost()
    assert run(life.SshEnded(), host=host) == (host, [])
    assert run(life.GivenUp(), host=host)[0].phase is Phase.GONE


def test_the_end_of_ssh_fails_a_host_that_is_not_in_the_run_yet():
    for before in range(1, len(INTO_RUN)):
        host, effects = run(*INTO_RUN[:before], life.SshEnded())
        assert host.phase is Phase.FAILED
        assert effects[-1] == life.Failed("ssh")


@settings(max_examples=300)
@given(st.lists(EVENTS, max_size=14))
def test_what_holds_in_every_order_of_events(events):
    host, told = HostLife(), []
    for event in events:
        before = host
        host, effects = step(host, event)
        if before.phase in life.ENDS:
            assert (host, effects) == (before, ())
        if before.phase in life.IN_RUN and isinstance(event, life.SshEnded) and not before.clean:
            assert host.phase is Phase.LINK_LOST
        told += effects
    kinds = [type(effect) for effect in told]
    assert sum(kind in (life.TellJoined, life.Failed) for kind in kinds) <= 1
    for once in (life.Spawn, life.SendKey, life.ReportClean, life.TellLinkLost):
        assert kinds.count(once) <= 1
    assert (life.TellJoined in kinds) == (host.phase in {*life.IN_RUN, Phase.GONE})
    assert (life.Failed in kinds) == (host.phase is Phase.FAILED)
    if life.ReportClean in kinds:
        assert any(isinstance(event, life.SaidClean) for event in events)
        assert kinds.index(life.SendKey) < kinds.index(life.ReportClean)
    if life.TellJoined in kinds:
        assert kinds.index(life.SendKey) < kinds.index(life.TellJoined)
