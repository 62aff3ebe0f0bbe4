"""Which of several errors is told, and with which exit code."""

from miles.training.errors import CheckpointsDisagree, JobPartDied, exit_code, first_of, story
from miles_agents.errors import EnvironmentFault, PeerFault, UserCodeError


def test_the_users_own_error_comes_before_the_deaths_that_it_caused():
    own = UserCodeError("reward raised")
    group = BaseExceptionGroup("g", [JobPartDied("trainer"), ExceptionGroup("h", [PeerFault("lost"), own])])
    assert first_of(group) is own


def test_a_cause_comes_before_the_death_of_a_process():
    cause = EnvironmentFault("disk full")
    assert first_of(ExceptionGroup("g", [JobPartDied("engine"), cause])) is cause


def test_a_single_error_is_itself():
    error = ValueError("x")
    assert first_of(error) is error
    assert story(error) == "ValueError: x"


def test_what_the_user_can_change_has_an_exit_code_of_its_own():
    assert exit_code(CheckpointsDisagree("x")) == 2
    assert exit_code(JobPartDied("x")) == 1
    assert exit_code(ValueError("x")) == 1
