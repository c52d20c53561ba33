"""Two hundred follow one build, a quarter has stopped: the others get each line, and nothing piles up."""

import pytest

from scripts.benchmarks import followers

# On a busy machine; scripts/bench has the exact figures and their goals.
SOON_S = 5.0
FLAT_MIB = 96.0


@pytest.mark.threat("F05")
@pytest.mark.threat("F06")
def test_a_line_reaches_everybody_who_takes_it_and_the_memory_stays_flat(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = followers.follow(followers.Size(lines=10, megabytes=4))

    worst = max(seen.seconds)
    with capsys.disabled():
        print(f"\n200 followers: a line within {worst * 1000:.0f} ms, memory +{seen.grown_mib:.0f} MiB")
    assert worst < SOON_S
    assert seen.grown_mib < FLAT_MIB
