"""Noise by counter: what it is never changes, and it is as even as chance."""

import pytest
import torch

from dsla_hf.inference.noise import gumbel, key_of, noise_bits, token_ids

M = 2**32


def mixed(x):
    """In plain integers."""
    x = (x ^ (x >> 16)) * 0x7FEB352D % M
    x = (x ^ (x >> 15)) * 0x846CA68B % M
    return x ^ (x >> 16)


def keys(*places):
    return torch.tensor([key_of(seed, position) for seed, position in places], dtype=torch.int32)


def test_bits_are_those_of_the_formula_and_seeds_keep_their_meaning():
    assert key_of(0, 0) == (128274514, 242521337)
    assert len({key_of(seed, place) for seed in (-(2**63), -1, 0, 1, 2**63 - 1) for place in (0, 1, 2**40)}) == 15
    both = keys((5, 7), (-3, 0))
    bits = noise_bits(both, token_ids(1000, torch.device("cpu"))).long() % M
    for row, (first, second) in zip(bits.tolist(), (both.long() % M).tolist(), strict=True):
        assert row == [mixed((mixed(token ^ first) + second) % M) for token in range(1000)]


def test_a_token_has_its_noise_wherever_it_stands():
    both = keys((5, 7), (6, 7))
    whole = gumbel(both, token_ids(500, torch.device("cpu")))
    some = torch.tensor([[3, 499, 0], [7, 7, 100]], dtype=torch.int32)
    assert torch.equal(gumbel(both, some), whole.gather(1, some.long()))
    assert torch.equal(gumbel(both[1:], some[1:]), whole.gather(1, some.long())[1:])
    assert whole.isfinite().all()


@pytest.mark.parametrize("along", ["tokens", "positions", "seeds"])
def test_bits_are_even_and_neighbours_know_nothing_of_each_other(along):
    """Each bit, the highest and lowest bytes, and pairs of neighbours, within five standard errors of chance."""
    count = 4096
    if along == "tokens":
        bits = noise_bits(keys((1, 2)), token_ids(count, torch.device("cpu")))[0]
    else:
        places = [(i, 2) if along == "seeds" else (1, i) for i in range(count)]
        bits = noise_bits(keys(*places), torch.tensor([[11]], dtype=torch.int32))[:, 0]
    bits = bits.long() % M
    each = torch.stack([(bits >> i) & 1 for i in range(32)]).double()
    assert ((each.mean(1) - 0.5).abs() < 2.5 / count**0.5).all()
    for byte in (bits & 255, bits >> 24):
        expected = count / 256
        chi = ((byte.bincount(minlength=256) - expected) ** 2 / expected).sum()
        assert abs(float(chi) - 255) < 5 * (2 * 255) ** 0.5
    flips = torch.stack([((bits[1:] ^ bits[:-1]) >> i) & 1 for i in range(32)]).double()
    assert ((flips.mean(1) - 0.5).abs() < 2.5 / count**0.5).all()


def test_noise_is_gumbels():
    """Quantiles of a large draw; also of its greatest part, which decides."""
    noise = gumbel(keys((3, 4), (3, 5), (9, 9)), token_ids(2**18, torch.device("cpu"))).flatten().double()
    for share in (0.01, 0.25, 0.5, 0.9, 0.999, 0.99999):
        found = float((noise < -torch.log(-torch.log(torch.tensor(share, dtype=torch.float64)))).double().mean())
        assert abs(found - share) < 5 * (share * (1 - share) / noise.numel()) ** 0.5
