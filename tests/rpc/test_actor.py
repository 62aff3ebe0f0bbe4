"""Which declarations of endpoints are taken, and where they run."""

import pytest

from miles_agents.rpc.actor import Actor, BadEndpoint, endpoint, endpoints_of


class Base(Actor):
    @endpoint
    def plain(self): ...

    @endpoint
    async def waits(self): ...

    @endpoint(thread="io")
    def fast(self): ...

    @endpoint(thread="io", group="pair")
    async def fast_and_waits(self): ...

    @endpoint
    def items(self):
        yield 1

    @endpoint
    async def async_items(self):
        yield 1

    def hidden(self): ...


class Derived(Base):
    @endpoint(thread="io")
    def plain(self): ...

    def waits(self):
        """Overridden without a mark: no endpoint any more."""


def test_methods_run_where_their_kind_says():
    found = endpoints_of(Base)
    assert {name: (e.thread, e.is_async, e.is_generator) for name, e in found.items()} == {
        "plain": ("main", False, False),
        "waits": ("async", True, False),
        "fast": ("io", False, False),
        "fast_and_waits": ("io", True, False),
        "items": ("main", False, True),
        "async_items": ("async", True, True),
    }
    assert found["fast_and_waits"].group == "pair"


def test_a_subclass_inherits_overrides_and_hides_endpoints():
    found = endpoints_of(Derived)
    assert found["plain"].thread == "io"
    assert "waits" not in found
    assert "items" in found


async def coroutine(self): ...


def plain(self): ...


def generator(self):
    yield 1


@pytest.mark.parametrize(
    ("function", "options", "why"),
    [
        (coroutine, {"thread": "main"}, "no event loop"),
        (plain, {"thread": "async"}, "would block the async thread"),
        (generator, {"thread": "io"}, "would block the I/O loop"),
        (plain, {"thread": "gpu"}, "allowed are 'main', 'async', 'io'"),
        (plain, {"group": "g"}, "runs to its end"),
        (plain, {"group": "g", "thread": "io"}, "runs to its end"),
    ],
)
def test_what_cannot_work_is_refused_where_it_is_written(function, options, why):
    with pytest.raises(BadEndpoint, match="declared in a way that cannot work") as caught:
        endpoint(**options)(function)
    assert why in caught.value.evidence


def test_a_group_cannot_span_threads():
    class Torn(Actor):
        @endpoint(group="g")
        async def here(self): ...

        @endpoint(group="g", thread="io")
        async def there(self): ...

    with pytest.raises(BadEndpoint, match="group over two threads") as caught:
        endpoints_of(Torn)
    assert "here" in caught.value.evidence
    assert "there" in caught.value.evidence


def test_close_of_an_actor_does_nothing_unless_it_says_so():
    assert Actor().close() is None
