"""Which pages are found again, which are given up first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.engine import PAGE
from shoal.engine.pages import ROOT, PagePool

TOKENS = [i % 50 for i in range(4 * PAGE)]


def fill(pool: PagePool, tokens: list[int]) -> list[int]:
    """Pages of all of `tokens`, computed, published and released."""
    match = pool.match(tokens)
    for page in match.pages:
        pool.hold(page)
    pages = match.pages + [pool.take() for _ in range(-(-len(tokens) // PAGE) - len(match.pages))]
    serial = ROOT
    for i, page in enumerate(pages):
        if pool.can_publish(len(tokens), PAGE * i):
            serial = pool.publish(serial, tokens, PAGE * i, page)
    pool.release(pages)
    return pages


def test_a_beginning_is_found_in_whole_pages_and_then_in_part() -> None:
    pool = PagePool(8)
    pages = fill(pool, TOKENS)
    assert pool.match(TOKENS).pages == pages[:3], "the last token is always computed"
    match = pool.match([*TOKENS[: PAGE + 10], 99, 98])
    assert (match.pages, match.partial, match.positions) == (pages[:1], pages[1], PAGE + 10)
    assert pool.match([99, *TOKENS]).positions == 0
    assert pool.match(TOKENS[:1]).positions == 0
    assert pool.match(TOKENS[:5]).positions == 4


def test_a_page_counts_only_after_the_same_pages() -> None:
    pool = PagePool(8)
    fill(pool, TOKENS[: 2 * PAGE])
    other = [TOKENS[0] + 1, *TOKENS[1 : 2 * PAGE], 5]
    assert pool.match(other).pages == []
    fill(pool, other)
    assert len(pool.match(other).pages) == 2
    assert not set(pool.match(other).pages) & set(pool.match([*TOKENS[: 2 * PAGE], 5]).pages)


def test_where_the_next_token_matters_it_is_part_of_a_page() -> None:
    pool = PagePool(8, ahead=1)
    pages = fill(pool, TOKENS[: 2 * PAGE])
    assert not pool.can_publish(2 * PAGE, PAGE), "nobody knows yet what comes after the second page"
    match = pool.match([*TOKENS[:PAGE], TOKENS[PAGE]])
    assert (match.pages, match.positions) == (pages[:1], PAGE)
    match = pool.match([*TOKENS[:PAGE], 99])
    # The MTP entry of the last position of the page was made with another token: all but that one can be copied.
    assert (match.pages, match.partial, match.positions) == ([], pages[0], PAGE - 1)


def test_mtp_entries_count_from_where_they_were_made_for_one_text() -> None:
    pool = PagePool(8, ahead=1)
    tokens = [*TOKENS, *TOKENS[:10]]
    pages = fill(pool, tokens)
    assert pool.match(tokens).origin == 4 * PAGE, "nothing there: the module begins with the next page"
    for page, origin in zip(pages, (0, 0, 2 * PAGE, 2 * PAGE), strict=False):
        pool.publish_drafts(page, origin)
    origins = [pool.match([*tokens[:end], 99, 99]).origin for end in (PAGE + 1, 2 * PAGE + 1, 2 * PAGE + 9, 3 * PAGE + 1, 4 * PAGE + 1)]
    assert origins == [0, 0, 2 * PAGE, 2 * PAGE, 2 * PAGE]
    pool.publish_drafts(pages[2], PAGE)
    assert pool.match([*tokens[: 2 * PAGE + 9], 99]).origin == 3 * PAGE, "made for a text that began within another page"
    assert pool.match(tokens).origin == 4 * PAGE


def test_the_page_unused_longest_goes_first_and_the_ends_of_texts_before_their_beginnings() -> None:
    pool = PagePool(6)
    old, new = TOKENS[: 3 * PAGE], [*reversed(TOKENS[: 3 * PAGE])]
    fill(pool, old)
    fill(pool, new)
    assert pool.available == 6
    taken = [pool.take() for _ in range(2)]
    assert len(pool.match([*old, 1]).pages) == 1
    assert len(pool.match([*new, 1]).pages) == 3
    pool.release(taken)
    fill(pool, [*old, 1][: 2 * PAGE])
    assert len(pool.match([*new, 1]).pages) == 3
    pool.forget_all()
    assert (pool.available, pool.known, pool.match(old).positions) == (6, 0, 0)


def test_a_page_that_is_held_is_never_given_away() -> None:
    pool = PagePool(3)
    pages = fill(pool, TOKENS[: 2 * PAGE])
    pool.hold(pages[0])
    others = {pool.take() for _ in range(2)}
    assert pool.available == 0
    assert pages[0] not in others
    assert pool.match(TOKENS[: 2 * PAGE]).pages == pages[:1]


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3), max_size=12), st.integers(0, 1))
def test_what_is_found_is_what_was_computed(texts: list[list[int]], ahead: int) -> None:
    pool = PagePool(40, ahead=ahead)
    content: dict[int, list[int]] = {}
    for text in texts:
        tokens = [digit for digit in text for _ in range(PAGE - 3)]
        match = pool.match(tokens)
        for i, page in enumerate(match.pages):
            assert content[page][: (i + 1) * PAGE + ahead] == tokens[: (i + 1) * PAGE + ahead]
        if match.partial is not None:
            end = match.positions + ahead
            assert content[match.partial][:end] == tokens[:end]
        for i, page in enumerate(fill(pool, tokens)):
            if page not in match.pages:
                content[page] = tokens[: (i + 1) * PAGE + ahead]
