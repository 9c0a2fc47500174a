"""Reference counts, sharing and eviction of KV blocks."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_engine.engine.block_pool import BlockPool, PrefixHash

KEY = b"key"


def digests_of(tokens, size, key=KEY):
    prefix = PrefixHash(size, key)
    prefix.extend(array("q", tokens))
    return prefix.digests


def test_take_and_release():
    pool = BlockPool(4)
    a = pool.take((), 3)
    assert sorted(a) == [0, 1, 2] and pool.num_free == 1
    assert pool.take((), 2) is None and pool.num_free == 1
    pool.release(a)
    assert pool.num_free == 4


def test_releasing_twice_is_caught():
    pool = BlockPool(2)
    blocks = pool.take((), 1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="twice"):
        pool.release(blocks)


def test_a_published_prefix_is_shared_and_counted():
    pool = BlockPool(4)
    blocks = pool.take((), 2)
    digests = digests_of([1, 2, 3, 4], 2)
    for block, digest in zip(blocks, digests, strict=True):
        pool.publish(block, digest)
    assert pool.match(digests) == blocks
    again = pool.take(blocks, 1)
    assert again[:2] == blocks and pool.num_free == 1
    pool.release(blocks)
    assert pool.num_free == 1  # still held once
    pool.release(again)
    assert pool.num_free == 4 and pool.match(digests) == blocks  # free, and still known


def test_hits_on_free_blocks_use_them_up():
    pool = BlockPool(3)
    (block,) = pool.take((), 1)
    pool.publish(block, b"d")
    pool.release([block])
    assert pool.num_needed([block], 2) == 3
    assert pool.take([block], 3) is None
    assert pool.take([block], 2) is not None and pool.num_free == 0


def test_eviction_takes_unknown_blocks_first_then_the_least_recently_freed_tail_first():
    pool = BlockPool(5)
    first, second = pool.take((), 2), pool.take((), 2)
    for blocks in (first, second):
        for block in blocks:
            pool.publish(block, bytes([block]))
    pool.release(second)
    pool.release(first)
    order = [pool.take((), 1)[0] for _ in range(5)]
    assert order == [4, second[1], second[0], first[1], first[0]]
    assert pool.match([bytes([first[0]])]) == []


def test_the_first_block_with_a_prefix_stays_the_known_one():
    pool = BlockPool(2)
    a, b = pool.take((), 2)
    pool.publish(a, b"same")
    pool.publish(b, b"same")
    pool.release([b])
    assert pool.match([b"same"]) == [a]


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 7), st.integers(0, 39))
def test_a_digest_names_all_tokens_up_to_its_block(tokens, size, change):
    digests = digests_of(tokens, size)
    assert len(digests) == len(tokens) // size
    assert digests != digests_of(tokens, size, b"other") or not digests
    if change < len(tokens):
        other = [*tokens[:change], 9, *tokens[change + 1 :]]
        changed = digests_of(other, size)
        same = change // size  # blocks wholly before the change
        assert changed[:same] == digests[:same]
        assert all(a != b for a, b in zip(changed[same:], digests[same:], strict=True))


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 7), st.integers(0, 40))
def test_digests_continue_where_they_ended(tokens, size, first):
    prefix = PrefixHash(size, KEY)
    prefix.extend(array("q", tokens[:first]))
    prefix.extend(array("q", tokens))
    assert prefix.digests == digests_of(tokens, size)
