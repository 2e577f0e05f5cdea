"""Tenants: how many jobs of each are open, for how long, and how many it may have."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from blipq.ledger import keys
from blipq.ledger.codec import ALL_OTHERS

if TYPE_CHECKING:
    import redis


@dataclass(frozen=True, slots=True)
class TenantState:
    """A tenant. ``oldest_s``: since its oldest open job was submitted. None is no limit."""

    tenant: str
    open: int
    oldest_s: float | None
    most_open: int | None
    most_per_s: float | None

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, as JSON has them."""
        return asdict(self)


def tenants(client: "redis.Redis") -> list[TenantState]:
    """Those that have open jobs or limits, the most open jobs first. Raises redis.RedisError."""
    limits = cast("dict[str, str]", client.hgetall(keys.LIMITS))
    listed = cast("list[str]", client.zrange(keys.TENANTS, 0, -1))
    names = list(dict.fromkeys([*listed, *(name for name in limits if name != ALL_OTHERS)]))
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.zcard(keys.tenant(name))
            pipe.zrange(keys.tenant(name), 0, 0, withscores=True)
        seconds, micros = client.time()
        found = pipe.execute()
    now = seconds + micros / 1e6
    counted = zip(names, found[::2], found[1::2], strict=True)
    states = [_state(name, size, first, now, limits) for name, size, first in counted]
    wanted = (each for each in states if each.open or each.tenant in limits)
    return sorted(wanted, key=lambda each: (-each.open, each.tenant))


def _state(
    name: str, size: int, first: list[tuple[str, float]], now: float, limits: Mapping[str, str]
) -> TenantState:
    text = limits.get(name) or limits.get(ALL_OTHERS) or "- -"
    most_open, most_per_s = (None if each == "-" else float(each) for each in text.split())
    oldest_s = max(0.0, now - first[0][1] / 1000) if first else None
    most = None if most_open is None else int(most_open)
    return TenantState(name, size, oldest_s, most, most_per_s)
