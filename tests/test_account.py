from __future__ import annotations

import asyncio

import pytest
from skipping_loop import now, run

from hallubench.account import Account, Permit
from hallubench.limits import Budget, Cost, Quota
from hallubench.types import Usage

SHORT = Cost(model="m", input_tokens=10, output_tokens=10)
LONG = Cost(model="m", input_tokens=900, output_tokens=10)


async def admit_at(account: Account, cost: Cost = SHORT) -> float:
    """When an attempt is admitted; it is over at once."""
    with await account.admit(cost):
        return now()


async def refuse(account: Account, after: float | None, *permits: Permit) -> None:
    for permit in permits or (await account.admit(SHORT),):
        with permit:
            account.refused(permit, after)


def test_without_limits_attempts_go_at_once_up_to_the_first_concurrency() -> None:
    async def main() -> None:
        account = Account(Budget())
        tasks = [asyncio.create_task(account.admit(SHORT)) for _ in range(20)]
        await asyncio.sleep(1)
        assert sum(task.done() for task in tasks) == 16
        for task in tasks:
            task.cancel()

    run(main())


def test_attempts_share_the_requests_of_the_account_whatever_their_model() -> None:
    async def main() -> list[float]:
        account = Account(Budget(requests_per_minute=60, burst=2))
        costs = [Cost(model=f"m{i}") for i in range(4)]
        return list(await asyncio.gather(*(admit_at(account, cost) for cost in costs)))

    assert run(main()) == pytest.approx([0, 0, 1 / 0.99, 2 / 0.99])


def test_a_long_prompt_is_not_overtaken_by_short_ones() -> None:
    async def main() -> list[float]:
        account = Account(Budget(input_tokens_per_minute=1000))
        return list(await asyncio.gather(*(admit_at(account, cost) for cost in (LONG, SHORT, SHORT))))

    long, *short = run(main())
    assert long > 40
    assert min(short) >= long


def test_tokens_that_were_reserved_and_not_used_are_given_back() -> None:
    async def main(usage: Usage) -> float:
        account = Account(Budget(output_tokens_per_minute=6000))
        with await account.admit(Cost(model="m", output_tokens=1000)) as permit:
            account.answered(permit, usage)
        return await admit_at(account, Cost(model="m", output_tokens=900))

    assert run(main(Usage(output_tokens=100))) == 0
    assert run(main(Usage(output_tokens=1000))) == pytest.approx(900 / 99)
    assert run(main(Usage())) == pytest.approx(900 / 99)


def test_tokens_used_beyond_the_estimate_are_paid_later() -> None:
    async def main() -> float:
        account = Account(Budget(input_tokens_per_minute=6000))
        with await account.admit(Cost(model="m", input_tokens=1000)) as permit:
            account.answered(permit, Usage(input_tokens=1990))
        return await admit_at(account, Cost(model="m"))

    assert run(main()) == pytest.approx(10)


def test_an_attempt_that_was_rejected_has_spent_no_tokens() -> None:
    async def main() -> float:
        account = Account(Budget(output_tokens_per_minute=6000))
        cost = Cost(model="m", output_tokens=1000)
        with await account.admit(cost) as permit:
            account.rejected(permit)
        return await admit_at(account, cost)

    assert run(main()) == 0


def test_what_no_budget_can_ever_hold_is_named_with_the_fix() -> None:
    async def main() -> None:
        account = Account(Budget(input_tokens_per_minute=500, output_tokens_per_minute=1000))
        assert account.impossible(SHORT) is None
        assert "900 input tokens" in str(account.impossible(LONG))
        problem = str(account.impossible(Cost(model="m", output_tokens=2048)))
        assert "output_tokens_per_minute (1000)" in problem
        assert "`max_tokens`" in problem

    run(main())


def test_one_refusal_pauses_everybody_for_as_long_as_the_server_asks() -> None:
    async def main() -> list[float]:
        account = Account(Budget())
        await refuse(account, 53)
        return list(await asyncio.gather(*(admit_at(account, Cost(model=model)) for model in "abc")))

    assert run(main()) == [53, 53, 53]


def test_attempts_refused_together_slow_the_account_down_once() -> None:
    async def main() -> int:
        account = Account(Budget(max_concurrency=64))
        permits = [await account.admit(SHORT) for _ in range(64)]
        await refuse(account, 1, *permits)
        waiting = [asyncio.create_task(account.admit(SHORT)) for _ in range(64)]
        await asyncio.sleep(10)
        admitted = sum(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        return admitted

    assert run(main()) == 32


def test_pauses_grow_when_the_server_names_no_time_and_shrink_after_an_answer() -> None:
    async def main() -> list[float]:
        account = Account(Budget())
        pauses = []
        for refused in (True, True, True, False, True):
            since = now()
            with await account.admit(SHORT) as permit:
                pauses.append(now() - since)
                if refused:
                    account.refused(permit, None)
                else:
                    account.answered(permit, Usage())
        since = now()
        return [*pauses[1:], await admit_at(account) - since]

    assert run(main()) == pytest.approx([1, 2, 4, 0, 1], rel=0.26)


def test_a_time_that_the_server_names_too_short_again_and_again_is_lengthened() -> None:
    async def main() -> float:
        account = Account(Budget())
        for _ in range(10):
            await refuse(account, 0.0)
        return now()

    assert run(main()) > 30


def test_a_refused_account_asks_at_half_its_rate_and_is_back_at_full_within_two_minutes() -> None:
    async def main() -> tuple[int, int]:
        account = Account(Budget(requests_per_minute=600, burst=1))
        await refuse(account, 0.0)
        times = [await admit_at(account) for _ in range(2000)]
        return sum(time <= 10 for time in times), sum(120 < time <= 130 for time in times)

    slowed, full = run(main())
    assert 45 <= slowed <= 65
    assert full >= 97


def test_for_how_long_everything_was_refused_is_known_until_something_is_answered() -> None:
    async def main() -> list[float]:
        account = Account(Budget())
        seconds = [account.seconds_refused]
        for _ in range(3):
            await refuse(account, 200)
            seconds.append(account.seconds_refused)
        with await account.admit(SHORT) as permit:
            account.answered(permit, Usage())
        return [*seconds, account.seconds_refused]

    assert run(main()) == [0, 200, 400, 600, 0]


def test_a_pause_is_told_once() -> None:
    async def main() -> list[float]:
        told: list[float] = []
        account = Account(Budget(), on_pause=told.append)
        permits = [await account.admit(SHORT) for _ in range(10)]
        await refuse(account, 30, *permits)
        await refuse(account, 2)
        return told

    assert run(main()) == [30]


def test_what_the_server_says_is_left_for_a_model_holds_for_that_model() -> None:
    async def main() -> list[float]:
        account = Account(Budget())
        with await account.admit(Cost(model="a")) as permit:
            account.observe(permit, {"requests": Quota(limit=60, remaining=0, reset_after=60)})
        return [await admit_at(account, Cost(model=model)) for model in "ba"]

    assert run(main()) == pytest.approx([0, 1 / 0.99])


def test_who_leaves_the_line_lets_the_next_one_go() -> None:
    async def main() -> float:
        account = Account(Budget(input_tokens_per_minute=1000))
        first = asyncio.create_task(account.admit(LONG))
        second = asyncio.create_task(admit_at(account))
        await asyncio.sleep(1)
        first.cancel()
        return await second

    assert run(main()) == 1


def test_who_is_cancelled_just_when_admitted_gives_the_place_back() -> None:
    async def main() -> float:
        account = Account(Budget(max_concurrency=1))
        with await account.admit(SHORT):
            cancelled = asyncio.create_task(account.admit(SHORT))
            await asyncio.sleep(1)
        cancelled.cancel()
        return await admit_at(account)

    assert run(main()) == 1
