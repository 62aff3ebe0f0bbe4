"""The real engine as the teacher of on-policy distillation."""

import pytest
import torch
from support.engines import KEY
from support.hf_reference import hf_log_probs, load_hf_model
from support.rollout_cases import make_args

from miles.rollout.engines import engines
from miles.rollout.on_policy_distillation import ask_teacher
from miles.utils.http_utils import close_http_client
from miles.utils.types import Sample

pytestmark = pytest.mark.full


@pytest.mark.parametrize("prompt", [3, 1])
async def test_it_tells_the_log_probs_of_the_response(warm_engine, prompt):
    engines.set([warm_engine.target], warm_engine.url, KEY)
    tokens = [72, 101, 108, 108, 111, 44, 32, 77, 33]
    sample = Sample(index=0, tokens=tokens, response_length=len(tokens) - prompt)
    args = make_args(use_opd=True, opd_type="sglang", rm_type="math", opd_teacher_urls=[f"t={warm_engine.url}"])
    await ask_teacher(args, [sample])
    close_http_client()
    with torch.no_grad():
        wanted = hf_log_probs(load_hf_model(warm_engine.model), tokens)[-sample.response_length :]
    torch.testing.assert_close(torch.tensor(sample.teacher_log_probs), wanted, atol=1e-4, rtol=0)
