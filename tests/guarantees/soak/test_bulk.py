"""A bulk that is killed and goes on."""

from guarantees.rig import Rig
from guarantees.soak.bulk import Bulk, StandIn


def test_a_bulk_that_is_killed_three_times_has_each_line_once(rig: Rig) -> None:
    bulk = Bulk(rig, lines=500, window=50)
    with StandIn(rig.settings) as stand_in:
        bulk.run(kills=3, timeout=60)
    found = bulk.audit(stand_in.runs)
    assert found == dict.fromkeys(found, 0)
    assert 0 < bulk.most_open <= 50
