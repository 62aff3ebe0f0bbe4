"""Membership: who is current, who is silent, and that each life ends once."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from miles_agents.node_info import NodeInfo
from miles_agents.timings import Timings
from miles_controller.membership import (
    STORY_LENGTH,
    AnswerBeat,
    Beat,
    Evidence,
    Goodbye,
    Hello,
    LinkDown,
    LinkUp,
    Membership,
    NodeDead,
    NodeGone,
    Recovered,
    Refuse,
    Suspect,
    Tick,
    Welcome,
)


def info(node):
    return NodeInfo(node, f"{node}.cluster", ("10.0.0.1",), (), 8, 4, 1 << 30, "3.12.3", "Linux")


def hello(node, session):
    return Hello(node, session, info(node))


def joined():
    nodes = Membership(["n0", "n1"], Timings())
    assert nodes.step(hello("n0", "a"), 0.0) == (Welcome("n0", "a", 1),)
    return nodes


def test_each_welcome_has_a_fresh_incarnation():
    nodes = joined()
    assert nodes.missing() == ("n1",)
    assert nodes.step(hello("n1", "b"), 1.0) == (Welcome("n1", "b", 2),)
    assert nodes.step(Goodbye("n0", 1), 2.0) == (NodeGone("n0", 1),)
    assert nodes.step(hello("n0", "c"), 3.0) == (Welcome("n0", "c", 3),)
    assert nodes.missing() == ()


def test_an_unknown_node_is_refused_with_the_nearest_name():
    (refuse,) = joined().step(hello("n00", "a"), 0.0)
    assert isinstance(refuse, Refuse)
    assert "did you mean 'n0'" in refuse.reason


def test_a_second_agent_of_a_node_that_is_heard_is_refused():
    (refuse,) = joined().step(hello("n0", "b"), 2.0)
    assert (refuse.session, "taken by an agent that was heard 2.0 s ago" in refuse.reason) == ("b", True)


def test_a_new_agent_waits_until_the_silent_one_is_dead():
    nodes = joined()
    nodes.step(LinkDown("n0"), 1.0)
    nodes.step(Tick(), 5.0)
    assert [type(effect) for effect in nodes.step(hello("n0", "b"), 6.0)] == [Refuse]
    assert [type(effect) for effect in nodes.step(Tick(), 20.0)] == [NodeDead]
    assert nodes.step(hello("n0", "b"), 20.5) == (Welcome("n0", "b", 2),)
    assert isinstance(nodes.step(Beat("n0", 1), 21.0)[0], Refuse)


def test_a_new_agent_joins_at_once_when_the_old_one_is_known_to_be_over():
    nodes = joined()
    (dead,) = nodes.step(Evidence("n0", 1, "its agent fenced itself"), 6.0)
    assert (dead.node, dead.incarnation) == ("n0", 1)
    assert nodes.step(hello("n0", "b"), 6.1) == (Welcome("n0", "b", 2),)


def test_the_same_session_says_hello_again_and_keeps_its_incarnation():
    nodes = joined()
    nodes.step(Tick(), 5.0)
    assert nodes.step(hello("n0", "a"), 6.0) == (Recovered("n0", 1), Welcome("n0", "a", 1))


def test_a_session_that_was_declared_dead_stays_so():
    nodes = joined()
    nodes.step(Evidence("n0", 1, "exit code 3"), 1.0)
    assert isinstance(nodes.step(hello("n0", "a"), 2.0)[0], Refuse)
    assert nodes.step(hello("n0", "b"), 3.0) == (Welcome("n0", "b", 2),)


def test_silence_is_suspected_then_deadly_and_told_once():
    nodes = joined()
    assert nodes.next_tick() == 5.0
    assert nodes.step(Tick(), 4.9) == ()
    assert nodes.step(Tick(), 5.0) == (Suspect("n0", 1, 5.0),)
    assert nodes.next_tick() == 20.0
    assert nodes.step(Tick(), 19.9) == ()
    assert nodes.step(Tick(), 20.0) == (NodeDead("n0", 1, "silent for 20.0 s"),)
    assert nodes.step(Tick(), 99.0) == nodes.step(Evidence("n0", 1, "late"), 99.0) == ()
    assert nodes.next_tick() is None


def test_a_beat_is_answered_and_recovers():
    nodes = joined()
    nodes.step(Tick(), 6.0)
    assert nodes.step(Beat("n0", 1, 7), 7.0) == (Recovered("n0", 1), AnswerBeat("n0", 1, 7))
    assert nodes.step(Tick(), 11.0) == ()


def test_evidence_kills_at_once_and_only_the_life_it_is_about():
    nodes = joined()
    assert nodes.step(Evidence("n0", 2, "not this one"), 1.0) == ()
    assert nodes.step(Evidence("n0", 1, "ssh ended: exit code 255"), 1.0) == (
        NodeDead("n0", 1, "ssh ended: exit code 255"),
    )


def test_the_story_tells_what_happened_and_stays_short():
    nodes = joined()
    nodes.step(LinkDown("n0"), 1.0)
    nodes.step(Tick(), 6.0)
    lines = nodes.describe("n0", 10.0).splitlines()
    assert "joined as incarnation 1  (expected -> alive)" in lines[0]
    assert "link down" in lines[1]
    assert "(alive -> suspect)" in lines[2]
    assert lines[3] == "    10.0 s ago  heard for the last time"
    for turn in range(100):
        nodes.step([LinkUp("n0"), LinkDown("n0")][turn % 2], 10.0 + turn)
    assert len(nodes.story("n0")) == STORY_LENGTH
    assert nodes.describe("n1", 1.0) == "n1 never said hello"


class Nodes(RuleBasedStateMachine):
    """Random events; the effects alone must tell a consistent story."""

    @initialize()
    def start(self):
        self.timings = Timings()
        self.names = ["n0", "n1"]
        self.nodes = Membership(self.names, self.timings)
        self.now, self.sessions, self.given = 0.0, 0, []
        self.current = {}  # node -> (incarnation, session)
        self.suspected, self.over, self.heard = set(), set(), {}

    def play(self, event):
        effects = self.nodes.step(event, self.now)
        for effect in effects:
            match effect:
                case Welcome(node, session, incarnation):
                    if self.current.get(node) != (incarnation, session):
                        assert node not in self.current
                        assert incarnation not in self.given
                        assert not self.given or incarnation > max(self.given)
                        self.given.append(incarnation)
                        self.current[node] = (incarnation, session)
                    self.heard[node] = self.now
                case AnswerBeat(node, incarnation):
                    assert self.current[node][0] == incarnation
                    self.heard[node] = self.now
                case Suspect(node, incarnation):
                    assert self.current[node][0] == incarnation
                    assert incarnation not in self.suspected
                    assert self.now - self.heard[node] >= self.timings.suspect_s
                    self.suspected.add(incarnation)
                case Recovered(node, incarnation):
                    assert self.current[node][0] == incarnation
                    self.suspected.remove(incarnation)
                case NodeDead(node, incarnation) | NodeGone(node, incarnation):
                    assert self.current.pop(node)[0] == incarnation
                    assert incarnation not in self.over
                    self.over.add(incarnation)
                    if isinstance(event, Tick):
                        assert self.now - self.heard[node] >= self.timings.dead_s
        return effects

    def incarnation(self, node, stale):
        return self.current[node][0] if node in self.current and not stale else 0

    @rule(node=st.sampled_from(["n0", "n1", "stranger"]), again=st.booleans())
    def say_hello(self, node, again):
        if again and node in self.current:
            session = self.current[node][1]
        else:
            self.sessions += 1
            session = f"s{self.sessions}"
        effects = self.play(hello(node, session))
        assert isinstance(effects[-1], Welcome | Refuse)
        assert (node == "stranger") <= isinstance(effects[-1], Refuse)

    @rule(node=st.sampled_from(["n0", "n1"]), stale=st.booleans())
    def beat(self, node, stale):
        incarnation = self.incarnation(node, stale)
        effects = self.play(Beat(node, incarnation))
        current = incarnation != 0
        assert isinstance(effects[-1], AnswerBeat if current else Refuse)

    @rule(node=st.sampled_from(["n0", "n1"]), stale=st.booleans(), orderly=st.booleans())
    def end(self, node, stale, orderly):
        incarnation = self.incarnation(node, stale)
        effects = self.play(Goodbye(node, incarnation) if orderly else Evidence(node, incarnation, "seen to exit"))
        assert len(effects) == (incarnation != 0)

    @rule(node=st.sampled_from(["n0", "n1", "stranger"]), up=st.booleans())
    def link(self, node, up):
        assert self.play(LinkUp(node) if up else LinkDown(node)) == ()

    @rule(seconds=st.integers(1, 12))
    def wait(self, seconds):
        self.now += seconds
        self.play(Tick())

    @invariant()
    def only_the_current_live_and_nobody_is_silent_for_too_long(self):
        living = {name: one.incarnation for name, one in self.nodes.members.items() if one.living}
        assert living == {node: incarnation for node, (incarnation, _) in self.current.items()}
        assert all(self.now - self.heard[node] < self.timings.dead_s for node in self.current)
        suspects = {one.incarnation for one in self.nodes.members.values() if one.state == "suspect"}
        assert suspects == self.suspected - self.over


TestNodes = Nodes.TestCase
TestNodes.settings = settings(max_examples=50)
