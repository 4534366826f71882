"""The pages of a KV cache that several sequences share: what begins alike is in memory, and computed, once.

Sequences keep their KV slots in pages. A full page is found again by all the tokens from the beginning of a sequence to
its end, because keys and values depend on nothing else; so full pages form a tree, in which the children of a page are
those that follow it in some sequence. A sequence that begins like another one takes the pages that they have in common,
which are then only read. Where they part within a page, what they have in common is copied.

Pages of sequences that have ended stay in the tree until memory is needed: then the one that was used longest ago goes,
children before their parents.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

from edgerazor.kernels.decoder import PAGE_SLOTS, Decoder, PageTable

#: Pages that are reserved at a time; the decoder keeps so many in one piece of memory.
RESERVED_PAGES = 4
#: Tokens that two sequences have in common within a page, from which on they are copied instead of computed again.
COPIED_TOKENS = 4
#: Entries for evictable pages, for each page, from which on those that are out of date are removed.
OUTDATED = 4


class Page:
    """A page of the cache, and its place in the tree.

    Attributes:
        number: as page tables have it.
        parent: the page before it; None: it is not in the tree.
        tokens: whose keys and values it holds, PAGE_SLOTS at most.
        children: the pages that follow it, by their first token; only a full page has any.
        users: sequences that have it in their tables.
        used: when it was last given up by a sequence, in turns of the pool.
    """

    __slots__ = ("children", "number", "parent", "tokens", "used", "users")

    def __init__(self, number: int) -> None:
        self.number = number
        self.parent: Page | None = None
        self.tokens: list[int] = []
        self.children: dict[int, list[Page]] = {}
        self.users = 1
        self.used = 0

    @property
    def is_full(self) -> bool:
        """Whether no token can be added, so that sequences may share it."""
        return len(self.tokens) == PAGE_SLOTS

    def add_child(self, page: Page) -> None:
        """Put a page that has tokens behind this one."""
        page.parent = self
        self.children.setdefault(page.tokens[0], []).append(page)

    def remove_child(self, page: Page) -> None:
        """Take a page out of the tree."""
        siblings = self.children[page.tokens[0]]
        siblings.remove(page)
        if not siblings:
            del self.children[page.tokens[0]]
        page.parent = None


class PagePool:
    """All pages of a decoder's KV cache.

    Args:
        decoder: whose KV cache it is.
        capacity: pages at most.

    Attributes:
        capacity: pages at most; fewer than asked for where there is no memory for more.
        idle: pages in the tree that no sequence has, which can be taken when they are needed.
    """

    def __init__(self, decoder: Decoder, capacity: int) -> None:
        self.decoder, self.capacity = decoder, capacity
        self.idle = 0
        self.root = Page(-1)
        self._free: list[int] = []
        self._reserved = 0
        self._turn = 0
        self._evictable: list[tuple[int, int, Page]] = []  # a heap; entries that are out of date are skipped
        self._offers = itertools.count()

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + self.capacity - self._reserved + self.idle

    @property
    def used(self) -> int:
        """Pages that sequences have."""
        return self._reserved - len(self._free) - self.idle

    def take(self) -> Page | None:
        """A page for a sequence, with nothing in it; None where all are in use."""
        if not self._free:
            self._reserve()
        if not self._free:
            self._evict()
        return Page(self._free.pop()) if self._free else None

    def use(self, page: Page) -> None:
        """Note that one more sequence has a page."""
        self.idle -= page.users == 0
        page.users += 1

    def give_back(self, pages: Sequence[Page]) -> None:
        """Note that a sequence has its pages no more, given in order."""
        self._turn += 1
        for page in reversed(pages):
            page.users -= 1
            if page.users:
                continue
            page.used = self._turn
            if page.parent is None:
                self._free.append(page.number)
            else:
                self.idle += 1
                self._offer(page)

    def find(self, ids: Sequence[int], most: int) -> tuple[list[Page], Page | None, int]:
        """What the tree holds of the beginning of a sequence.

        Args:
            ids: tokens of the sequence.
            most: how many of them may be found.

        Returns:
            the full pages that it begins with; a page that goes on like it; and with how many tokens.
        """
        pages: list[Page] = []
        node, at = self.root, 0
        while at < most:
            best, common = None, 0
            rest = list(ids[at : min(at + PAGE_SLOTS, most)])
            for child in node.children.get(rest[0], ()):
                count = common_length(child.tokens, rest)
                if count > common:
                    best, common = child, count
            if common < PAGE_SLOTS:
                return pages, best, common
            assert best is not None
            pages.append(best)
            node, at = best, at + PAGE_SLOTS
        return pages, None, 0

    def _reserve(self) -> None:
        """Reserve some more pages, if there may be more and there is memory for them."""
        more = min(RESERVED_PAGES, self.capacity - self._reserved)
        if more <= 0:
            return
        try:
            self.decoder.reserve((self._reserved + more) * PAGE_SLOTS)
        except MemoryError:
            self.capacity = self._reserved
            return
        self._free += reversed(range(self._reserved, self._reserved + more))
        self._reserved += more

    def _offer(self, page: Page) -> None:
        """Note that a page may be evicted, if it may."""
        if page.users == 0 and not page.children and page.parent is not None:
            if len(self._evictable) > OUTDATED * self.capacity:
                self._evictable = [entry for entry in self._evictable if _is_current(entry)]
                heapq.heapify(self._evictable)
            heapq.heappush(self._evictable, (page.used, next(self._offers), page))

    def _evict(self) -> None:
        """Free the page that was used longest ago, if no sequence has it."""
        while self._evictable:
            entry = heapq.heappop(self._evictable)
            page, parent = entry[2], entry[2].parent
            if parent is None or not _is_current(entry):
                continue
            parent.remove_child(page)
            self.idle -= 1
            self._free.append(page.number)
            if parent is not self.root:
                self._offer(parent)
            return


class SequencePages:
    """The pages of a sequence.

    Attributes:
        table: as the decoder takes it.
        length: tokens whose keys and values are in the cache.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.table = PageTable()
        self.length = 0
        self._pages: list[Page] = []
        self._in_tree = True

    def __len__(self) -> int:
        return len(self._pages)

    def begin(self, ids: Sequence[int], most: int) -> int:
        """Take what the cache holds of the beginning of a sequence, which has no pages yet; `most` tokens of it.

        Returns:
            how many tokens these are.
        """
        pages, last, common = self.pool.find(ids, most)
        for page in pages:
            self.pool.use(page)
            self._add(page)
        self.length = PAGE_SLOTS * len(pages)
        if last is not None and common >= COPIED_TOKENS:
            self.length += common if self._take_over(last, common) else 0
        return self.length

    def grow(self, length: int) -> bool:
        """Take pages for so many tokens in all; False where there are not enough, and those that there are are kept."""
        while len(self._pages) * PAGE_SLOTS < length:
            page = self.pool.take()
            if page is None:
                return False
            self._add(page)
        return True

    def append(self, tokens: Sequence[int], shared: bool = True) -> None:
        """Note that tokens have been computed; they have pages.

        Args:
            tokens: the next ones.
            shared: other sequences that begin like this one may use their keys and values. Where they may not, they
                may not use those of later tokens either.
        """
        self._in_tree &= shared
        done = 0
        while done < len(tokens):
            number, slot = divmod(self.length, PAGE_SLOTS)
            count = min(len(tokens) - done, PAGE_SLOTS - slot)
            if self._in_tree:
                self._put_in_tree(number, tokens[done : done + count])
            self.length += count
            done += count

    def release(self) -> None:
        """Give all pages back; what is in them stays in the cache until memory is needed."""
        self.pool.give_back(self._pages)
        self._pages, self.length, self._in_tree = [], 0, True
        self.table.clear()

    def _add(self, page: Page) -> None:
        self._pages.append(page)
        self.table.append(page.number)

    def _take_over(self, page: Page, common: int) -> bool:
        """Go on with the first tokens of a page: with the page itself, if no sequence has it and it holds no more."""
        self.pool.use(page)
        if page.users == 1 and len(page.tokens) == common:
            self._add(page)
            return True
        ours = self.pool.take()
        if ours is not None:
            self.pool.decoder.copy_page(page.number, ours.number)
            ours.tokens = page.tokens[:common]
            self._before(len(self._pages)).add_child(ours)
            self._add(ours)
        self.pool.give_back([page])
        return ours is not None

    def _before(self, number: int) -> Page:
        return self._pages[number - 1] if number else self.pool.root

    def _put_in_tree(self, number: int, tokens: Sequence[int]) -> None:
        page, before = self._pages[number], self._before(number)
        page.tokens += tokens
        if page.parent is None:
            before.add_child(page)
        if page.is_full:
            for twin in before.children[page.tokens[0]]:
                if twin is not page and twin.tokens == page.tokens:  # computed by another sequence at the same time
                    self._swap(number, page, twin)
                    return

    def _swap(self, number: int, page: Page, twin: Page) -> None:
        self._before(number).remove_child(page)
        self.pool.use(twin)
        self.pool.give_back([page])
        self._pages[number] = twin
        self.table.replace(number, twin.number)


def _is_current(entry: tuple[int, int, Page]) -> bool:
    """Whether the page of an entry for evictable pages may be evicted, and was last used when the entry says."""
    used, _, page = entry
    return not page.users and not page.children and page.parent is not None and page.used == used


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """With how many tokens both begin."""
    most = min(len(first), len(second))
    equal = 0
    while equal < most:  # both begin with `equal` tokens, and with at most `most`
        middle = (equal + most + 1) // 2
        if first[equal:middle] == second[equal:middle]:
            equal = middle
        else:
            most = middle - 1
    return equal
