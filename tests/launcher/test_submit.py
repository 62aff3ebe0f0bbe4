"""miles submit: the job script is readable, complete, and has no secret; what cannot work is told before the queue."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from miles.tracking.secrets import take_variables
from miles_launcher.submit import Job, NotSubmitted, job_script, main, submit

FLAGS = ["--hf-checkpoint", "/models/a b", "--lr", "1e-5", "--rollout-batch-size", "8"]


@pytest.fixture
def run(capsys):
    """The command in this process."""

    def call(*words):
        code = main(words)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, said.out, said.err)

    return call


def test_the_script_says_all_that_the_job_is(run):
    options = ("--nodes=4", "--partition=gpu", "--time=8:00:00", "--gpus-per-node=8", "--sbatch=--comment=x")
    done = run("--dry-run", *options, *FLAGS, "--wandb-key", "s3cret")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "#!/bin/bash"
    for option in ("nodes=4", "partition=gpu", "time=8:00:00", "gpus-per-node=8", "exclusive", "ntasks-per-node=1",
                   "no-kill", "no-requeue", "comment=x", "output=%x-%j.log", "job-name=miles"):  # fmt: skip
        assert f"#SBATCH --{option}" in lines
    assert f"cd {Path.cwd()}" in lines
    assert "    --hf-checkpoint '/models/a b' \\" in lines
    assert "    --launcher slurm \\" in lines
    assert "s3cret" not in done.stdout
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


def test_the_number_of_nodes_is_the_trainers_unless_given(run):
    assert "#SBATCH --nodes=3" in run("--dry-run", *FLAGS, "--actor-num-nodes", "3").stdout
    assert "#SBATCH --nodes=5" in run("--dry-run", "--nodes", "5", *FLAGS, "--actor-num-nodes", "3").stdout
    assert "#SBATCH --nodes=1" in run("--dry-run", "--cpus-per-task", "4", *FLAGS).stdout
    assert "--exclusive" not in run("--dry-run", "--cpus-per-task", "4", *FLAGS).stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lrr", "1"], "Did you mean --lr?"),
        (["--hosts", "a,b"], "--hosts has no meaning in a job"),
        (["--launcher", "ssh"], "--launcher ssh has no meaning in a job"),
        (["--nodes", "two"], "--nodes two is no number of nodes"),
        (["--job-name", "a\n#SBATCH --wrap=x"], "is no value of sbatch's"),
        (["--sbatch", "--comment=a\nrm x"], "is no value of sbatch's"),
        (["--env", "HF_TOKEN=hf_abc"], "--env HF_TOKEN would stand in the job script"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_submitted(run, words, said):
    done = run(*FLAGS, *words)
    assert done.returncode == 2
    assert said in done.stderr


def test_the_script_is_kept_where_it_is_wanted(run, tmp_path):
    run("--dry-run", "--script", str(tmp_path / "job.sh"), *FLAGS)
    assert "--rollout-batch-size 8" in (tmp_path / "job.sh").read_text()


def fake_sbatch(tmp_path, text):
    program = tmp_path / "sbatch"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o700)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_secrets_reach_the_job_in_its_environment_and_leave_it_at_once(tmp_path):
    env = fake_sbatch(tmp_path, f"cat > {tmp_path}/script; env > {tmp_path}/env; echo Submitted batch job 7")
    env |= {"SLURM_JOB_ID": "3", "SBATCH_ACCOUNT": "x", "SLURM_CONF": "c"}
    command = [sys.executable, "-m", "miles_launcher.cli", "submit", *FLAGS, "--wandb-key", "s3cret"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=env, check=False)
    assert done.stdout == "Submitted batch job 7\n"
    assert "s3cret" not in (tmp_path / "script").read_text()
    told = dict(line.partition("=")[::2] for line in (tmp_path / "env").read_text().splitlines())
    assert told["SLURM_CONF"] == "c"
    assert not {"SLURM_JOB_ID", "SBATCH_ACCOUNT"} & set(told)  # of a job that this one is submitted from
    assert take_variables(told) == ["--wandb-key=s3cret"]
    assert "s3cret" not in told.values()


def test_what_sbatch_says_is_told(tmp_path):
    with pytest.raises(NotSubmitted) as error:
        submit("", fake_sbatch(tmp_path, "echo invalid partition >&2; exit 1"))
    assert error.value.evidence == "invalid partition"
    with pytest.raises(NotSubmitted):
        submit("", {"PATH": "/nonexistent"})


def test_words_with_spaces_are_quoted_as_each_reader_wants_them():
    script = job_script(Job({"job-name": "a b", "exclusive": None}, ["t.py", "--x", "it's"], python="/a b/python"))
    assert '#SBATCH --job-name="a b"' in script
    assert "exec '/a b/python' t.py \\\n    --x 'it'\"'\"'s'" in script


@pytest.mark.parametrize(
    ("name", "written"), [('a"b', r'"a\"b"'), ("a\\b", r'"a\\b"'), ("a#b", '"a#b"'), ("%x-1", "%x-1")]
)
def test_what_would_end_a_word_is_escaped(name, written):
    assert f"#SBATCH --job-name={written}" in job_script(Job({"job-name": name}, ["t.py"])).splitlines()


def test_a_script_that_is_kept_is_for_its_user_alone(run, tmp_path):
    kept = tmp_path / "job.sh"
    kept.write_text("")
    kept.chmod(0o644)
    assert run("--dry-run", "--script", str(kept), *FLAGS).returncode == 0
    assert kept.stat().st_mode & 0o777 == 0o600
