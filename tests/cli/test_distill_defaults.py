"""What `dsla distill` takes where options say nothing."""

from types import SimpleNamespace

import pytest

from dsla_hf import DSLAConfig
from dsla_hf.cli.distill import new_config
from dsla_hf.cli.distill_defaults import LONGEST, PLANTED, SHORTEST, TOKENS_PER_STEP, WINDOW_ALONE, settle, share_planted, stage_steps
from dsla_hf.cli.distill_options import parse_options


def base_config(context):
    """Of a checkpoint with this context; None: which does not say it."""
    config = SimpleNamespace(**{} if context is None else {"max_position_embeddings": context})
    config.get_text_config = lambda: config
    return config


def parsed(*more, context=None):
    options, args = parse_options(list(map(str, ["--model", "m", "--data", "d", "--output_dir", "o", "--use_cpu", *more])))
    return settle(options, args, base_config(context)), args


@pytest.mark.parametrize(
    ("context", "more", "length", "lengths", "rows"),
    [
        (8192, (), 8192, [2048, 8192], 2),
        (None, (), 8192, [2048, 8192], 2),
        (131072, (), 8192, [2048, 8192], 2),
        (4096, (), 4096, [2048, 4096], 4),
        (2048, (), 2048, None, 8),
        (5000, (), 5000, None, 3),
        (512, (), 512, None, 32),
        (8192, ("--length", 4096), 4096, None, 4),
        (8192, ("--sequence_lengths", 512, 1024), 1024, [512, 1024], 16),
        (8192, ("--length", 4096, "--sequence_lengths", 1024), 4096, [1024], 4),
        (8192, ("--per_device_train_batch_size", 8), 8192, [2048, 8192], 8),
        (8192, ("--gradient_accumulation_steps", 2), 8192, [2048, 8192], 1),
        (8192, ("--length", 32768), 32768, None, 1),
    ],
)
def test_sequences_go_up_to_the_context_and_steps_have_as_many_tokens(context, more, length, lengths, rows):
    options, args = parsed(*more, context=context)
    assert (options.length, args.sequence_lengths, args.per_device_train_batch_size) == (length, lengths, rows)
    assert (LONGEST, SHORTEST, TOKENS_PER_STEP) == (8192, 2048, 16384), "the numbers above are made of these"


def test_steps_are_divided_among_processes():
    options, args = parse_options(["--model", "m", "--data", "d", "--output_dir", "o", "--use_cpu"])
    asked = SimpleNamespace(per_device_train_batch_size=None, gradient_accumulation_steps=1, world_size=4, sequence_lengths=None)
    settle(options, asked, base_config(2048))
    assert asked.per_device_train_batch_size == 2 and args.per_device_train_batch_size is None


@pytest.mark.parametrize(
    ("more", "window", "states"),
    [
        ((), WINDOW_ALONE, False),
        (("--unit", "layer"), WINDOW_ALONE, False),
        (("--window_size", 64), 64, False),
        (("--window_size", 0), 0, True),
        (("--states", "true"), DSLAConfig().window_size, True),
        (("--states", "true", "--window_size", 64), 64, True),
        (("--states", "false"), WINDOW_ALONE, False),
        (("--method", "chain"), DSLAConfig().window_size, True),
        (("--method", "chain", "--states", "false"), WINDOW_ALONE, False),
    ],
)
def test_new_adapters_have_a_window_alone_but_for_the_papers_layer(more, window, states, tmp_path):
    config = new_config(parsed(*more)[0], tmp_path)
    assert (config.window_size, config.states) == (window, states)


def test_neither_window_nor_states_is_refused(tmp_path):
    with pytest.raises(ValueError, match="window_size"):
        new_config(parsed("--window_size", 0, "--states", "false")[0], tmp_path)


def test_an_adapter_that_goes_on_is_as_it_was(tmp_path):
    DSLAConfig(window_size=32, task_type="CAUSAL_LM").save_pretrained(tmp_path / "adapter")
    config = new_config(parsed("--adapter", tmp_path / "adapter")[0], tmp_path / "out")
    assert (config.window_size, config.states, config.conversion_unit) == (32, True, "layer")


def test_an_untested_type_is_tried_where_that_is_asked(tmp_path):
    assert not new_config(parsed()[0], tmp_path).allow_untested
    assert new_config(parsed("--allow_untested", "true")[0], tmp_path).allow_untested


def test_facts_are_planted_in_plain_text_unless_it_is_said():
    assert [share_planted(parsed()[0], chats) for chats in (False, True)] == [PLANTED, 0]
    assert [share_planted(parsed("--probes_in_training", 0.2)[0], chats) for chats in (False, True)] == [0.2, 0.2]
    assert [share_planted(parsed("--probes_in_training", 0)[0], chats) for chats in (False, True)] == [0, 0]


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        (("--tokens", 100 * 16384), (13, 87)),
        (("--tokens", 100 * 16384, "--alignment_share", 0.5), (50, 50)),
        (("--tokens", 100 * 16384, "--alignment_share", 0), (0, 100)),
        (("--tokens", 1), (1, 1)),
        (("--tokens", 2 * 16384), (1, 1)),
        (("--tokens", 3 * 16384, "--alignment_share", 0.9), (2, 1)),
    ],
)
def test_a_share_of_the_tokens_is_for_alignment(more, steps):
    assert stage_steps(parsed(*more)[0], 16384) == steps


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, "nan"])
def test_a_share_that_leaves_nothing_to_train_levels_is_refused(share):
    with pytest.raises(ValueError, match="alignment_share must be a share from 0 to below 1"):
        parsed("--alignment_share", share)
