"""What surrounds a job: its directory, and what of its log a person sees."""

import io
import logging
import stat

import pytest
from rich.console import Console

from miles.tracking.console import RunConsole
from miles.training.job import _logging_to, _prepared_directory
from miles_agents.run_files import UnusableRunDirectory


def test_warnings_reach_the_terminal_in_one_line_and_the_file_has_everything(tmp_path):
    terminal = io.StringIO()
    with _logging_to(tmp_path / "log", RunConsole(Console(file=terminal, width=200))):
        logging.getLogger("miles.x").info("quiet")
        logging.getLogger("miles.x").warning("engine-0 is fenced\nand more")
    assert terminal.getvalue() == "warning: engine-0 is fenced\n"
    assert "quiet" in (tmp_path / "log").read_text()
    assert "and more" in (tmp_path / "log").read_text()


def test_a_new_run_directory_is_its_users_alone(tmp_path):
    path = _prepared_directory({"run_dir": str(tmp_path / "run")})
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert (path / "config.json").exists()


def test_a_run_directory_that_cannot_take_the_config_is_told(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UnusableRunDirectory, match="cannot be used for the files of a run"):
        _prepared_directory({"run_dir": str(tmp_path)})
