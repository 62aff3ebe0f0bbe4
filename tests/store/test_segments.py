"""Making segments: the memory that is left is not promised twice."""

import threading

import pytest

from miles_agents.store.segments import SegmentMaker

MIB = 1 << 20
TIMEOUT_S = 30.0


class Memory:
    """What is left of 100 MiB, of which 5 always stay. ``looked``: somebody has looked since it was cleared."""

    def __init__(self, left):
        self.left = left
        self.looked = threading.Event()

    def __call__(self):
        self.looked.set()
        return self.left, 100 * MIB


def test_what_would_leave_too_little_is_refused_and_says_what_there_is():
    maker = SegmentMaker(Memory(6 * MIB))
    with pytest.raises(OSError, match=f"{6 * MIB} of {100 * MIB} bytes"):
        maker.make(1, 2 * MIB)
    made = maker.make(2, MIB)
    assert made.capacity == MIB
    made.close()


@pytest.mark.parametrize(("left_after", "is_made"), [(5 * MIB, False), (7 * MIB, True)])
def test_who_has_no_room_beside_what_others_make_waits_for_their_outcome(left_after, is_made):
    memory = Memory(7 * MIB)
    maker, outcome = SegmentMaker(memory), []
    maker.claim(2 * MIB)
    memory.looked.clear()

    def second():
        try:
            made = maker.make(2, 2 * MIB)
        except OSError:
            outcome.append(False)
        else:
            made.close()
            outcome.append(True)

    thread = threading.Thread(target=second)
    thread.start()
    assert memory.looked.wait(TIMEOUT_S)
    assert not outcome, "refused, or made, before the other's outcome was known"
    memory.left = left_after
    maker.done(2 * MIB)
    thread.join(TIMEOUT_S)
    assert outcome == [is_made]
