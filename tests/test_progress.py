from __future__ import annotations

import io

from rich.console import Console

from hallubench.progress import _Bars, _Lines


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class ClosedPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def advance(lines: _Lines, clock: Clock, lane: str, count: int, *, seconds: float) -> None:
    for _ in range(count):
        clock.now += seconds
        lines.advance(lane, failed=False, tokens=10)


def test_a_line_comes_every_ten_seconds_and_at_the_end() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = _Lines(stream, clock)
    lines.start({"echo": 20})
    clock.now += 1000  # loading is not asking
    lines.begin("echo")
    lines.advance("echo", failed=True, tokens=0)
    advance(lines, clock, "echo", 19, seconds=1)
    assert stream.getvalue().splitlines()[0] == "echo: 20 requests"
    assert stream.getvalue().splitlines()[-1] == "echo: 20/20, 1.1/s 10 tokens/s, 1 failed"
    assert "echo: 11/20, 1.1/s 10 tokens/s, 1 failed, 8 s left" in stream.getvalue()


def test_a_fast_lane_does_not_silence_a_slow_one() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = _Lines(stream, clock)
    lines.start({"fast": 100, "slow": 100})
    lines.begin("fast")
    lines.begin("slow")
    for _ in range(3):
        advance(lines, clock, "fast", 10, seconds=1)
        advance(lines, clock, "slow", 1, seconds=0)
    assert [line.split(",")[0] for line in stream.getvalue().splitlines() if line.startswith("slow")] == [
        "slow: 100 requests",
        "slow: 1/100",
        "slow: 2/100",
        "slow: 3/100",
    ]


def test_lines_that_nobody_reads_do_not_stop_a_run() -> None:
    lines = _Lines(ClosedPipe(), Clock())
    lines.start({"echo": 1})
    lines.begin("echo")
    lines.advance("echo", failed=False, tokens=1)


def test_bars_show_lanes_and_notes_without_obeying_them() -> None:
    stream = io.StringIO()
    with _Bars(Console(file=stream, width=200)) as bars:
        bars.start({"[red]lane\x1b]0;x\x07": 2})
        bars.begin("[red]lane\x1b]0;x\x07")
        bars.advance("[red]lane\x1b]0;x\x07", failed=True, tokens=3)
        bars.note("[bold]note\x1b[31m")
    shown = stream.getvalue()
    assert "[red]lane\\x1b]0;x\\x07" in shown
    assert "[bold]note\\x1b[31m" in shown
    assert "1/2" in shown
    assert "1 failed" in shown
    assert "\x1b" not in shown
