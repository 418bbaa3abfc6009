"""The picture for the terminal shows every op, within the width."""

import re

from jaxpipe.schedules import Schedule, one_f_one_b, render, simulate

SPLIT = Schedule.from_csv("0F0,0F1,,0I0,0W0,0I1,0W1\n,1F0,1I0,1F1,1I1,1W0,1W1\n")


def test_terminal_text():
    assert render(simulate(one_f_one_b(2, 2)), name="1f1b") == (
        "1f1b: 2 ranks, 2 micro-batches: makespan 9, bubble 3 = 33.3%\n"
        "\n"
        "rank 0 | F0 F1 ......B0=== ...B1===\n"
        "rank 1 | ...F0 B0=== F1 B1=== ......"
    )
    assert "I0" in render(simulate(SPLIT)) and "W1" in render(simulate(SPLIT))
    colored = render(simulate(SPLIT), color=True)
    assert "\033[" in colored
    plain = "\n".join(line.rstrip() for line in re.sub(r"\033\[[\d;]*m", "", colored).splitlines())
    assert plain == render(simulate(SPLIT))
    narrow = render(simulate(one_f_one_b(4, 8)), width=60)
    assert max(map(len, narrow.splitlines()[1:])) <= 60 and narrow.count("rank 3 |") == 2
    # Costs of very different size, and none at all, still give a picture of bounded width.
    assert len(render(simulate(one_f_one_b(2, 2), 0.001, 1, 1), width=10_000)) < 1000
    assert render(simulate(one_f_one_b(2, 2), 0, 0, 0))
