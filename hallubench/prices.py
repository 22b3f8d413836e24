"""What answers cost by the prices of the config, and `max_cost_usd`, which no run passes.

Prices change and differ between accounts, so none are built in: `configs/prices.example.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from threading import Lock

from hallubench.config import Config, ModelConfig, Price
from hallubench.errors import ConfigError, LaneError
from hallubench.limits import estimate
from hallubench.text import printable
from hallubench.types import Completion, Request, Usage

FREE = frozenset({"local", "echo"})
"""Types that nobody is paid for, unless the config has a price for them."""


def price_of(config: Config, model: str) -> Price | None:
    """What a model costs: the price under its own name, else under the first pattern that matches."""
    if (price := config.prices.get(model)) is not None:
        return price
    return next((price for name, price in config.prices.items() if fnmatchcase(model, name)), None)


def cost(price: Price | None, usage: Usage) -> float | None:
    """USD of one answer; None where the price or the number of tokens is not known."""
    if price is None or usage.input_tokens is None or usage.output_tokens is None:
        return None
    cached = min(usage.cached_tokens or 0, usage.input_tokens)
    price_cached = price.input if price.cached is None else price.cached
    fresh = usage.input_tokens - cached
    return (fresh * price.input + cached * price_cached + usage.output_tokens * price.output) / 1e6


def highest_cost(price: Price | None, request: Request) -> float:
    """USD that a request can cost: its estimated input, and an answer of `max_tokens`; 0 without a price."""
    tokens = estimate(request)
    usage = Usage(input_tokens=tokens.input_tokens, output_tokens=tokens.output_tokens)
    return cost(price, usage) or 0.0


def check_prices(config: Config, entry: ModelConfig, where: str) -> None:
    """Refuse a `max_cost_usd` that could not be kept.

    Raises:
        ConfigError: it bounds a model that has no price.
    """
    bounded = config.max_cost_usd is not None or entry.max_cost_usd is not None
    if bounded and entry.type not in FREE and price_of(config, entry.name) is None:
        name = printable(entry.name)
        raise ConfigError(f"{where}: max_cost_usd needs the price of {name}; add it to `prices`")


class Purse:
    """An amount of USD: what was spent of it, and what requests in flight may still take.

    Lanes share the one of the config, and a local engine draws its requests in a thread of its own.
    """

    def __init__(self, max_usd: float) -> None:
        self.max_usd = max_usd
        self.spent = 0.0
        self.reserved = 0.0
        self._lock = Lock()

    @classmethod
    def of(cls, section: Config | ModelConfig) -> tuple[Purse, ...]:
        """The one that `max_cost_usd` of a config or of an account's entry fills, if it is set."""
        return () if section.max_cost_usd is None else (cls(section.max_cost_usd),)

    def has(self, usd: float) -> bool:
        """There is enough for that beside what may still be taken."""
        return self.spent + self.reserved + usd <= self.max_usd

    def reserve(self, usd: float) -> bool:
        """Set an amount aside; False and nothing happens where there is not enough."""
        with self._lock:
            if enough := self.has(usd):
                self.reserved += usd
            return enough

    def settle(self, reserved: float, spent: float) -> None:
        """What was really spent takes the place of what was set aside."""
        with self._lock:
            self.reserved -= reserved
            self.spent += spent


class Spending:
    """Counts what requests cost, and lets through those that no purse is too small for.

    Args:
        config: whose prices hold.
        purses: what the requests are paid from; each has to have enough.
    """

    def __init__(self, config: Config, purses: Sequence[Purse]) -> None:
        self._config = config
        self._purses = purses
        self._prices: dict[str, Price | None] = {}
        self._reserved: dict[str, float] = {}
        self._held: Request | None = None

    def affordable(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Requests as long as there is enough for their highest cost beside that of those in flight.

        The first one that there is not enough for is held back, and comes first when this is called
        again: answers cost less than they could, so there may be enough once they are there.
        """
        held = () if self._held is None else (self._held,)
        for request in chain(held, requests):
            self._held = request
            if not self._reserve(request):
                return
            self._held = None
            yield request

    @property
    def can_go_on(self) -> bool:
        """A request was held back, and there is enough for it by now."""
        if self._held is None:
            return False
        highest = highest_cost(self._price(self._held), self._held)
        return all(purse.has(highest) for purse in self._purses)

    def check_finished(self) -> None:
        """Tell that requests are left because of what they may cost.

        Raises:
            LaneError: a request is still held back.
        """
        if self._held is not None:
            purse = min(self._purses, key=lambda one: one.max_usd - one.spent - one.reserved)
            raise LaneError(
                f"{purse.spent:.2f} USD spent, and the next answer may pass max_cost_usd "
                f"({purse.max_usd:g}); raise it, or lower max_tokens, and run again"
            )

    def settle(self, request: Request, completion: Completion) -> float | None:
        """What a completion really cost, in USD, takes the place of what was reserved.

        An error costs nothing unless it comes with a usage; an answer without one costs all it could.
        """
        usd = cost(self._price(request), completion.usage)
        reserved = self._reserved.pop(request.request_id, 0.0)
        spent = usd if usd is not None else reserved if completion.error is None else 0.0
        for purse in self._purses:
            purse.settle(reserved, spent)
        return usd

    def _reserve(self, request: Request) -> bool:
        if not self._purses:
            return True
        highest = highest_cost(self._price(request), request)
        for place, purse in enumerate(self._purses):
            if not purse.reserve(highest):
                for earlier in self._purses[:place]:
                    earlier.settle(highest, 0.0)
                return False
        self._reserved[request.request_id] = highest
        return True

    def _price(self, request: Request) -> Price | None:
        if request.model not in self._prices:
            self._prices[request.model] = price_of(self._config, request.model)
        return self._prices[request.model]
