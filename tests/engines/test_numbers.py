"""The real engine's numbers, and what the outside can see of it."""

from pathlib import Path

import pytest
import torch
from support.engines import KEY
from support.hf_reference import hf_log_probs, load_hf_model

from miles.backends.sglang_utils.client import EngineClient

pytestmark = pytest.mark.full
PROMPT = [72, 101, 108, 108, 111, 44, 32]


async def test_log_probs_of_an_answer_are_those_of_the_hugging_face_model(warm_engine):
    model = load_hf_model(warm_engine.model)
    async with EngineClient(warm_engine.url, KEY, vocab_size=320) as client:
        answer = await client.generate(PROMPT, {"temperature": 1.0, "max_new_tokens": 64, "ignore_eos": True})
    tokens = answer["output_ids"]
    engine = torch.tensor([logprob for logprob, *_ in answer["meta_info"]["output_token_logprobs"]])
    with torch.no_grad():
        reference = hf_log_probs(model, PROMPT + tokens)[-len(tokens) :]
    assert len(tokens) == 64
    torch.testing.assert_close(engine, reference, atol=1e-4, rtol=0)


def test_the_key_is_in_no_command_line_no_environment_and_no_log(warm_engine):
    pids = warm_engine.pids
    assert len(pids) >= 3, "scheduler and detokenizer are children"
    for pid in pids:
        for name in ("cmdline", "environ"):
            assert KEY.encode() not in Path(f"/proc/{pid}/{name}").read_bytes(), (pid, name)
    assert "'api_key': '***'" in warm_engine.log and KEY not in warm_engine.log


def test_its_sockets_lie_in_a_private_directory(warm_engine):
    environ = Path(f"/proc/{warm_engine.pids[1]}/environ").read_bytes().split(b"\0")
    directory = next(Path(entry.decode()[7:]) for entry in environ if entry.startswith(b"TMPDIR="))
    assert directory.name == f"engine-{warm_engine.pid}" and directory.stat().st_mode & 0o077 == 0
    assert any(path.is_socket() for path in directory.iterdir())


def test_stand_ins_are_seen_by_the_engine_alone(warm_engine):
    environ = Path(f"/proc/{warm_engine.pids[1]}/environ").read_bytes()
    assert b"cpu_stand_ins" in environ
    with pytest.raises(ImportError):
        __import__("sgl_kernel")
