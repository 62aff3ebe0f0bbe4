"""docs/hooks.md: it has every hook that there is, and its examples run."""

import re
import sys
from pathlib import Path

import pytest
from support.rollout_cases import KEY, adds, make_config, manager, servers, sums

from miles.flags.entry import resolve_argv
from miles.flags.table import table
from miles.utils.http_utils import close_http_client

PAGE = (Path(__file__).parents[2] / "docs" / "hooks.md").read_text()
NOT_HOOKS = {"--custom-config-path", "--chat-template-path"}
OF_GENERATE_FUNCTIONS = {
    "--custom-agent-function-path", "--generate-tool-specs-path", "--generate-execute-tool-function-path",
}  # fmt: skip
RUNS = {
    # what is changed, and what shows that it was called
    "FixedRollout": ("rollout_function_path", {}),
    "fixed_eval": ("eval_function_path", {}),
    "Sums": ("data_source_path", {}),
    "newest_first": ("buffer_filter_path", {"over_sampling_batch_size": 8}),
    "generate_politely": ("custom_generate_function_path", {"custom_rm_path": "my_hooks.short_answers"}),
    "Answers": ("custom_generate_function_path", {"always_say": "4"}),
    "short_answers": ("custom_rm_path", {}),
    "best_of_group": ("custom_rm_path", {"group_rm": True}),
    "some_right": ("dynamic_sampling_filter_path", {}),
    "no_truncated": ("rollout_sample_filter_path", {}),
    "remember_hard_ones": ("rollout_all_samples_process_path", {}),
    "plain_rewards": ("custom_reward_post_process_path", {}),
    "plain_conversion": ("custom_convert_samples_to_train_data_path", {}),
    "log_lengths": ("custom_rollout_log_function_path", {}),
    "log_eval": ("custom_eval_rollout_log_function_path", {}),
}
OF_THE_TRAINER = {"sum_of_squares", "half_correction"}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The page's examples as a module of the user's."""
    (tmp_path / "my_hooks.py").write_text("\n\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_hooks", None)
    close_http_client()


def test_every_hook_has_its_place_on_the_page():
    flags = [f for f in table().flags if f.name.endswith("-path") and f.kind == "str" and f.status == "honoured"]
    assert len(flags) >= 14
    missing = [f.name for f in flags if f.name not in NOT_HOOKS and f"`{f.name}`" not in PAGE]
    assert missing == []
    named = set(re.findall(r"`(--[a-z-]+-path)`", PAGE))
    assert named - {f.name for f in table().flags} <= OF_GENERATE_FUNCTIONS


def test_every_example_is_run():
    names = set(re.findall(r"^(?:async def|def|class) (\w+)", PAGE, re.MULTILINE))
    assert names == set(RUNS) | OF_THE_TRAINER


@pytest.mark.parametrize("name", RUNS)
async def test_an_example_works(tmp_path, module, name):
    dest, more = RUNS[name]
    evaluated = None if more.get("group_rm") else ["e", sums(tmp_path / "e.jsonl", 2)]
    config = make_config(
        prompt_data=sums(tmp_path / "p.jsonl", 16), run_dir=str(tmp_path), eval_prompt_data=evaluated,
        **{dest: f"my_hooks.{name}"}, **more,
    )  # fmt: skip
    called = []

    def seen(frame, event, arg):
        if event == "call" and frame.f_code.co_filename.endswith("my_hooks.py"):
            called.append(frame.f_code.co_qualname)

    with servers(lambda payload, prompt: adds(payload, prompt.removeprefix("Please: "))) as fake:
        # New threads of the pool are watched, and the loop's, which begins with the manager.
        import threading

        threading.setprofile(seen)
        try:
            with manager(config) as rollout:
                await rollout.start(fake.targets, fake.router.url, KEY)
                assert (await rollout.generate(0)).num_samples == 8
                await rollout.trained(0)
                await rollout.generate(1)
                if evaluated and name != "FixedRollout":
                    assert (await rollout.evaluate(0)).metrics
        finally:
            threading.setprofile(None)
    assert any(place.startswith(name) for place in called), called


def test_flags_of_the_example_are_read(module):
    resolved = resolve_argv(["--custom-generate-function-path", "my_hooks.Answers", "--always-say", "5"])
    assert resolved.config["always_say"] == "5"


def test_examples_of_the_trainer(module):
    import torch

    from miles.utils.misc import load_function

    loss, metrics = load_function("my_hooks.sum_of_squares")(None, {}, torch.ones(2, 3), None)
    assert (float(loss), set(metrics)) == (1.0, {"loss"})
    masks = [torch.ones(2)]
    assert load_function("my_hooks.half_correction")(pg_loss=2.0, loss_masks=masks, args=None) == (1.0, masks, {})
