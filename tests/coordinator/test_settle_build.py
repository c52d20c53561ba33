"""What follows when steps end."""

from tests.factories import Mill, a_spec


def test_a_diamond_runs_from_top_to_bottom(mill: Mill) -> None:
    build = mill.a_build(a_spec(top=[], left=["top"], right=["top"], bottom=["left", "right"]))
    runner = mill.a_runner()

    order = []
    while held := mill.acquire(runner, slots=4):
        order.append({one.claim.name for one in held})
        for one in held:
            mill.complete(one)

    assert order == [{"top"}, {"left", "right"}, {"bottom"}]
    assert mill.build(build.id).state == "succeeded"
