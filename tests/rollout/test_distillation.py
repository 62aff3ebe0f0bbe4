"""On-policy distillation on the rollout's side: what a teacher's server is asked, and what becomes of its answer."""

from contextlib import contextmanager

import pytest
from aiohttp import web
from support.http_server import server
from support.rollout_cases import make_args

from miles.rollout.inference_rollout.inference_rollout_common import generate_and_rm
from miles.rollout.on_policy_distillation import (
    BadTeacher,
    NoTeacher,
    ask_teacher,
    post_process_rewards,
    read_log_probs,
    reward_func,
)
from miles.rollout.train_data import convert_samples_to_train_data
from miles.utils.http_utils import RequestRefused, close_http_client
from miles.utils.teachers import read_teachers
from miles.utils.types import Sample

REWARD = "miles.rollout.on_policy_distillation.reward_func"


@pytest.fixture(autouse=True)
def clean():
    yield
    close_http_client()


@contextmanager
def teacher(scale=1.0, *, status=200):
    """An SGLang server in which a token's log-prob is its id times ``scale``, negative."""
    asked = []

    async def handler(request, number):
        payload = await request.json()
        asked.append((request.path, payload))
        tokens, start = payload["input_ids"], payload["logprob_start_len"]
        rows = [[-scale * token, token, None] for token in tokens[start:]]
        rows[0][0] = None  # nothing is known of what stands before it
        return web.json_response({"text": "", "meta_info": {"input_token_logprobs": rows}}, status=status)

    with server(handler) as url:
        yield url, asked


def done(index=0, tokens=(1, 2, 3, 4, 5), response=3, **fields):
    return Sample(
        index=index, group_index=index, tokens=list(tokens), response_length=response, status=Sample.Status.COMPLETED,
        **fields,
    )  # fmt: skip


def distilling(**values):
    return make_args(use_opd=True, opd_type="sglang", rm_type=None, custom_rm_path=REWARD, **values)


async def test_the_teacher_is_asked_for_the_response_alone():
    sample = done()
    with teacher() as (url, asked):
        assert await reward_func(distilling(rm_url=f"{url}/generate"), sample) == 0.0
    assert sample.teacher_log_probs == [-3.0, -4.0, -5.0]
    ((path, payload),) = asked
    assert path == "/generate"
    assert payload == {
        "input_ids": [1, 2, 3, 4, 5],
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 1,
    }


async def test_it_is_asked_once_and_not_for_what_is_unfinished_or_evaluated():
    samples = [done(0), done(1, response=0), done(2, teacher_log_probs=[0.0] * 3), done(3, opd_reverse_kl=[0.0] * 3)]
    samples.append(Sample(index=4, tokens=[1], status=Sample.Status.ABORTED))
    with teacher() as (url, asked):
        args = distilling(rm_url=url)
        assert await reward_func(args, samples) == [0.0] * 5
        await ask_teacher(args, samples)
        assert len(asked) == 1
        state = type("State", (), {"args": make_args(**{**vars(args), "custom_rm_path": None, "rm_type": "random"})})
        assert (await generate_and_rm(state, done(5), {}, evaluation=True)).teacher_log_probs is None
        graded = await generate_and_rm(state, done(6), {})
    assert graded.teacher_log_probs == [-3.0, -4.0, -5.0]
    assert graded.reward in (0, 1)
    assert [sample.teacher_log_probs for sample in samples] == [[-3.0, -4.0, -5.0], [], [0.0] * 3, None, None]


async def test_each_sample_has_its_teacher():
    with teacher(1.0) as (first, _), teacher(2.0) as (second, _):
        urls = {"opd_teacher_urls": [f"a={first}", f"b={second}"], "opd_teacher_key": "who"}
        samples = [done(0, metadata={"who": "b"}), done(1, metadata={"who": "a"})]
        await ask_teacher(distilling(**urls), samples)
        assert [sample.teacher_log_probs[0] for sample in samples] == [-6.0, -3.0]
        for metadata, words in (({}, "names no teacher"), ({"who": "c"}, "'c'")):
            with pytest.raises(NoTeacher, match=words):
                await ask_teacher(distilling(**urls), [done(0, metadata=metadata)])


async def test_numbers_travel_to_the_trainer_and_rewards_do_not_count():
    samples = [done(i, reward=float(i), teacher_log_probs=[-1.0, -2.0, -3.0]) for i in range(2)]
    args = distilling(custom_reward_post_process_path="miles.rollout.on_policy_distillation.post_process_rewards")
    data = await convert_samples_to_train_data(args, samples)
    assert data["teacher_log_probs"] == [[-1.0, -2.0, -3.0]] * 2
    assert (data["raw_reward"], data["rewards"]) == ([0.0, 1.0], [0.0, 0.0])
    assert post_process_rewards(args, samples) == ([0.0, 1.0], [0.0, 0.0])


@pytest.mark.parametrize(
    "answer",
    [
        {"text": "no log-probs"},
        [1],
        {"meta_info": {"input_token_logprobs": [[-1.0, 4, None], [-1.0, 5, None]]}},
        {"meta_info": {"input_token_logprobs": [[-1.0, 3, None], [-1.0, 4, None], [-1.0, 6, None]]}},
        {"meta_info": {"input_token_logprobs": [[None, 3, None], [-1.0, 4, None], [-1.0, 5, None]]}},
        {"meta_info": {"input_token_logprobs": [[float("-inf"), 3, None], [-1.0, 4, None], [-1.0, 5, None]]}},
    ],
)
def test_what_is_no_log_prob_of_these_tokens_is_refused(answer):
    with pytest.raises(BadTeacher, match="http://t"):
        read_log_probs(answer, done(), "http://t")


async def test_a_server_that_refuses_is_named():
    with teacher(status=400) as (url, _), pytest.raises(RequestRefused, match=url):
        await reward_func(distilling(rm_url=url), done())


def test_teachers_are_read_from_flags():
    two = {"a": "http://h:1", "b": "https://x/y"}
    assert read_teachers(["a=http://h:1/", "b=https://x/y/generate"], None) == two
    assert read_teachers(["a=http://h:1,b=https://x/y"], "http://z") == two
    assert read_teachers(None, "http://z/generate/") == {"default": "http://z"}
    assert read_teachers([], None) == {}
    for words in (["a"], ["a="], ["=http://h"], ["a=ftp://h"], ["a=http://h", "a=http://i"]):
        with pytest.raises(ValueError, match=r"NAME=URL|two teachers|no address"):
            read_teachers(words, None)
