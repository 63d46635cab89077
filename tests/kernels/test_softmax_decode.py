"""Softmax attention over caches, of a token a row or a piece of a text: the Triton kernels against the PyTorch truth in fp64, that against
SDPA.

As tests/kernels/test_kernels.py, on a GPU compiled and in bf16 too, without one through Triton's interpreter.
"""

import os

import pytest
import torch
import torch.nn.functional as F

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 for Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton")

from dsla_kernels import dispatch, reference  # noqa: E402 (after the choice of how kernels run)
from dsla_kernels.ops import softmax  # noqa: E402
from dsla_kernels.ops.softmax import prompt  # noqa: E402
from dsla_kernels.ops.softmax import splits as softmax_splits  # noqa: E402
from dsla_kernels.ops.softmax.splits import choose_splits, choose_uneven_splits  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=on_gpu)]
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}
BLOCK_SIZE = 16


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """What is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape):
    return torch.randn(*shape, device=DEVICE)


def make_inputs(lengths, room, key_dim=32, value_dim=None, kv_heads=2, group=2, dtype=torch.float32, queries=1):
    """q, keys, values, lengths; behind the lengths NaN, which must not leak."""
    rows = len(lengths)
    q = random(rows, queries, kv_heads * group, key_dim).to(dtype)
    keys, values = (random(rows, kv_heads, room, size).to(dtype) for size in (key_dim, value_dim or key_dim))
    for row, length in enumerate(lengths):
        keys[row, :, length:] = float("nan")
        values[row, :, length:] = float("nan")
    return q, keys, values, torch.tensor(lengths, device=DEVICE)


def paged(keys, values, lengths, block_size=BLOCK_SIZE):
    """The same tokens in a pool whose blocks lie in any order, NaN in all others; behind the lengths the table leads nowhere."""
    rows, kv_heads, room = keys.shape[:3]
    most = -(-room // block_size)
    table = (torch.randperm(rows * most, device=DEVICE) + 1).view(rows, most).int()
    pools = []
    for x in (keys, values):
        pool = torch.full((rows * most + 1, block_size, kv_heads, x.shape[-1]), float("nan"), dtype=x.dtype, device=DEVICE)
        pool[table.long()] = F.pad(x, (0, 0, 0, most * block_size - room)).transpose(1, 2).unflatten(1, (most, block_size))
        pools.append(pool)
    table[torch.arange(most, device=DEVICE) * block_size >= lengths[:, None]] = 2**30
    return *pools, table


def paged_by_heads(keys, values, lengths, block_size=BLOCK_SIZE, columns=5):
    """As `paged`, each head in a column of a pool that others share; heads 0 and 1 in blocks of one table, others in those of others."""
    rows, kv_heads, room = keys.shape[:3]
    most, tables = -(-room // block_size), kv_heads + 1
    table = (torch.randperm(tables * rows * most, device=DEVICE) + 1).view(tables, rows, most).int()
    heads = [[0, 3], [0, 1]] + [[head, (2 * head) % columns] for head in range(2, kv_heads)]
    pools = []
    for x in (keys, values):
        pool = torch.full((tables * rows * most + 1, block_size, columns, x.shape[-1]), float("nan"), dtype=x.dtype, device=DEVICE)
        blocks = F.pad(x, (0, 0, 0, most * block_size - room)).unflatten(2, (most, block_size))
        for head, (group, column) in enumerate(heads[:kv_heads]):
            pool[table[group].long(), :, column] = blocks[:, head]
        pools.append(pool)
    table[:, torch.arange(most, device=DEVICE) * block_size >= lengths[:, None]] = 2**30
    return *pools, table, torch.tensor(heads[:kv_heads], dtype=torch.int32, device=DEVICE)


def check(q, keys, values, lengths, splits=0, **options):
    """The kernels' output, after it was compared with the truth."""
    floating = {name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in options.items()}
    expected = reference.softmax_decode(q.double(), keys.double(), values.double(), lengths, **floating)
    found = softmax.softmax_decode(q, keys, values, lengths, splits=splits, **options)
    assert found.dtype == q.dtype and found.shape == expected.shape
    error = float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    assert error <= BOUNDS[q.dtype]
    assert torch.equal(found[lengths == 0], torch.zeros_like(found[lengths == 0]))
    return found


def test_the_truth_is_scaled_dot_product_attention():
    q, keys, values, lengths = make_inputs([9, 5, 0], 12, 8, 6, dtype=torch.float64)
    found = reference.softmax_decode(q, keys, values, lengths, scale=0.3)
    for row, length in enumerate(lengths.tolist()):
        read = (x[row : row + 1, :, :length] for x in (keys, values))
        expected = F.scaled_dot_product_attention(q[row : row + 1].transpose(1, 2), *read, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(found[row : row + 1], expected.nan_to_num(0).transpose(1, 2))
    pools = paged(keys, values, lengths, 5)
    torch.testing.assert_close(reference.softmax_decode(q, *pools[:2], lengths, scale=0.3, block_table=pools[2]), found)


@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_length_static_and_paged(dtype, splits):
    q, keys, values, lengths = make_inputs([0, 1, 63, 64, 65, 200, 130], 200, dtype=dtype, kv_heads=1)
    static = check(q, keys, values, lengths, splits)
    for block_size in (BLOCK_SIZE, 64, 128):
        pool_keys, pool_values, table = paged(keys, values, lengths, block_size)
        found = check(q, pool_keys, pool_values, lengths, splits, block_table=table)
        if splits:  # else the kernel may cut rows in blocks into other parts
            torch.testing.assert_close(found, static)


@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads, group, block_size", [(1, 2, 16), (3, 1, 64), (4, 2, 128)])
def test_heads_anywhere_in_blocks_of_several_layers(kv_heads, group, block_size, dtype, splits):
    q, keys, values, lengths = make_inputs([70, 0, 65, 200], 200, 20, 12, kv_heads=kv_heads, group=group, dtype=dtype)
    alone = softmax.softmax_decode(q, keys, values, lengths, splits=max(splits, 1))
    pool_keys, pool_values, tables, heads = paged_by_heads(keys, values, lengths, block_size)
    found = check(q, pool_keys, pool_values, lengths, splits, block_table=tables, heads=heads)
    torch.testing.assert_close(found, alone)
    two_of_three = torch.stack([tables, tables], 2)[:, :, 0]  # tables of any strides
    torch.testing.assert_close(check(q, pool_keys, pool_values, lengths, splits, block_table=two_of_three, heads=heads), found)


@pytest.mark.parametrize("splits", [0, 1, 4])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("window, sinks, whole", [(40, 0, 0), (40, 5, 0), (40, 70, 1), (64, 4, 2), (16, 1, 3), (300, 4, 1)])
def test_windows_of_some_heads_and_sinks_of_these(window, sinks, whole, queries, splits):
    """Beside the truth: each head alone, with what it sees as a mask; heads that lie in another order among others."""
    lengths = [0, 1, 41, 130, 201, 330]
    q, keys, values, lengths = make_inputs(lengths, 330, kv_heads=3, queries=queries)
    options = {"window": window, "sink_tokens": sinks, "whole_heads": whole}
    found = check(q, keys, values, lengths, splits, **options)
    token = torch.arange(330, device=DEVICE)
    for query in range(queries):
        place = lengths - queries + query
        seen = (token > place[:, None] - window) | (token < sinks)
        for head in range(3):
            mask = None if head < whole else seen
            some = slice(2 * head, 2 * head + 2)
            alone = q[:, query : query + 1, some], keys[:, head : head + 1], values[:, head : head + 1], (place + 1).clamp_min(0)
            expected = reference.softmax_decode(*alone, mask=mask)
            torch.testing.assert_close(found[:, query : query + 1, some], expected, rtol=2e-4, atol=2e-4)
    order = torch.tensor([2, 0, 1], dtype=torch.int32, device=DEVICE)
    q_of = q.unflatten(2, (3, 2))[:, :, order.long()].flatten(2, 3)
    heads = torch.argsort(order)  # head h of q lies at place heads[h] of q_of
    keys_of, values_of = (torch.cat([x[:, :1] * 9, x[:, order.long()]], 1) for x in (keys, values))
    back = q_of.unflatten(2, (3, 2))[:, :, heads].flatten(2, 3)
    torch.testing.assert_close(check(back, keys_of, values_of, lengths, splits, heads=(heads + 1).int(), **options), found)


def test_what_goes_with_a_window():
    inputs = make_inputs([9], 12, kv_heads=2)
    for wrong, message in (
        ({"sink_tokens": 4}, "sink_tokens=4 goes with a window"),
        ({"whole_heads": 1}, "whole_heads=1 goes with a window"),
        ({"sink_tokens": -1, "window": 4}, "sink_tokens must be 0 or more, got -1"),
        ({"whole_heads": 3, "window": 4}, "whole_heads must be 0 or more, and 2 at most, the KV heads, got 3"),
        ({"heads": torch.zeros(2, 2, dtype=torch.int32, device=DEVICE)}, "goes with block tables"),
        ({"heads": torch.zeros(2, dtype=torch.int64, device=DEVICE)}, "heads"),
    ):
        for function in (softmax.softmax_decode, reference.softmax_decode):
            with pytest.raises(ValueError, match=message):
                function(*inputs, **wrong)


def test_the_truth_of_several_queries_is_scaled_dot_product_attention():
    """Of the last tokens of a row, some of which are not there; of tokens from a start on, some of them behind the row's end."""
    q, keys, values, lengths = make_inputs([9, 12, 2, 0], 12, 8, 6, dtype=torch.float64, queries=3)
    for starts in (None, torch.tensor([6, 10, 1, 0])):
        found = reference.softmax_decode(q, keys, values, lengths, scale=0.3, starts=starts)
        for row, length in enumerate(lengths.tolist()):
            for query in range(3):
                place = query + (length - 3 if starts is None else int(starts[row]))
                if not 0 <= place < length:
                    assert not found[row, query].any()
                    continue
                read = (x[row : row + 1, :, : place + 1] for x in (keys, values))
                expected = F.scaled_dot_product_attention(q[row : row + 1, query, :, None], *read, scale=0.3, enable_gqa=True)
                torch.testing.assert_close(found[row, query], expected[0, :, 0])


@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries, kv_heads, group", [(2, 2, 1), (3, 1, 7), (5, 2, 4), (9, 1, 9)])
def test_several_queries_a_row(queries, kv_heads, group, dtype, splits):
    q, keys, values, lengths = make_inputs([0, 4, 65, 130], 130, kv_heads=kv_heads, group=group, dtype=dtype, queries=queries)
    static = check(q, keys, values, lengths, splits)
    for block_size in (BLOCK_SIZE, 128):
        pool_keys, pool_values, table = paged(keys, values, lengths, block_size)
        found = check(q, pool_keys, pool_values, lengths, splits, block_table=table)
        if splits:
            torch.testing.assert_close(found, static)
    last = check(q[:, -1:], keys, values, lengths, splits)  # each is what it would be alone
    torch.testing.assert_close(static[:, -1:], last, atol=2 * BOUNDS[dtype], rtol=BOUNDS[dtype])


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, {"window": 1}, {"window": 70}, {"window": 3, "softcap": 2.0, "sink_logits": 1.0}, {"mask": True}], ids=str
)
def test_rows_with_other_numbers_of_queries(options, splits):
    """From their starts on; what is behind a row's end is padding."""
    q, keys, values, lengths = make_inputs([190, 0, 66, 150, 129, 3], 192, 20, 12, kv_heads=1, queries=4)
    starts = torch.tensor([186, 0, 65, 147, 127, 0], device=DEVICE)
    options = dict(options)
    if "sink_logits" in options:
        options["sink_logits"] = options["sink_logits"] + random(q.shape[2])
    if "mask" in options:
        options["mask"] = torch.arange(192, device=DEVICE) >= torch.tensor([100, 0, 66, 3, 0, 1], device=DEVICE)[:, None]
    found = check(q, keys, values, lengths, splits, starts=starts, **options)
    behind = starts[:, None] + torch.arange(4, device=DEVICE) >= lengths[:, None]
    assert not found[behind].any() and behind.sum() == 4 + 3 + 1 + 2 + 1
    if "mask" not in options:
        pool_keys, pool_values, tables, heads = paged_by_heads(keys, values, lengths, 64)
        torch.testing.assert_close(
            check(q, pool_keys, pool_values, lengths, splits, starts=starts.int(), block_table=tables, heads=heads, **options), found
        )


def test_queries_of_large_groups_and_heads_are_cut_into_programs():
    for queries, group, size in ((9, 9, 32), (5, 8, 256), (17, 1, 64), (2, 40, 16)):
        check(*make_inputs([70, 5], 80, size, kv_heads=1, group=group, queries=queries), 2)


def test_heads_that_do_not_fit_are_refused():
    q, keys, values, lengths = make_inputs([7, 20], 20)
    pool_keys, pool_values, tables, heads = paged_by_heads(keys, values, lengths)
    for wrong, words in [
        ({"block_table": tables[0], "heads": heads}, "block_table must be .*tables"),
        ({"block_table": tables}, "block_table must be"),
        ({"block_table": tables, "heads": heads.long()}, "heads must be int32"),
        ({"block_table": tables, "heads": heads[:, :1]}, "heads must be"),
        ({"heads": heads}, "heads \\[Hkv, 2\\] goes with block tables"),
    ]:
        with pytest.raises(ValueError, match=words):
            softmax.softmax_decode(q, pool_keys, pool_values, lengths, **wrong)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 17])
def test_query_heads_of_a_group(group, splits):
    check(*make_inputs([70, 5], 80, kv_heads=2, group=group), splits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key_dim, value_dim", [(32, 32), (64, 64), (80, 80), (96, 128), (128, 128), (192, 100), (20, 12), (256, 256)])
def test_head_sizes(key_dim, value_dim, dtype):
    for splits in (1, 2):
        check(*make_inputs([90, 17], 96, key_dim, value_dim, kv_heads=1, dtype=dtype), splits)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 0.7},
        {"scale": 0.02, "sink_logits": 2.0},
        {"softcap": 2.0, "sink_logits": -3.0},
        {"window": 1},
        {"window": 64},
        {"window": 100, "sink_logits": 0.0},
        {"window": 1000},
        {"mask": True},
        {"mask": True, "window": 90, "softcap": 2.0, "sink_logits": 1.0},
    ],
    ids=str,
)
def test_what_models_add(options, splits):
    """The mask is cut out of a larger one and hides NaN; one row sees nothing at all, and one an empty first part."""
    q, keys, values, lengths = make_inputs([190, 0, 65, 150, 129], 192, kv_heads=1)
    options = dict(options)
    if "sink_logits" in options:
        options["sink_logits"] = options["sink_logits"] + random(q.shape[2])
    if "mask" not in options:
        check(q, keys, values, lengths, splits, **options)
        pool_keys, pool_values, table = paged(keys, values, lengths)
        check(q, pool_keys, pool_values, lengths, splits, block_table=table, **options)
    else:
        first = torch.tensor([100, 0, 65, 3, 0], device=DEVICE)
        mask = torch.ones(5, 300, dtype=torch.bool, device=DEVICE)
        mask[:, :192] = torch.arange(192, device=DEVICE) >= first[:, None]
        mask[4, 10:20] = False
        options["mask"] = mask[:, :192]
        for x in (keys, values):
            x.masked_fill_(~options["mask"][:, None, :, None], float("nan"))
        o = check(q, keys, values, lengths, splits, **options)
        assert not o[2].any()


def test_caches_of_any_strides_are_read_where_they_are():
    q, keys, values, lengths = make_inputs([100, 33], 100)
    expected = check(q, keys, values, lengths)
    tokens_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values)]
    larger = [F.pad(x, (0, 8, 3, 5), value=float("nan"))[:, :, 3:103, :32] for x in (keys, values)]
    both = torch.stack([keys, values], dim=3)  # one buffer, as some caches have it
    for strided in (tokens_first, larger, both.unbind(3), (keys, larger[1])):
        for splits in (1, 2):
            torch.testing.assert_close(check(q, *strided, lengths, splits), expected)
    pool_keys, pool_values, table = paged(keys, values, lengths)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (pool_keys, pool_values)]
    table = torch.cat([table, table], dim=1)[:, : table.shape[1]]
    torch.testing.assert_close(check(q, *heads_first, lengths.int(), block_table=table), expected)
    slow_table = table.long().t().contiguous().t()
    torch.testing.assert_close(check(q[:, :, :].expand(2, 1, 4, 32), *heads_first, lengths, block_table=slow_table), expected)


def test_any_number_of_parts_gives_the_same():
    inputs = make_inputs([300, 40], 320, kv_heads=1)
    for splits in (2, 5, 200):
        check(*inputs, splits)
    inputs[-1][0] = 1_000_000  # no more is read than there is room for
    inputs[1].nan_to_num_(), inputs[2].nan_to_num_()
    found = softmax.softmax_decode(*inputs, splits=2)
    torch.testing.assert_close(found, check(*inputs[:3], inputs[3].clamp_max(320), 2))


def test_large_scores_and_equal_ones():
    q, keys, values, lengths = make_inputs([130], 130, kv_heads=1)
    for scale in (200.0, 0.0):
        for splits in (1, 2):
            check(q, keys, values, lengths, splits, scale=scale)
    opposite = -q.unflatten(2, (1, 2))[:, :, :, 0].transpose(1, 2) - 0.1 * keys  # of the first head, whose scores are all far below 0
    for splits in (1, 3):
        check(q, opposite, values, lengths, splits, scale=20.0)


def test_parts_fill_the_card():
    """A card of 132 processors that hold two programs each, tiles of 64 tokens."""
    for programs in (1, 8, 32, 100, 160, 256, 288, 320, 512, 5000):
        for tiles in (1, 2, 16, 128, 2048):
            splits = choose_splits(programs, tiles, 2, 264)
            assert 1 <= splits <= max(1, tiles // 2)
            if tiles // 2 * programs >= 8 * 264:  # then it is no more than a quarter off a card that is always full
                assert -(-programs * splits // 264) * -(-tiles // splits) <= 1.25 * programs * tiles / 264
    chosen = [choose_splits(programs, 128, 2, 264) for programs in (32, 8, 512, 128)]
    assert chosen == [8, 32, 1, 2]  # one row and sixteen, 32 and 8 heads, at 8,192 tokens


def test_long_rows_among_short_ones_have_parts():
    """A card as above, texts of up to 17,408 tokens: the part of the longest row takes no longer than a quarter of the row, or than a card
    that is full of rows of an eighth of its length."""
    for heads in (8, 32):
        for batch in (2, 5, 16, 40, 64, 128):
            parts = choose_uneven_splits(batch, batch * heads, 272, 8, 264)
            longest, evenly = 272 / parts, batch * heads * 272 / 8 / 264
            assert longest <= max(272 / 4, evenly) and parts <= 34
            assert batch * heads * parts <= max(8192, 4 * batch * heads)
    assert choose_uneven_splits(16, 512, 4, 8, 264) == 1  # nothing to divide


def test_uneven_rows_in_blocks():
    """One long row and short ones, whose further parts leave at once."""
    for lengths in ([1100, 3, 0, 64], [5, 1090]):
        q, keys, values, held = make_inputs(lengths, 1100, kv_heads=1)
        pool_keys, pool_values, table = paged(keys, values, held, 64)
        check(q, pool_keys, pool_values, held, block_table=table)


def test_the_choice_of_how_kernels_run(monkeypatch):
    inputs = make_inputs([70, 3], 80)
    launched = []
    run = softmax.softmax_decode
    monkeypatch.setattr(softmax, "softmax_decode", lambda *x, **options: launched.append(1) or run(*x, **options))
    outputs = []
    for choice in ("pytorch", "triton"):
        monkeypatch.setattr(dispatch, "choice", choice)
        outputs.append(dispatch.softmax_decode(*inputs, window=50))
    torch.testing.assert_close(*outputs)
    assert launched == [1]
    monkeypatch.setattr(softmax_splits, "tuned", prompt.Launch(32, 2, 2))
    torch.testing.assert_close(run(*inputs, window=50), outputs[0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole_graph(dynamic):
    inputs = make_inputs([70, 3], 80)

    def step(q, keys, values, lengths):
        return softmax.softmax_decode(q, keys, values, lengths, window=50, splits=2) * 2

    found = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*inputs)
    assert torch.equal(found, step(*inputs))
    torch.library.opcheck(
        torch.ops.dsla_kernels.softmax_decode,
        (*inputs, None, None, None, 0.2, None, 50, 0, None, None, 4, 1),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_a_cuda_graph_follows_lengths_and_cache():
    q, keys, values, lengths = make_inputs([500, 3], 2048, 128, dtype=torch.bfloat16)
    softmax.softmax_decode(q, keys, values, lengths)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = softmax.softmax_decode(q, keys, values, lengths)
    for steps in ([501, 2048], [0, 64], [2000, 1]):
        for x in (q, keys, values):
            x.normal_()
        lengths.copy_(torch.tensor(steps))
        graph.replay()
        assert torch.equal(o, check(q, keys, values, lengths))


WRONG = {
    "three dimensions of q": ({"q": lambda x: x[:, 0]}, r"q must be floating-point \[B, queries, Hq, D\]"),
    "no queries": ({"q": lambda x: x[:, :0]}, "with a token at least"),
    "starts": ({"starts": torch.zeros(3, dtype=torch.long)}, r"starts must be int32 or int64 \[2\]"),
    "heads": ({"q": lambda x: x[:, :, :3]}, "multiple of the 2"),
    "no rows": ({name: (lambda x: x[:0]) for name in ("q", "keys", "values", "lengths")}, "no rows"),
    "rows": ({"keys": lambda x: x[:1]}, "keys must be"),
    "three dimensions": ({"values": lambda x: x[0]}, "values must be"),
    "head size": ({"keys": lambda x: x[..., :16]}, r"keys must be torch.float32 or torch.float8_e4m3fn \[2, Hkv, T, 32\]"),
    "tokens": ({"values": lambda x: x[:, :, :5]}, "values must be"),
    "no room": ({"keys": lambda x: x[:, :, :0], "values": lambda x: x[:, :, :0]}, "room"),
    "a dtype each": ({"keys": lambda x: x.half()}, "keys must be torch.float32 .* got torch.float16"),
    "fp64": (dict.fromkeys(("q", "keys", "values"), torch.Tensor.double), "fp32, bf16 and fp16"),
    "columns": ({"keys": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)}, "keys must be dense.*contiguous"),
    "lengths": ({"lengths": lambda x: x.float()}, "lengths must be int32 or int64"),
    "lengths of others": ({"lengths": lambda x: x[:1]}, r"lengths must be int32 or int64 \[2\]"),
    "cap": ({"softcap": -1.0}, "softcap must be positive"),
    "window": ({"window": 0}, "window must be positive"),
    "sink": ({"sink_logits": torch.zeros(3)}, r"sink_logits must be floating-point \[4\]"),
    "mask": ({"mask": torch.ones(2, 5, dtype=torch.bool)}, r"mask must be bool \[2, 20\]"),
    "mask of numbers": ({"mask": torch.ones(2, 20)}, "mask must be bool"),
    "table and mask": ({"block_table": torch.zeros(2, 4).int(), "mask": torch.ones(2, 20).bool(), "q": lambda x: x}, "mask goes with"),
    "table": ({"block_table": torch.zeros(2, 4)}, "block_table must be int32"),
    "table of others": ({"block_table": torch.zeros(3, 4).int()}, "block_table must be int32"),
    "empty table": ({"block_table": torch.zeros(2, 0).int()}, "room for a token at least, and a block_table a column"),
    "splits": ({"splits": -1}, "splits must be 0"),
    "elsewhere": ({"lengths": lambda x: x.to("meta")}, f"lengths must be .* on {DEVICE}.*, got .* on meta"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_named_before_a_launch(case, monkeypatch):
    monkeypatch.setattr(torch.ops.dsla_kernels, "softmax_decode", None)
    changes, message = WRONG[case]
    arguments = dict(zip(("q", "keys", "values", "lengths"), make_inputs([7, 20], 20), strict=True))
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in changes.items() if name not in arguments}
    if "block_table" in options:
        arguments |= {name: x.transpose(1, 2) for name, x in arguments.items() if name in ("keys", "values")}
    arguments |= {name: edit(arguments[name]) for name, edit in changes.items() if name in arguments}
    with pytest.raises(ValueError, match=message):
        softmax.softmax_decode(**arguments, **options)


def test_heads_beyond_what_the_kernels_take():
    with pytest.raises(ValueError, match="up to 256"):
        softmax.softmax_decode(*make_inputs([2], 3, 258))


# --- a piece of a text ------------------------------------------------------------------------------------------


def make_piece(starts, news, tokens, key_dim=32, value_dim=None, kv_heads=2, group=2, dtype=torch.float32, block_size=BLOCK_SIZE):
    """q of `tokens` queries a row, of which `news` are no padding, and the pool that they see; NaN in all that nobody sees."""
    lengths = [start + new for start, new in zip(starts, news, strict=True)]
    _, keys, values, held = make_inputs(lengths, max(*lengths, 1), key_dim, value_dim, kv_heads, group, dtype)
    q = random(len(starts), tokens, kv_heads * group, key_dim).to(dtype)
    pool_keys, pool_values, table = paged(keys, values, held, block_size)
    return q, pool_keys, pool_values, torch.tensor(starts, device=DEVICE), held, table


def check_piece(q, keys, values, starts, lengths, table, **options):
    expected = reference.softmax_prompt(q.double(), keys.double(), values.double(), starts, lengths, table, **options)
    found = softmax.softmax_prompt(q, keys, values, starts, lengths, table, **options)
    assert found.dtype == q.dtype and found.shape == expected.shape
    error = float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    assert error <= BOUNDS[q.dtype]
    padding = starts[:, None] + torch.arange(q.shape[1], device=DEVICE) >= lengths[:, None]
    assert not found[padding].any()
    return found


def test_the_truth_of_a_piece_is_causal_attention():
    q, keys, values, starts, lengths, table = make_piece([7, 0], [5, 3], 5, 8, 6, dtype=torch.float64)
    found = reference.softmax_prompt(q, keys, values, starts, lengths, table, scale=0.3)
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        read = [x[table[row, : -(-length // BLOCK_SIZE)].long()].flatten(0, 1)[:length].transpose(0, 1)[None] for x in (keys, values)]
        mask = torch.arange(length, device=DEVICE) <= torch.arange(start, length, device=DEVICE)[:, None]
        new = q[row : row + 1, : length - start].transpose(1, 2)
        expected = F.scaled_dot_product_attention(new, *read, attn_mask=mask, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(found[row : row + 1, : length - start], expected.transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("tokens", [1, 17, 150])
def test_pieces_anywhere_in_texts(tokens, block_size, dtype):
    starts, news = [0, 0, 63, 200, 5, 0], [tokens, tokens // 2, tokens, tokens - 1, 0, 1]
    check_piece(*make_piece(starts, news, tokens, kv_heads=1, dtype=dtype, block_size=block_size))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key_dim, value_dim, group", [(128, 128, 4), (64, 64, 3), (96, 80, 1), (20, 12, 7), (256, 256, 1)])
def test_heads_of_pieces(key_dim, value_dim, group, dtype):
    check_piece(*make_piece([30, 0], [70, 40], 70, key_dim, value_dim, group=group, dtype=dtype))


@pytest.mark.parametrize(
    "options", [{"scale": 0.02}, {"window": 1}, {"window": 40}, {"window": 64}, {"window": 1000}, {"scale": 30.0}], ids=str
)
def test_what_models_add_to_pieces(options):
    check_piece(*make_piece([150, 0, 64], [140, 20, 1], 140, kv_heads=1), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads, group, block_size, options", [(1, 2, 16, {}), (3, 1, 64, {"window": 40}), (4, 2, 128, {})], ids=str)
def test_pieces_with_heads_anywhere_in_blocks(kv_heads, group, block_size, options, dtype):
    starts, lengths = (torch.tensor(x, device=DEVICE) for x in ([40, 0], [90, 33]))
    _, keys, values, _ = make_inputs(lengths.tolist(), 90, 20, 12, kv_heads, group, dtype)
    q = random(2, 50, kv_heads * group, 20).to(dtype)
    pool_keys, pool_values, tables, heads = paged_by_heads(keys, values, lengths, block_size)
    found = check_piece(q, pool_keys, pool_values, starts, lengths, tables, heads=heads, **options)
    alone_keys, alone_values, table = paged(keys, values, lengths, block_size)
    torch.testing.assert_close(found, check_piece(q, alone_keys, alone_values, starts, lengths, table, **options))


def test_pieces_of_any_strides_and_tables_that_are_too_short():
    q, keys, values, starts, lengths, table = make_piece([40, 3], [50, 9], 50)
    expected = check_piece(q, keys, values, starts, lengths, table)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, keys, values)]
    slow_table = table.long().t().contiguous().t()
    torch.testing.assert_close(check_piece(*heads_first, starts, lengths, slow_table), expected)
    found = softmax.softmax_prompt(q, keys, values, starts, lengths + 1_000_000, table[:, :1].clamp_max(len(keys) - 1))
    assert found.shape == expected.shape  # no more is read than there is room for


def test_any_launch_of_a_piece_gives_the_same(monkeypatch):
    inputs = make_piece([100, 0], [90, 33], 90, kv_heads=1)
    for tokens in (16, 64, 128):
        monkeypatch.setattr(prompt, "tuned", prompt.Launch(tokens))
        check_piece(*inputs)


def test_pieces_that_do_not_fit_are_refused():
    q, keys, values, starts, lengths, table = make_piece([4], [5], 5)
    for wrong, words in [
        ((q[0], keys, values, starts, lengths, table), "q must be"),
        ((q, keys[..., :-2], values, starts, lengths, table), "keys must be"),
        ((q, keys, values, starts.int(), lengths, table), "starts must be"),
        ((q, keys, values, starts, lengths, table[0]), "block_table must be"),
        ((q.double(), keys.double(), values.double(), starts, lengths, table), "fp32, bf16 and fp16"),
    ]:
        with pytest.raises(ValueError, match=words):
            softmax.softmax_prompt(*wrong)


def test_the_choice_of_how_pieces_run(monkeypatch):
    inputs = make_piece([4], [5], 5)
    launched, run = [], softmax.softmax_prompt
    monkeypatch.setattr(softmax, "softmax_prompt", lambda *x, **options: launched.append(1) or run(*x, **options))
    found = {}
    for choice in ("pytorch", "triton"):
        monkeypatch.setattr(dispatch, "choice", choice)
        found[choice] = dispatch.softmax_prompt(*inputs)
    assert len(launched) == 1
    torch.testing.assert_close(found["triton"], found["pytorch"])


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_a_graph_of_a_piece_serves_every_place():
    q, keys, values, starts, lengths, table = make_piece([0, 100], [64, 64], 64, 128, dtype=torch.bfloat16)
    keys, values, table = keys.nan_to_num(0), values.nan_to_num(0), table.clamp_max(len(keys) - 1)
    softmax.softmax_prompt(q, keys, values, starts, lengths, table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = softmax.softmax_prompt(q, keys, values, starts, lengths, table)
    for start in (3, 77):
        starts.fill_(start), lengths.fill_(start + 60)
        graph.replay()
        torch.testing.assert_close(o, check_piece(q, keys, values, starts, lengths, table))
