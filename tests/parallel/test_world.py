import pytest

from ernie_engine.parallel.world import World

FULL = {
    **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
}


def test_alone_unless_somebody_says_otherwise():
    assert World.from_env({}) == World()
    assert World.from_env({"MASTER_ADDR": "x", "LOCAL_RANK": "0"}) == World()
    assert World().is_one_host and not World().is_launched


def test_what_torchrun_says():
    world = World.from_env(FULL)
    assert world == World(3, 4, 1, 2, "10.0.0.1", 29500, is_launched=True)
    assert not world.is_one_host
    assert World.from_env({**FULL, "LOCAL_WORLD_SIZE": "4"}).is_one_host


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_PORT": ""}, "RANK is set but not MASTER_PORT"),
        ({"LOCAL_RANK": "two"}, "LOCAL_RANK='two'"),
        ({"RANK": "4"}, "do not fit together"),
        ({"LOCAL_RANK": "2"}, "do not fit together"),
        ({"LOCAL_WORLD_SIZE": "5"}, "do not fit together"),
    ],
)
def test_what_is_not_complete_or_makes_no_sense_is_told(changes, message):
    with pytest.raises(ValueError, match=message):
        World.from_env({**FULL, **changes})
